"""The web application: routes, keys, limits of a body, streams, and clients that hang up."""

import asyncio
import contextlib
import hmac
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from yaongi.serve.engine import Engine, QueueFullError, Said
from yaongi.serve.replies import Replies, error_json
from yaongi.serve.requests import BadRequestError, Call, Served, read_chat, read_completion
from yaongi.serve.rows import Piece, Row, joined

LONGEST_BODY = 1_000_000  # bytes
RETRY_SECONDS = "1"
NOBODY = 499  # the status for a client that has hung up, in the log alone
PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
Read = Callable[[bytes, Served], Call]


@dataclass
class Service:
    """What the routes share: the engine with its thread, and what requests are checked against."""

    engine: Engine
    served: Served
    key: str | None = None  # that every request to /v1 must bear
    local: bool = True  # whether only names of this machine may be asked for, so that no web page elsewhere can
    failed: Callable[[BaseException], None] = lambda error: None  # called on the server's thread
    _loop: asyncio.AbstractEventLoop | None = field(default=None, init=False)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Run the engine while the application is up."""
        self._loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._run, name="engine", daemon=True)
        thread.start()
        yield
        self.engine.stop()
        await asyncio.to_thread(thread.join)

    def _run(self) -> None:
        """Run the engine, on its own thread; pieces go to their listeners on the server's."""
        try:
            self.engine.run(lambda said: self._call(_hand_out, said))
        except BaseException as error:
            self._call(self.failed, error)

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        """Call a function on the server's thread; once that has ended nobody listens."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, argument)


def make_app(service: Service) -> Starlette:
    """Return the application."""
    served, page = service.served, PAGE.read_text(encoding="utf-8")

    async def chat(request: HttpRequest) -> Response:
        return await _answer(request, service, read_chat)

    async def complete(request: HttpRequest) -> Response:
        return await _answer(request, service, read_completion)

    async def models(_: HttpRequest) -> Response:
        model = {"id": served.name, "object": "model", "owned_by": "yaongi", "max_model_len": served.capacity}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(_: HttpRequest) -> Response:
        running, waiting = service.engine.load()
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def show_page(_: HttpRequest) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/", show_page),
        ],
        middleware=[Middleware(_Gate, service=service)],
        exception_handlers={
            HTTPException: _refused,
            BadRequestError: _bad_request,
            QueueFullError: _full,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
        lifespan=service.lifespan,
    )


class _Gate:
    """Refuses requests for another machine's name, and those to /v1 without the key."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, service = Headers(scope=scope), self._service
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if service.local and name not in LOCAL_NAMES:
            wanted = f"Host must be {', '.join(LOCAL_NAMES)} unless --host is given"
            response = _error(400, f"{wanted}, got {host[:40]!r}")
            return await response(scope, receive, send)
        if service.key is not None and scope["path"].startswith("/v1/"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), service.key.encode()):
                response = _error(401, "Authorization must be Bearer and the key, got another or none")
                response.headers["WWW-Authenticate"] = "Bearer"
                return await response(scope, receive, send)
        return await self._app(scope, receive, send)


async def _answer(request: HttpRequest, service: Service, read: Read) -> Response:
    """Answer a call, whole or as a stream. Its rows leave the batch if the client hangs up."""
    body = await _body(request)
    call = await asyncio.to_thread(read, body, service.served)
    inbox: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def listener(index: int) -> Callable[[Piece], None]:
        return lambda piece: inbox.put_nowait((index, piece))

    decode = service.served.tokenizer.decode
    rows = [Row(asked, decode, listener(index), whole=not call.stream) for index, asked in enumerate(call.requests)]
    service.engine.submit(rows)
    replies = Replies(call, service.served.name, service.served.tokenizer)
    if call.stream:
        return _Events(_events(replies, len(rows), inbox), lambda: service.engine.cancel(rows))
    answers = asyncio.create_task(_whole(len(rows), inbox))
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({answers, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            return Response(status_code=NOBODY)
        found = answers.result()
    finally:
        service.engine.cancel(rows)
        answers.cancel()
        gone.cancel()
    failed = next((answer.error for answer in found if answer.error is not None), None)
    return JSONResponse(replies.whole(found)) if failed is None else _error(500, failed, kind="server_error")


class _Events(StreamingResponse):
    """A stream of events, after which something is done however it ends."""

    def __init__(self, events: AsyncIterator[bytes], after: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._after()


async def _events(replies: Replies, count: int, inbox: asyncio.Queue[tuple[int, Piece]]) -> AsyncIterator[bytes]:
    """Yield the events of `count` answers. What came while the client was slow is one event."""
    left, begun = count, set()
    yield b"".join(event for index in range(count) for event in replies.first(index))
    while left:
        arrived = [await inbox.get()]
        while not inbox.empty():
            arrived.append(inbox.get_nowait())
        pieces: dict[int, list[Piece]] = {}
        for index, piece in arrived:
            pieces.setdefault(index, []).append(piece)
        for index, several in pieces.items():
            piece = joined(several)
            for event in replies.more(index, piece, begins=index not in begun):
                begun.add(index)
                yield event
            left -= piece.finish is not None or piece.error is not None
    yield b"".join(replies.last())


async def _whole(count: int, inbox: asyncio.Queue[tuple[int, Piece]]) -> list[Piece]:
    """Return the answers, of which each comes as one piece."""
    pieces = dict([await inbox.get() for _ in range(count)])
    return [pieces[index] for index in range(count)]


async def _hung_up(request: HttpRequest) -> None:
    """Return once the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: HttpRequest) -> bytes:
    """Return the body. Raises BadRequestError for another type, or one that is too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequestError(f"Content-Type must be application/json, got {kind[:40] or 'none'}", status=415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            raise BadRequestError(f"body must be at most {LONGEST_BODY:,} bytes, got more", status=413)
    return bytes(body)


def _hand_out(said: Said) -> None:
    for row, piece in said:
        row.listener(piece)


def _error(status: int, message: str, field: str | None = None, **options: Any) -> JSONResponse:
    return JSONResponse(error_json(message, field, **options), status)


async def _bad_request(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, BadRequestError)
    response = _error(error.status, str(error), error.field, code=error.code)
    if error.status == 413:
        response.headers["Connection"] = "close"  # what is left of the body is not read
    return response


async def _full(_: HttpRequest, error: Exception) -> Response:
    response = _error(503, "the queue is full: try again later", kind="server_error")
    response.headers["Retry-After"] = RETRY_SECONDS
    return response


async def _gone(_: HttpRequest, error: Exception) -> Response:
    """Answer a client that hung up before its body was read; nobody reads this."""
    return Response(status_code=NOBODY)


async def _failed(_: HttpRequest, error: Exception) -> Response:
    """Answer after a mistake of ours, which the log then shows."""
    return _error(500, "the server has made a mistake", kind="server_error")


async def _refused(request: HttpRequest, error: Exception) -> Response:
    """Answer a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    shown = json.dumps(request.url.path[:40])
    message = {404: f"there is no {shown}", 405: f"{shown} does not take {request.method[:10]}"}
    response = _error(error.status_code, message.get(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response
