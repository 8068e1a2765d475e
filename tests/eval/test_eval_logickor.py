"""LogicKor against a clone in miniature, written for this test, and a judge on loopback that plays every part."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from programs import run_module

from yaongi.eval.logickor.answers import read_answers
from yaongi.eval.logickor.judge import Asked, Judge, Reply, ask_all
from yaongi.eval.logickor.marks import mark, summarise
from yaongi.eval.logickor.protocol import read_protocol

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-secret-of-this-test"
TEMPLATES = """
PROMPT_STRATEGY = {
    "default": [],
    "1-shot": [{"role": "user", "content": "하나?"}, {"role": "assistant", "content": "둘."}],
    "cot-1-shot": [{"role": "system", "content": "천천히."}, {"role": "user", "content": "하나?"},
                   {"role": "assistant", "content": "둘."}],
}
JUDGE_TEMPLATE = {"single_turn": "하나를 보라", "multi_turn": "둘을 보라"}
"""
EVALUATOR = """
import nothing_that_exists
raise SystemExit("this file is never run")

def create_answers(client, model_output, judge_model, is_multi_turn: bool = False, i=0):
    model_questions = model_output["questions"]
    model_outputs = model_output["outputs"]
    model_references = model_output["references"]
    prompt = (
        f"평가하라.\\n"
        f"<물음> {model_questions[0]}"
    )
    if model_references and model_references[0]:
        prompt += f"\\n<참고> {model_references[0]}"
    prompt += f"\\n<답> {model_outputs[0]}"
    if is_multi_turn:
        prompt += f"\\n<다음> {model_questions[1]}"
        if model_references and model_references[1]:
            prompt += f"\\n<참고> {model_references[1]}"
        prompt += f"\\n<답> {model_outputs[1]}"
    prompt += "\\n<끝>"
    try:
        return client.create(prompt)
    except Exception:
        return None
"""
CATEGORIES = ("추론", "수학", "글쓰기")
PARTS = ("plain", "bold", "half", "eleven", "nothing", "two", "busy", "broken", "hang", "refused")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the clone: a question for each part that the judge plays."""
    folder = tmp_path_factory.mktemp("clone")
    rows = [
        {
            "id": number,
            "category": CATEGORIES[number % 3],
            "questions": [f"part={part} 하나", f"part={part} 둘", "셋째는 묻지 않는다"][: 3 if number == 3 else 2],
            "references": [f"참고 {part}", None] if number % 2 else [None, None],
        }
        for number, part in enumerate(PARTS, 1)
    ]
    rows[1]["references"] = None
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    (folder / "templates.py").write_text(TEMPLATES)
    (folder / "evaluator.py").write_text(EVALUATOR)
    return folder


class Server(ThreadingHTTPServer):
    """The judge: what it says depends on the part that the question names."""

    daemon_threads = True
    request_queue_size = 64  # more than are asked at once: a full queue would look like a judge that hangs

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.counting = threading.Lock()
        self.keys: set[str | None] = set()
        self.delay = 0.0
        self.forbidden = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        user = body["messages"][1]["content"]
        with server.counting:
            server.asked[user] += 1
        server.keys.add(self.headers["Authorization"])
        assert (self.path, body["temperature"]) == ("/v1/chat/completions", 0)
        time.sleep(server.delay)
        part = re.search(r"part=(\w+)", user)
        name = part[1] if part else "plain"
        if server.forbidden:
            return self.reply(401, f"no such key: {KEY}")
        if name == "busy" and server.asked[user] < 3:
            return self.reply(429, "slow down", {"Retry-After": "7"})
        if name == "broken":
            return self.reply(500, "sorry")
        if name == "refused":
            return self.reply(400, "bad")
        if name == "hang":
            time.sleep(3)
            return None
        score = {"bold": "**점수:** **8**", "half": "점수: 9.5", "eleven": "점수: 11", "nothing": "좋다"}
        score |= {"two": "점수: 3 이라 했으나 점수: 7", "separator": "점수:\u2028 6"}
        text = f"평가: 그럭저럭\n{score.get(name, '점수: 6')}"
        return self.reply(200, json.dumps({"choices": [{"message": {"content": text}}]}))

    def reply(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def asked_of(clone: Path) -> list[Asked]:
    protocol = read_protocol(clone)
    return [
        Asked("default", q.id, turn, protocol.judge_messages(q, [f"답 {q.id}", "다음 답"], turn))
        for q in protocol.questions
        for turn in ("single", "multi")
    ]


def test_the_clone_is_read_and_not_run(clone: Path) -> None:
    """The message has its parts in the published order, a reference only where there is one."""
    protocol = read_protocol(clone)
    assert len(protocol.questions) == len(PARTS)
    first, second, third = protocol.questions[:3]
    assert third.turns == ("part=half 하나", "part=half 둘")
    assert second.references == (None, None)
    assert protocol.judge_messages(first, ["A", "B"], "single") == [
        {"role": "system", "content": "하나를 보라"},
        {"role": "user", "content": "평가하라.\n<물음> part=plain 하나\n<참고> 참고 plain\n<답> A\n<끝>"},
    ]
    multi = protocol.judge_messages(second, ["A", "B"], "multi")
    assert multi[0]["content"] == "둘을 보라"
    assert multi[1]["content"] == "평가하라.\n<물음> part=bold 하나\n<답> A\n<다음> part=bold 둘\n<답> B\n<끝>"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("evaluator.py", None, "--protocol must be a clone of LogicKor with evaluator.py"),
        ("evaluator.py", "x = 1", "evaluator.py must hold the function create_answers, got none"),
        ("evaluator.py", "def create_answers(): pass", "create_answers must build prompt, got no statement"),
        ("templates.py", "PROMPT_STRATEGY = {}", "must hold PROMPT_STRATEGY and JUDGE_TEMPLATE"),
        ("templates.py", "(", "templates.py must be Python"),
        ("questions.jsonl", '{"id": 1}', "line 1 of questions.jsonl must be a question, got KeyError 'questions'"),
        ("questions.jsonl", "", "questions.jsonl must hold questions, got none"),
    ],
)
def test_a_strange_clone(clone: Path, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    for file in clone.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_protocol(tmp_path)


def test_code_in_the_frame_is_refused(clone: Path, tmp_path: Path) -> None:
    """A call where the message is built is named, not made."""
    for file in clone.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "evaluator.py").write_text("def create_answers():\n    prompt = open('/etc/passwd').read()\n")
    protocol = read_protocol(tmp_path)
    with pytest.raises(ValueError, match=r"in the published form, got open\('/etc/passwd'\).read\(\)"):
        protocol.judge_messages(protocol.questions[0], ["A", "B"], "single")


