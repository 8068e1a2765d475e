"""Hugging Face's own hub client against a small local server that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SET = "HuggingFaceTB/finemath"
FILE = "finemath-4plus/train-00000.parquet"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a hub with one data set of one file; return its address and the list of requests received."""
    parquet.write_table(pyarrow.table({"text": ["1 + 1 = 2", "2 + 2 = 4"], "url": ["a", "b"]}), tmp_path / "f.parquet")
    content = (tmp_path / "f.parquet").read_bytes()
    entry = {"type": "file", "path": FILE, "size": len(content), "oid": "e"}
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            if "/resolve/" in self.path:
                first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
                part = content[int(first) : int(last) + 1 if last else None]
                self.answer(part, 206 if "Range" in self.headers else 200, ETag='"e"', X_Repo_Commit=COMMIT)
            elif "/tree/" in self.path:
                self.answer(json.dumps([entry]).encode())
            elif self.path.startswith(f"/api/datasets/{SET}"):
                info = {"id": SET, "sha": COMMIT, "siblings": [{"rfilename": FILE}, {"rfilename": "README.md"}]}
                self.answer(json.dumps({**info, "cardData": {"license": "odc-by"}}).encode())
            else:
                self.answer(b"{}", 404)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            requests.append(f"POST {self.path}")
            self.answer(json.dumps([entry]).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def run_download(endpoint: str, out: Path, script: str = "") -> subprocess.CompletedProcess[str]:
    code = (
        f"import yaongi.data.stages.download as d; {script}\nimport sys; from yaongi.data.__main__ import main; main()"
    )
    arguments = ["download", "--only", "finemath", "--out", str(out), "--tokens", "1000"]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(out / "home")}
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        environment.pop(proxy, None)
        environment.pop(proxy.upper(), None)
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


def test_a_data_set_comes_at_a_pinned_commit(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, requests = hub
    done = run_download(endpoint, tmp_path / "raw")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "raw" / "train" / "math" / "finemath" / "source.json").read_text())
    assert (record["id"], record["revision"], record["licence"], record["documents"]) == (SET, COMMIT, "odc-by", 2)
    assert any(f"/resolve/{COMMIT}/" in request for request in requests)
    assert "2 documents" in done.stdout


def test_no_network_is_one_line(tmp_path: Path) -> None:
    done = run_download("http://127.0.0.1:9", tmp_path / "raw", "d.TRIES = 2")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: download: HuggingFaceTB/finemath not reached in 2 tries")
    )
