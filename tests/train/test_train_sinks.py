"""Sinks: whatever happens to them, a run goes on with one warning, and ends soon."""

import http.server
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import losses, run
from wandb.proto import wandb_internal_pb2

from yaongi.train.config import Running
from yaongi.train.metrics import sinks
from yaongi.train.metrics.sinks import TensorBoard, Wandb, open_sinks

KEY = "0123456789abcdef0123456789abcdef01234567"
SILENT = "import time; print('hello', flush=True); time.sleep(1000)"
CRASHES = "import sys; input(); print('!wandb: a wrong key', flush=True); sys.exit(1)"
DIES = "import sys; sys.exit(3)"


class Said(list[str]):
    """What a sink has printed."""

    def wait(self, sink: Wandb, count: int) -> None:
        """Log until there are so many lines."""
        until = time.monotonic() + 30
        while len(self) < count and time.monotonic() < until:
            sink.log(0, {})
            time.sleep(0.02)


def make(program: str, said: Said) -> Wandb:
    return Wandb({"folder": "x"}, said.append, said.append, [sys.executable, "-c", program])


def test_a_process_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing: lines up to a megabyte wait, then one warning; the end doesn't wait for it."""
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.2)
    said = Said()
    sink = make(SILENT, said)
    said.wait(sink, 1)
    for step in range(40):
        sink.log(step, {f"value {number}": 1.0 for number in range(3000)})
    assert said == ["hello", "wandb: it takes no more lines; the run goes on without it"]
    sink.close()
    assert len(said) == 2
    with pytest.raises(ProcessLookupError):
        os.kill(sink._process.pid, 0)


@pytest.mark.parametrize(
    ("program", "message"),
    [(CRASHES, "wandb: a wrong key"), (DIES, "wandb: [Errno 32] Broken pipe; the run goes on without it")],
)
def test_a_process_that_dies(program: str, message: str) -> None:
    """One line, its own where it said one."""
    said = Said()
    sink = make(program, said)
    said.wait(sink, 1)
    sink.log(1, {"loss": 1.0})
    sink.log(2, {"loss": 1.0})
    sink.close()
    assert said == [message]


def test_a_process_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.2)
    said = Said()
    make(SILENT, said).close()
    wanted = "wandb: it did not end within 0.2 s; metrics.jsonl has everything"
    assert [line for line in said if line != "hello"] == [wanted]


def test_a_killed_process_is_named() -> None:
    said = Said()
    sink = make("import time; time.sleep(1000)", said)
    os.killpg(sink._process.pid, signal.SIGKILL)
    sink.close()
    assert said == ["wandb: it ended with status -9; metrics.jsonl has everything"]


def test_tensorboard_without_a_disk(tmp_path: Path) -> None:
    """Where it can't write, at its start and later."""
    said: list[str] = []
    (tmp_path / "tensorboard").write_text("a file")
    sink = TensorBoard(tmp_path, 0, said.append)
    sink.log(1, {"loss": 1.0})
    sink.close()
    assert len(said) == 1
    assert said[0].startswith("tensorboard: ")
    assert said[0].endswith("; the run goes on without it")


def test_tensorboard_that_fails_later(tmp_path: Path) -> None:
    said: list[str] = []
    (sink,) = open_sinks(Running(out=tmp_path, wandb="off"), {}, 0, said.append, said.append)
    sink._writer.add_scalar = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # type: ignore[attr-defined]
    for step in range(3):
        sink.log(step, {"loss": 1.0})
    sink.close()
    assert said == ["tensorboard: [Errno 28] No space left on device; the run goes on without it"]


def test_auto_is_off_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once, and nothing is made; a key of `wandb login` counts."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    run, said = Running(out=tmp_path / "run", tensorboard=False), list[str]()
    assert open_sinks(run, {}, 0, said.append, said.append) == []
    assert said == [
        "wandb: off, for there is no WANDB_API_KEY (--wandb offline keeps a log that `wandb sync` sends later)"
    ]
    assert not (tmp_path / "run").exists()
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert sinks.has_key()


def log_records(content: bytes) -> Iterator[bytes]:
    """Read wandb's log, which has LevelDB's format: blocks of 32 KiB, in them parts with a header of 7 bytes."""
    place, record = 7, b""  # after the file's own header
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_what_wandb_gets(tokens: Path, tmp_path: Path) -> None:
    """Name, group, tags, configuration, curves, expert loads, samples as a table, and the report, in a run's log."""
    out = tmp_path / "seed-1"
    named = ("--wandb", "offline", "--project", "cats", "--wandb-group", "seeds", "--wandb-tags", "tiny", "test")
    done = run(tokens, out, *named, "--sample-tokens", "4")
    assert done.returncode == 0, done.stderr
    (file,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    records = [wandb_internal_pb2.Record.FromString(record) for record in log_records(file.read_bytes())]
    (begun,) = (record.run for record in records if record.HasField("run"))
    assert (begun.display_name, begun.run_group, begun.project, set(begun.tags)) == (
        *("seed-1", "seeds", "cats"),
        {"tiny", "test"},
    )
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["preset"] == "small"
    logged: dict[str, list[Any]] = {}
    for record in records:
        for item in record.history.item:
            logged.setdefault(".".join(item.nested_key) or item.key, []).append(json.loads(item.value_json))
    assert len(logged["loss"]) >= 2
    assert any(key.startswith("bpb/") for key in logged)
    assert set(logged["expert_load._type"]) == {"histogram"}
    assert logged["samples.nrows"] == [3, 6, 9]
    assert logged["report._type"] == ["html-file"]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A wandb server that knows no key."""

    def do_POST(self) -> None:
        body = json.dumps({"errors": [{"message": "user is not logged in"}]}).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def refusing() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def silent() -> Iterator[str]:
    """Return the address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def trained(tokens: Path, out: Path, url: str, key: str) -> "subprocess.CompletedProcess[str]":
    """Train with wandb at a server, and check that the run is whole and ends within a minute."""
    began = time.monotonic()
    done = run(tokens, out, "--wandb", "online", WANDB_BASE_URL=url, WANDB_API_KEY=key)
    assert done.returncode == 0, done.stderr
    assert len(losses(out)) == 12
    assert time.monotonic() - began < 60 + 30  # the run itself takes up to half a minute
    assert "Traceback" not in done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "wandb" in line]
    assert len(lines) == 1, lines
    return done


@pytest.mark.parametrize("key", [pytest.param("short", marks=pytest.mark.long), KEY])
def test_a_wrong_key(tokens: Path, tmp_path: Path, refusing: str, key: str) -> None:
    done = trained(tokens, tmp_path / "run", refusing, key)
    assert "; so this run is logged offline" in done.stdout
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.long
def test_a_server_that_does_not_answer(tokens: Path, tmp_path: Path, silent: str) -> None:
    trained(tokens, tmp_path / "run", silent, KEY)
