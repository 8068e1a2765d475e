"""A model's answers to LogicKor: both turns in each mode, the second after the model's own first answer."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yaongi.data.chats.template import ANSWER_HEADER, render_chat
from yaongi.eval.answering import Answerer, Prompt
from yaongi.eval.logickor.protocol import Protocol
from yaongi.files import read_json, read_json_lines, write_atomically, write_json

FOLDER = "logickor"
MODEL = "model.json"
REPLIES = "replies.jsonl"  # the judge's


def write_answers(
    out: Path,
    protocol: Protocol,
    answerer: Answerer,
    description: Mapping[str, Any],
    max_new_tokens: int,
    say: Callable[[str], None],
) -> None:
    """Write `logickor/MODE.jsonl`: id, category and both answers, without the questions.

    Greedy decoding; answers are stripped of blanks at both ends. An answer ends as the model's own do.
    """
    folder = out / FOLDER
    for mode, before in protocol.modes.items():
        first = _answer(answerer, [[*before, _user(q.turns[0])] for q in protocol.questions], max_new_tokens)
        talks = [
            [*before, _user(q.turns[0]), {"role": "assistant", "content": answer}, _user(q.turns[1])]
            for q, answer in zip(protocol.questions, first, strict=True)
        ]
        second = _answer(answerer, talks, max_new_tokens)
        if answerer.world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps({"id": q.id, "category": q.category, "outputs": outputs}, ensure_ascii=False) + "\n"
                for q, *outputs in zip(protocol.questions, first, second, strict=True)
            ]
            write_atomically(folder / f"{mode}.jsonl", "".join(lines).encode())
        empty = sum(not answer for answer in (*first, *second))
        say(f"logickor {mode}: {2 * len(first)} answers" + (f", {empty} of them empty" if empty else ""))
    if answerer.world.is_main:
        facts = {**description, "max_new_tokens": max_new_tokens}
        write_json(folder / MODEL, facts)


def read_answers(out: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return what identifies the model, and the answers of each mode.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged.
    """
    folder = out / FOLDER
    if not (folder / MODEL).is_file():
        made = "python -m yaongi.eval logickor generate RUN/model --out EVAL"
        raise FileNotFoundError(f"logickor: folder must hold answers, got {out}; {made} writes them")
    modes = {path.stem: read_json_lines(path) for path in sorted(folder.glob("*.jsonl")) if path.name != REPLIES}
    return read_json(folder / MODEL), modes


def _answer(answerer: Answerer, talks: Sequence[Sequence[Mapping[str, str]]], max_new_tokens: int) -> list[str]:
    prompts = [Prompt(render_chat(talk) + ANSWER_HEADER, (), max_new_tokens) for talk in talks]
    return [answer.strip() for answer in answerer.answer(prompts)]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