def test_every_failure_is_kept_apart(clone: Path, server: Server, tmp_path: Path) -> None:
    """Each part of the judge, both turns: scores, failures with their reason, tries, waits."""
    waits: list[float] = []
    judge = Judge(server.url, "loopback", KEY, timeout=2.0, sleep=waits.append)
    wanted = asked_of(clone)
    replies = ask_all(wanted, judge, tmp_path / "replies.jsonl", 8, lambda _: None)
    marks = {PARTS[r.id - 1]: mark(r) for r in replies if r.turn == "multi"}
    scores = {part: found.score for part, found in marks.items() if found.score is not None}
    assert scores == {"plain": 6.0, "bold": 8.0, "half": 9.5, "busy": 6.0}
    failures = {part: found.failure for part, found in marks.items() if found.failure}
    assert failures == {
        "eleven": "score above 10: 11",
        "nothing": "no score in the reply",
        "two": "several scores: 3, 7",
        "broken": "no reply: status 500, 5 times",
        "hang": "no reply: time-out, 5 times",
        "refused": "no reply: status 400",
    }
    assert {part: found.published for part, found in marks.items()} == {
        **{"plain": 6, "bold": 8, "half": 9.5, "busy": 6, "eleven": 11, "two": 3},
        **{"nothing": 0, "broken": 0, "hang": 0, "refused": 0},
    }
    tries = Counter({part: sum(n for user, n in server.asked.items() if f"part={part} " in user) for part in PARTS})
    assert tries == {**dict.fromkeys(PARTS, 2), "busy": 6, "broken": 10, "hang": 10}
    assert waits.count(7.0) == 4  # Retry-After
    assert sorted(waits)[:4] == [1.0] * 4
    assert max(waits) == 8.0
    assert server.keys == {f"Bearer {KEY}"}
    found = summarise(replies, {q.id: q.category for q in read_protocol(clone).questions})
    mode = found["modes"]["default"]
    assert (mode["answers"], mode["judged"], mode["failed"]) == (20, 8, 12)
    assert mode["single"] == mode["multi"] == mode["overall"] == pytest.approx((6 + 8 + 9.5 + 6) / 4)
    assert mode["as_published"] == pytest.approx((6 + 8 + 9.5 + 6 + 11 + 3) / 10)
    assert len(found["failures"]) == 12
    assert found["categories"]["글쓰기"] == {"single": 8.0, "multi": 8.0}
    before = server.asked.copy()
    again = ask_all(wanted, dataclasses.replace(judge, timeout=0.3), tmp_path / "replies.jsonl", 8, lambda _: None)
    assert [r for r in again if r.text is not None] == [r for r in replies if r.text is not None]
    new = server.asked - before
    assert {re.search(r"part=(\w+)", user)[1] for user in new} == {"broken", "hang", "refused"}  # type: ignore[index]


def test_a_refused_key_stops_at_once(clone: Path, server: Server, tmp_path: Path) -> None:
    server.forbidden = True
    judge = Judge(server.url, "loopback", KEY, sleep=lambda _: None)
    with pytest.raises(
        ValueError, match="--url must be one that takes the key and has loopback, got status 401"
    ) as error:
        ask_all(asked_of(clone), judge, tmp_path / "replies.jsonl", 1, lambda _: None)
    assert KEY not in str(error.value)
    assert sum(server.asked.values()) < 5


