"""`python -m yaongi.chat`: what it keeps of a conversation, its commands, and Ctrl-C."""

import json
import os
import pty
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from models import save_model
from serve_support import chain_model

from yaongi.chat import Chat
from yaongi.data.chats.encode import encode_prompt
from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi
from yaongi.model.generation import generate

WARNING = "warning: the model is not tuned for chats: <|im_end|> is not among the ends of its answers"
Talk = Callable[..., tuple[str, str]]


@pytest.fixture
def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Return a function that runs the command with these lines typed, and gives what it printed and noted."""

    def talk(*lines: str, of: Path = folder, **options: object) -> tuple[str, str]:
        typed = iter(lines)

        def type_next(prompt: str) -> str:
            line = next(typed, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", type_next)
        Chat(of, **{"temperature": 0.0, "max_new_tokens": 9} | options).run()  # type: ignore[arg-type]
        captured = capsys.readouterr()
        return captured.out, captured.err

    return talk


def test_answers_keep_the_conversation(talk: Talk, model: Yaongi, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each answer is greedy generation's after all messages; /save writes them for training, line by line."""
    file = tmp_path / "a talk.jsonl"
    output, notes = talk("안녕", "  ", "고양이는?", f"/save {file}", "/reset", "안녕", f"/save {file}", system="짧게.")
    messages = [{"role": "system", "content": "짧게."}]
    answers = []
    for question in ("안녕", "고양이는?"):
        messages.append({"role": "user", "content": question})
        ids = generate(model, [encode_prompt(messages, tokenizer)], max_new_tokens=9)[0]
        answers.append(tokenizer.decode(ids))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert output == f"{answers[0]}\n{answers[1]}\n{answers[0]}\n\n"
    saved = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert saved == [messages, messages[:3]]
    assert "warning" not in notes


def test_the_oldest_turns_go_when_there_is_no_room(talk: Talk, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    long = "고양이는 나무 아래에서 잔다. " * 4
    assert len(tokenizer.encode(long)) < 110
    _, notes = talk(long, long, long, long, f"/save {file}", system="짧게.")
    assert notes.count("the conversation is too long: its first ") >= 1
    (line,) = file.read_text().splitlines()
    kept = json.loads(line)["messages"]
    assert kept[0] == {"role": "system", "content": "짧게."}
    assert [message["role"] for message in kept[1:]] == ["user", "assistant"] * ((len(kept) - 1) // 2)
    assert 3 <= len(kept) < 9
    assert len(encode_prompt(kept[:-1], tokenizer)) <= 256 - 9
    _, notes = talk(long * 9, "안녕")
    assert "error: chat: a message must be at most 247 tokens long, got " in notes


def test_mistakes_are_lines(talk: Talk, tmp_path: Path) -> None:
    """And what was said before stays."""
    output, notes = talk(
        "/what", "/save", f"/save {tmp_path}/x", f"/save {tmp_path}", "안녕", f"/save {tmp_path}", "/help"
    )
    errors = [line for line in notes.splitlines() if line.startswith("error: ")]
    assert errors[:3] == [
        "error: chat: commands must be /reset, /save or /help, got /what",
        "error: chat: /save must be followed by a file, got none",
        "error: chat: a conversation must have a message to be saved, got none",
    ]
    assert "Is a directory" in errors[-1]
    assert "Ctrl-C ends an answer" in notes
    assert output.count("\n") == 2
    with pytest.raises(ValueError, match=r"^chat: max_new_tokens must be 1 or more, got 0$"):
        talk(max_new_tokens=0)


def test_a_base_model_is_warned_of(talk: Talk, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It answers all the same, and ends with a turn."""
    header = tokenizer.encode("assistant\n")[-1]
    letters = [tokenizer.piece_to_id(f"<0x{ord(letter):02X}>") for letter in "miau"]
    chain = [header, *letters, tokenizer.piece_to_id("<|im_end|>"), header]
    folder = save_model(chain_model(tokenizer, chain), tokenizer, tmp_path / "base")
    output, notes = talk("안녕", of=folder)
    assert output == "miau\n\n"
    assert notes.startswith(WARNING)


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_program(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In a terminal, with a model that would go on for long; what had come of the answer is kept."""
    header = tokenizer.encode("assistant\n")[-1]
    letters = [tokenizer.piece_to_id(f"<0x{ord(letter):02X}>") for letter in "mi"]
    model = chain_model(tokenizer, [header, *letters, letters[0]], max_sequence_length=200_000)
    folder = save_model(model, tokenizer, tmp_path / "endless")
    process, terminal = pty.fork()
    if process == 0:
        command = [sys.executable, "-m", "yaongi.chat", str(folder), "--temperature", "0", "--max-new-tokens", "90000"]
        os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"})
    seen = ""

    def wait_for(text: str, press: bytes = b"") -> None:
        """Read until a text comes, and forget all up to its end; press a key again in each second that is silent.

        CPython's `input` misses a Ctrl-C that comes just before it waits for the next key, and takes it with that key.
        """
        nonlocal seen
        end = time.monotonic() + 90
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096).decode()
            else:
                os.write(terminal, press)
        seen = seen.split(text, 1)[1]

    wait_for("> ")
    os.write(terminal, b"hello\n")
    wait_for("mimimimi")
    os.write(terminal, b"\x03")
    wait_for("(stopped)")
    wait_for("> ")
    os.write(terminal, b"dropped")
    wait_for("dropped")
    wait_for("> ", press=b"\x03")
    os.write(terminal, f"/save {tmp_path / 'talk.jsonl'}\n".encode())
    wait_for("saved in")
    wait_for("> ")
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)
    asked, answer = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert asked["content"] == "hello"
    assert answer["content"].startswith("mimimimi")
