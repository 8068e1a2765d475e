"""The program around the application: the plan of what memory holds, the socket, and a stop that lets answers end."""

import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from yaongi.data.pieces import END_OF_TURN
from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi
from yaongi.model.count import cache_bytes
from yaongi.model.devices import device_of
from yaongi.model.generation import even_capacity
from yaongi.pretrained import load_pretrained
from yaongi.serve.app import Service, make_app
from yaongi.serve.engine import Engine, Limits
from yaongi.serve.requests import Served

GPU_SLOTS, CPU_SLOTS = 64, 8
GPU_CHUNK, CPU_CHUNK = 4096, 512  # 4,096 hold up the running answers for 27 ms: an H200, yaongi-4b


@dataclass(frozen=True)
class Options:
    """How to serve; `python -m yaongi.serve --help` says what each means."""

    host: str
    port: int
    name: str | None
    slots: int
    max_sequence_length: int
    chunk: int
    queue: int
    grace: int
    device: str
    cuda_graph: bool

    def __post_init__(self) -> None:
        """Check the numbers. Raises ValueError."""
        for name in ("slots", "max_sequence_length", "chunk", "queue", "grace"):
            if getattr(self, name) < 0:
                raise ValueError(f"serve: {name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"serve: port must be 0 to {2**16 - 1}, got {self.port}")


def serve(folder: Path, options: Options, key: str | None) -> int:
    """Serve a model until a signal; return the program's status.

    Args:
        key: that every request must bear.

    Raises:
        ValueError: an option doesn't fit the model or this machine.
        OSError: the folder can't be read.
        MemoryError: there is too little.
    """
    device = device_of(options.device, "serve")
    listening = listen(options.host, options.port)
    with listening:
        model, tokenizer = load_pretrained(folder, device, "serve")
        limits = _limits(options, model)
        print(_plan(model, limits), flush=True)
        name = options.name or folder.resolve().name
        service = make_service(model, tokenizer, name, limits, key=key, cuda_graph=options.cuda_graph)
        _warm_up(service.engine, limits)
        service.local = options.host in ("127.0.0.1", "localhost", "::1")
        config = uvicorn.Config(
            make_app(service), log_level="warning", timeout_graceful_shutdown=options.grace, lifespan="on", ws="none"
        )
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
        server = _Server(config, f"{name} is served at {_url(options.host, listening)}")
        service.failed = server.fail
        server.run(sockets=[listening])
    if server.failure is not None:
        raise ValueError(f"serve: the engine has failed: {server.failure}") from server.failure
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, whose connections send small packets at once.

    asyncio asks for that itself only where a socket names its protocol, which these don't; without it an answer's body
    waits 40 ms for the client's delayed acknowledgement of its header.

    Raises:
        ValueError: there is none to be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"serve: host and port must be free, got {host} and {port}: {error.strerror}") from None
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    return listening


def make_service(
    model: Yaongi,
    tokenizer: Tokenizer,
    name: str,
    limits: Limits,
    *,
    key: str | None = None,
    cuda_graph: bool = True,
) -> Service:
    """Return the service of a model; an answer ends with the model's own ends, or with the end of a chat's turn."""
    ends = [*model.config.answer_ends, tokenizer.piece_to_id(END_OF_TURN)]
    on_gpu = next(model.parameters()).is_cuda
    engine = Engine(model, ends, limits, cuda_graph=cuda_graph, runs_ahead=on_gpu)
    return Service(engine, Served(name, tokenizer, limits.capacity), key)


class _Server(uvicorn.Server):
    """A server that says when it is up, and ends with status 0 after a signal."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready
        self.failure: BaseException | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        print(self._ready, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let running answers end; at a second signal, end at once. Unlike uvicorn's, don't raise the signal again."""
        self.force_exit = self.should_exit
        self.should_exit = True

    def fail(self, error: BaseException) -> None:
        """End because the engine has."""
        self.failure, self.should_exit = error, True


def _url(host: str, listening: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


def _limits(options: Options, model: Yaongi) -> Limits:
    """Return the limits for a model. Raises ValueError if they are beyond the model's, or a GPU's memory."""
    own = model.config.max_sequence_length
    capacity = options.max_sequence_length or own
    if not 2 <= capacity <= own:
        raise ValueError(f"serve: max_sequence_length must be 2 to {own}, the model's, got {capacity}")
    on_gpu = next(model.parameters()).is_cuda
    slots, chunk = (GPU_SLOTS, GPU_CHUNK) if on_gpu else (CPU_SLOTS, CPU_CHUNK)
    limits = Limits(options.slots or slots, capacity, options.chunk or chunk, options.queue)
    if on_gpu:
        free, needed = torch.cuda.mem_get_info()[0], _cache_bytes(model, limits)
        if needed > free:
            wanted = f"caches must fit into {free / 1e9:.1f} GB of free memory"
            raise ValueError(
                f"serve: {wanted}, got {needed / 1e9:.1f} GB: fewer --slots, or a smaller --max-sequence-length"
            )
    return limits


def _warm_up(engine: Engine, limits: Limits) -> None:
    """Record what can be, and say so. Raises MemoryError if there is too little memory to read a piece of a prompt."""
    began = time.monotonic()
    try:
        lengths = engine.warm_up()
    except torch.OutOfMemoryError as error:
        wanted = f"memory must have room to read {limits.chunk:,} tokens at a time beside weights and caches"
        raise MemoryError(f"serve: {wanted}, got too little: a smaller --chunk, or fewer --slots") from error
    if lengths:
        seconds = time.monotonic() - began
        print(f"recorded as CUDA graphs in {seconds:.1f} s: prompts of up to {lengths[-1]:,} tokens", flush=True)


def _cache_bytes(model: Yaongi, limits: Limits) -> int:
    capacity = even_capacity(limits.capacity)
    return cache_bytes(model.config, limits.slots, capacity, model.lm_head.weight.dtype.itemsize)


def _plan(model: Yaongi, limits: Limits) -> str:
    """Return a line on what memory holds."""
    weights = [*model.parameters(), *model.buffers()]
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    parameters = f"{sum(p.numel() for p in model.parameters()):,} parameters in {dtype}, {_megabytes(weights)} MB"
    caches = f"{limits.slots} slots of {limits.capacity:,} tokens, {_cache_bytes(model, limits) / 1e6:,.1f} MB"
    return f"{parameters}; {caches}"


def _megabytes(tensors: Sequence[torch.Tensor]) -> str:
    return f"{sum(tensor.nbytes for tensor in tensors) / 1e6:,.1f}"
