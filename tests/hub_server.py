"""A small local server that speaks the Hugging Face hub's protocol for data sets."""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(sets: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serve data sets, each a mapping from names to contents; give the address and the list of requests received."""
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
            path = unquote(urlsplit(self.path).path)
            if path == "/":
                self.answer(b"a hub")
                return
            for name, files in sets.items():
                if path.startswith(f"/datasets/{name}/resolve/"):
                    self.file(files.get(path.removeprefix(f"/datasets/{name}/resolve/").partition("/")[2]))
                    return
                if path.startswith(f"/api/datasets/{name}/tree/"):
                    self.answer(json.dumps(list(entries(files).values())).encode())
                    return
                if path.startswith(f"/api/datasets/{name}"):
                    info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                    self.answer(json.dumps({**info, "cardData": {"license": "odc-by"}}).encode())
                    return
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def file(self, content: bytes | None) -> None:
            if content is None:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")
                return
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            self.answer(part, 206 if "Range" in self.headers else 200, ETag=f'"{len(content)}"', X_Repo_Commit=COMMIT)

        def do_POST(self) -> None:
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}").get("paths", [])
            requests.append(f"POST {self.path}")
            found = next((entries(files) for name, files in sets.items() if f"/{name}/" in self.path), {})
            self.answer(json.dumps([found[path] for path in wanted if path in found]).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def entries(files: Mapping[str, bytes]) -> dict[str, dict[str, object]]:
    """Return the hub's entry of each file and folder."""
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents if str(parent) != "."}
    found: dict[str, dict[str, object]] = {
        folder: {"type": "directory", "path": folder, "oid": "d"} for folder in sorted(folders)
    }
    found |= {name: {"type": "file", "path": name, "size": len(content), "oid": "e"} for name, content in files.items()}
    return found


def hub_environment(endpoint: str, home: str) -> dict[str, str]:
    """Return an environment whose hub is at `endpoint`."""
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    kept = {name: value for name, value in os.environ.items() if name.lower() not in proxies}
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": home}
