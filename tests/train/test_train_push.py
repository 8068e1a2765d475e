"""Models go to the hub, played by a local server: what arrives, the card, and what a refusal says."""

import base64
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub_server import hub_environment
from programs import run_module
from safetensors.torch import load
from small_run import arguments

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model-00001-of-00001.safetensors"
TOKEN = "hf_a_token_of_this_test"


class Hub(ThreadingHTTPServer):
    """Repositories with branches of files; a token that isn't `TOKEN` may not write."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.made: list[dict[str, Any]] = []
        self.branches: dict[str, dict[str, bytes]] = {"main": {}}
        self.blobs: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, branch: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.branches[branch][value["path"]] = self.blobs[value["oid"]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_POST(self) -> None:
        hub: Any = self.server
        content, path = self.body(), self.path.partition("?")[0]
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}} for o in objects]
            return self.answer({"transfer": "basic", "objects": upload})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "no"}, 401)
        if path == "/api/validate-yaml":  # of the card
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            hub.made.append(json.loads(content))
            return self.answer({"url": f"{hub.url}/lab/cat", "name": "lab/cat"})
        if found := re.fullmatch(r"/api/models/lab/cat/branch/(.+)", path):
            hub.branches[found[1]] = {}
            return self.answer({})
        if "/preupload/" in path:
            files = json.loads(content)["files"]
            kinds = ["lfs" if f["path"].endswith((".safetensors", ".model")) else "regular" for f in files]
            modes = [
                {"path": f["path"], "uploadMode": k, "shouldIgnore": False} for f, k in zip(files, kinds, strict=True)
            ]
            return self.answer({"files": modes})
        if found := re.fullmatch(r"/api/models/lab/cat/commit/(.+)", path):
            hub.commit(found[1], [json.loads(line) for line in content.splitlines()])
            return self.answer({"commitUrl": f"{hub.url}/lab/cat/commit/1", "commitOid": "1" * 40})
        return self.answer({}, 404)

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self.body()  # type: ignore[attr-defined]
        self.answer({})

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "no"}, 401)
        return self.answer({"sha": "0" * 40, "id": "lab/cat", "siblings": []})

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def environment(hub: Hub, home: Path, token: str = TOKEN) -> dict[str, str]:
    more = {"HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**hub_environment(hub.url, str(home)), **more}


def run(environment: dict[str, str], *words: str) -> "subprocess.CompletedProcess[str]":
    return run_module(*words, env=environment)


def test_a_run_and_its_checkpoint_are_pushed(tokens: Path, hub: Hub, tmp_path: Path) -> None:
    """The model at the end, with its card; a checkpoint of before on a branch of its own; the token is nowhere."""
    out, env = tmp_path / "run", environment(hub, tmp_path / "home")
    done = run(env, "yaongi.train", *arguments(tokens, out, "--push-to", "lab/cat", "--checkpoint-every", "6"))
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.url}/lab/cat/commit/1" in done.stdout
    assert hub.made[0]["visibility"] == "private"
    files = hub.branches["main"]
    assert {"config.json", WEIGHTS, "tokenizer.json", "tokenizer.model", "README.md"} <= files.keys()
    card = files["README.md"].decode()
    assert "6,144 tokens in 12 steps" in card
    for domain in ("ko", "en", "code", "math"):
        assert re.search(rf"^\| {domain} \| [\d,]+ \| \d+\.\d\d \|$", card, re.MULTILINE)
        assert re.search(rf"^\| {domain} \| \d\.\d\d\d \|$", card, re.MULTILINE)
    step = str(out / "checkpoints" / "step-00000006")
    done = run(env, "yaongi.export", step, "--push-to", "lab/cat", "--revision", "step-6")
    assert done.returncode == 0, done.stderr
    earlier = hub.branches["step-6"]
    assert "3,072 tokens in 6 steps" in earlier["README.md"].decode()
    mine, theirs = load(earlier[WEIGHTS]), load(files[WEIGHTS])
    assert mine.keys() == theirs.keys()
    assert any((mine[name] != theirs[name]).any() for name in mine)
    assert TOKEN not in done.stdout + done.stderr + "".join(
        file.read_text(errors="replace") for file in out.rglob("*") if file.is_file()
    )


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        (
            "lab/cat",
            "hf_wrong",
            "hub: --push-to must name a token that may write to it (HF_TOKEN), got lab/cat and status 401",
        ),
        ("a/b/c", TOKEN, "hub: --push-to must be OWNER/NAME, got 'a/b/c'"),
    ],
)
def test_a_refusal_comes_before_any_work(
    name: str, token: str, message: str, tokens: Path, hub: Hub, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    env = environment(hub, tmp_path / "home", token)
    done = run(env, "yaongi.train", *arguments(tokens, out, "--push-to", name))
    assert done.returncode == 1
    assert done.stderr == f"error: {message}\n"
    assert not (out / "metrics.jsonl").exists()
