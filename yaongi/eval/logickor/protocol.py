"""The protocol of LogicKor, read from the user's clone of it: nothing of its text is here, and none of its code is run.

`questions.jsonl` holds the questions, `templates.py` the examples of each mode and the judge's system prompts, and the
function `create_answers` of `evaluator.py` the frame of the message to the judge. Both files are parsed, and the few
forms of statement that build the message are followed.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = Mapping[str, str]
TURNS = ("single", "multi")


@dataclass(frozen=True)
class Question:
    """A question and the one that follows it."""

    id: int
    category: str
    turns: tuple[str, str]
    references: tuple[str | None, str | None]


@dataclass(frozen=True)
class Protocol:
    """What a clone says."""

    questions: tuple[Question, ...]
    modes: Mapping[str, Sequence[Message]]  # the messages before the first question
    judge_prompts: Mapping[str, str]  # the judge's system prompt, by turn
    frame: Sequence[ast.stmt]  # the statements that build the message to the judge

    def judge_messages(self, question: Question, answers: Sequence[str], turn: str) -> list[dict[str, str]]:
        """Return the messages that ask for a score of the first answer (`single`) or of both (`multi`)."""
        names = {
            "model_questions": question.turns,
            "model_outputs": answers,
            "model_references": question.references if any(question.references) else None,
            "is_multi_turn": turn == "multi",
        }
        return [
            {"role": "system", "content": self.judge_prompts[turn]},
            {"role": "user", "content": _build(self.frame, names)},
        ]


def read_protocol(folder: Path) -> Protocol:
    """Read a clone.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not of the form that is known.
    """
    for name in ("questions.jsonl", "templates.py", "evaluator.py"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"logickor: --protocol must be a clone of LogicKor with {name}, got {folder}")
    tables = _tables(folder / "templates.py")
    modes, judges = tables.get("PROMPT_STRATEGY"), tables.get("JUDGE_TEMPLATE")
    if not isinstance(modes, dict) or not isinstance(judges, dict) or not {"single_turn", "multi_turn"} <= set(judges):
        raise ValueError(f"logickor: templates.py must hold PROMPT_STRATEGY and JUDGE_TEMPLATE, got {sorted(tables)}")
    prompts = {turn: judges[f"{turn}_turn"] for turn in TURNS}
    return Protocol(_questions(folder / "questions.jsonl"), modes, prompts, _frame(folder / "evaluator.py"))


def _questions(path: Path) -> tuple[Question, ...]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            references = [*(row.get("references") or ()), None, None]
            turns = row["questions"]
            found.append(
                Question(int(row["id"]), str(row["category"]), (turns[0], turns[1]), (references[0], references[1]))
            )
        except (ValueError, KeyError, IndexError, TypeError) as error:
            what = f"{type(error).__name__} {error}"
            raise ValueError(f"logickor: line {number} of questions.jsonl must be a question, got {what}") from error
    if not found:
        raise ValueError("logickor: questions.jsonl must hold questions, got none")
    return tuple(found)


def _tables(path: Path) -> dict[str, Any]:
    """Return the literals that a file assigns to names."""
    found = {}
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def _frame(path: Path) -> list[ast.stmt]:
    """Return the statements of `create_answers` that build `prompt`."""
    functions = [n for n in ast.walk(_parse(path)) if isinstance(n, ast.FunctionDef) and n.name == "create_answers"]
    if not functions:
        raise ValueError("logickor: evaluator.py must hold the function create_answers, got none")
    frame = [statement for statement in functions[0].body if _changes_prompt(statement)]
    if not frame:
        raise ValueError("logickor: create_answers must build prompt, got no statement that does")
    return frame


def _changes_prompt(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If):
        return any(map(_changes_prompt, statement.body))
    target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
    return isinstance(target, ast.Name) and target.id == "prompt"


def _build(frame: Sequence[ast.stmt], names: Mapping[str, Any]) -> str:
    """Follow the statements: assignments and additions to `prompt`, within conditions."""
    text = ""
    for statement in frame:
        if isinstance(statement, ast.If):
            if _value(statement.test, names):
                text += _build(statement.body, names)
        elif isinstance(statement, ast.Assign):
            text = str(_value(statement.value, names))
        elif isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
            text += str(_value(statement.value, names))
        else:
            raise ValueError(_unknown(statement))
    return text


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return _value(node.value, names)[node.slice.value]
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return all(_value(part, names) for part in node.values)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(_value(part, names)) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _value(node.value, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _value(node.left, names) + _value(node.right, names)
    raise ValueError(_unknown(node))


def _unknown(node: ast.AST) -> str:
    return f"logickor: create_answers must build prompt in the published form, got {ast.unparse(node)[:80]}"


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8-sig"))
    except SyntaxError as error:
        raise ValueError(f"logickor: {path.name} must be Python, got {error.msg} in line {error.lineno}") from error