def test_a_redirect_does_not_get_the_key(server: Server) -> None:
    """A server that sends elsewhere is an error."""
    seen: list[str | None] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"{server.url}/chat/completions")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            seen.append(self.headers["Authorization"])

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        reply = ask_all(
            [Asked("default", 1, "single", [{"role": "user", "content": "?"}])],
            Judge(f"http://127.0.0.1:{other.server_address[1]}/v1", "loopback", KEY, sleep=lambda _: None),
            Path(os.devnull),
            1,
            lambda _: None,
        )
        other.shutdown()
    assert reply[0].error == "status 302"
    assert server.asked == {}


def test_a_reply_is_whole_whatever_letters_it_has(server: Server, tmp_path: Path) -> None:
    """A line separator ends no line of the file: such a reply is not asked for again."""
    one = Asked(
        "default", 1, "single", [{"role": "system", "content": ""}, {"role": "user", "content": "part=separator"}]
    )
    judge = Judge(server.url, "loopback", KEY, sleep=lambda _: None)
    replies = [ask_all([one], judge, tmp_path / "replies.jsonl", 1, lambda _: None) for _ in range(2)]
    assert replies[0] == replies[1]
    assert replies[0][0].text == "평가: 그럭저럭\n점수:\u2028 6"
    assert sum(server.asked.values()) == 1


def test_answers_are_read_after_a_kill(tmp_path: Path) -> None:
    """Beside replies whose last line is torn, and with a separator in an answer."""
    folder = tmp_path / "logickor"
    folder.mkdir()
    row = {"id": 1, "category": "추론", "outputs": ["하나\u2028둘", "셋\x85"]}
    (folder / "default.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "replies.jsonl").write_text('{"key": "a"}\n{"ke\n{"key": "b"}\n')
    (folder / "model.json").write_text('{"name": "m"}')
    assert read_answers(tmp_path) == ({"name": "m"}, {"default": [row]})


def test_marks() -> None:
    def of(text: str | None) -> Any:
        found = mark(Reply("k", "default", 1, "single", "j", text, None if text else "time-out"))
        return found.score, found.published

    assert of("점수:10") == (10.0, 10.0)
    assert of("점수: 7\n다시 말해 점수: 7.0") == (7.0, 7.0)
    assert of("**점수**: 4.5") == (4.5, 4.5)
    assert of("점수: 10.5") == (None, 10.5)
    assert of(None) == (None, 0.0)


def test_as_a_person_uses_it(clone: Path, folder: Path, server: Server, tmp_path: Path) -> None:
    """Generate; judge, killed in the middle and run again: nothing is asked twice, the key is nowhere."""
    out = tmp_path / "eval"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    short = tmp_path / "clone"
    short.mkdir()
    for file in clone.iterdir():
        lines = file.read_bytes().splitlines(keepends=True)
        (short / file.name).write_bytes(b"".join(lines[:5] if file.suffix == ".jsonl" else lines))
    program = [sys.executable, "-m", "yaongi.eval", "logickor"]
    generate = [*program, "generate", str(folder), "--protocol", str(short), "--out", str(out), "--max-new-tokens", "6"]
    done = run_module(*generate[2:], env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 answers") == 3
    rows = [json.loads(line) for line in (out / "logickor" / "1-shot.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"id", "category", "outputs"}] * 5
    assert all(answer == answer.strip() for row in rows for answer in row["outputs"])
    assert not any("하나?" in file.read_text(errors="replace") for file in out.rglob("*") if file.is_file())
    judge = [*program, "judge", str(out), "--protocol", str(short), "--url", server.url, "--judge", "loopback"]
    server.delay = 0.2
    begun = subprocess.Popen(
        [*judge, "--at-once", "2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    replies = out / "logickor" / "replies.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (replies.is_file() and replies.read_bytes().count(b"\n") >= 6):
        time.sleep(0.01)
    begun.send_signal(signal.SIGKILL)
    said = begun.communicate()[0].decode()
    time.sleep(0.5)
    server.delay = 0.0
    kept = replies.read_bytes()
    answered = {json.loads(line)["key"] for line in kept.splitlines()}
    done = run_module(*judge[2:], env=environment)
    assert done.returncode == 1, done.stderr  # two parts give no score
    lines = [json.loads(line) for line in replies.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    assert {line["key"] for line in lines} >= answered
    assert sum(server.asked.values()) <= len(lines) + 2  # those two that were under way when it was killed
    found = json.loads((out / "logickor.json").read_text())
    assert set(found["modes"]) == {"default", "1-shot", "cot-1-shot"}
    assert {failure["why"] for failure in found["failures"]} == {"score above 10: 11", "no score in the reply"}
    assert found["modes"]["default"]["overall"] == pytest.approx((6 + 8 + 9.5) / 3)
    assert "scores of other judges are on another scale" in done.stdout
    page = (out / "report.html").read_text()
    assert "LogicKor by category" in page
    assert "12 judgements failed" in page
    everything = (
        said + done.stdout + done.stderr + "".join(f.read_text(errors="replace") for f in out.rglob("*") if f.is_file())
    )
    assert KEY not in everything
    assert server.keys == {f"Bearer {KEY}"}
