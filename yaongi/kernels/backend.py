"""Which implementation of an op runs: defines ops, knows what this machine can run, and picks.

Every op has a plain torch `reference`, and may have a `triton` and a `cuda` implementation with the same signature.
On a CPU tensor the reference runs; on a GPU tensor the first of cuda, triton, reference that the machine and the
arguments allow. `use_backend` forces one, and then what it can't take is an error, never something else.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch

Tensor = torch.Tensor
Backend = Literal["cuda", "triton", "reference"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)  # in order of preference on a GPU
LIBRARY_FILE = Path(__file__).resolve().parent.parent / "_C.so"
_library = torch.library.Library("yaongi", "DEF")
# By op, None for every op; a plain dict, since the backward pass runs in another thread and would not see a context
# variable.
_forced: dict[str | None, Backend] = {}
PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
PLAIN_ARGUMENTS = PLAIN_TENSORS | {type(None), float, int, bool, str}
_value_checks = False
_transforms, _modes = torch._C._functorch.peek_interpreter_stack, torch._C._len_torch_dispatch_stack


@dataclass
class Op:
    """One op of `torch.ops.yaongi` and its implementations, all with the same signature."""

    name: str
    implementations: dict[Backend, Callable[..., Any] | str]
    refuses: dict[Backend, Callable[..., str | None]]
    value_check: Callable[..., None] | None
    overload: torch._ops.OpOverload
    pure: bool  # changes none of its arguments
    resolved: dict[Backend, Callable[..., Any]] = field(default_factory=dict)
    direct: dict[tuple[object, ...] | None, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        """Call the op: through torch's dispatcher, or past it when nothing there would look at the call.

        The dispatcher and its Python autograd layer cost as much host time as all the rest of a call (docs/LAB.md), so
        a call on plain tensors that asks for no gradient, under no transform or mode, goes straight to a backend.
        """
        if not self.pure or _dispatcher_needed(args):
            return self.overload(*args)
        return self.run_on_gpu(*args) if args[0].is_cuda else self.run_on_cpu(*args)

    def implementation(self, backend: Backend) -> Callable[..., Any]:
        """The function of a backend; a name such as `package.module:function` is imported at its first use."""
        if backend not in self.resolved:
            function = self.implementations[backend]
            if isinstance(function, str):
                module, attribute = function.split(":")
                function = getattr(importlib.import_module(module), attribute)
            self.resolved[backend] = function
        return self.resolved[backend]

    def unavailable(self, backend: Backend) -> str | None:
        """Why this machine can't run the op on a backend, or None when it can."""
        if backend not in self.implementations:
            return "not written"
        return unavailable(backend)

    def run_on_cpu(self, *args: Any) -> Any:
        """Run the reference, the only implementation for CPU tensors."""
        forced = _forced.get(self.name) or _forced.get(None)
        if forced not in (None, "reference"):
            raise RuntimeError(f'{self.name}: use_backend("{forced}") needs tensors on a GPU, got tensors on the CPU')
        return self._run("reference", args)

    def run_on_gpu(self, *args: Any) -> Any:
        """Run the forced implementation, or else the first that takes these arguments."""
        forced = _forced.get(self.name) or _forced.get(None)
        if forced is not None:
            reason = self.unavailable(forced) or self._refusal(forced, args)
            if reason:
                raise RuntimeError(f'{self.name}: use_backend("{forced}") is impossible here: {reason}')
            return self._run(forced, args)
        return self._run(self.pick(args), args)

    def pick(self, args: tuple[Any, ...]) -> Backend:
        """The first backend that takes these arguments on a GPU, when none is forced; the reference takes all."""
        return next(backend for backend, refuses in self.candidates if refuses is None or refuses(*args) is None)

    @functools.cached_property
    def candidates(self) -> list[tuple[Backend, Callable[..., str | None] | None]]:
        """The backends that this machine's GPU can run, in order of preference, each with its `refuses`."""
        return [(backend, self.refuses.get(backend)) for backend in BACKENDS if self.unavailable(backend) is None]

    def _refusal(self, backend: Backend, args: tuple[Any, ...]) -> str | None:
        refuses = self.refuses.get(backend)
        return refuses(*args) if refuses else None

    def _run(self, backend: Backend, args: tuple[Any, ...]) -> Any:
        if _value_checks and self.value_check:
            self.value_check(*args)
        return self.implementation(backend)(*args)


def layout(*tensors: Tensor | None) -> tuple[object, ...] | None:
    """All that decides how a call on these tensors runs; None when it takes a closer look at the call.

    Checks, the questions of torch's dispatcher and the choice of a backend cost more host time than a launch
    (docs/LAB.md). So a CUDA op keeps in `Op.direct` the launcher that a layout led to, and asks no more.
    """
    if _forced or _value_checks or torch.compiler.is_compiling():
        return None
    if _transforms() is not None or _modes():
        return None
    recording = torch.is_grad_enabled()
    found: list[object] = []
    for t in tensors:
        if t is None:
            found.append(None)
        elif type(t) not in PLAIN_TENSORS or (recording and t.requires_grad):
            return None
        else:
            found.append((t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16))
    return tuple(found)


def _dispatcher_needed(args: tuple[Any, ...]) -> bool:
    """Whether torch would look at the call; its tensors, of which the first argument is one, are on one device."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return True
    if _transforms() is not None or _modes():
        return True
    for arg in args:
        if type(arg) not in PLAIN_ARGUMENTS and isinstance(arg, torch.Tensor):
            return True
    return not (args[0].is_cuda or args[0].is_cpu)


OPS: dict[str, Op] = {}


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
    cuda: Callable[..., Any] | str | None = None,
    triton_refuses: Callable[..., str | None] | None = None,
    cuda_refuses: Callable[..., str | None] | None = None,
    value_check: Callable[..., None] | None = None,
) -> Op:
    """Define `torch.ops.yaongi.<name>` from a torch.library schema; call the result to call the op.

    All implementations take the schema's arguments by position. `triton`, and `cuda` where it needs Triton too, is
    `package.module:function`, imported when first picked. A `refuses` function gets the same arguments and returns why
    its backend can't take them, or None.
    `value_check` runs before the op in checked mode (`check_values(True)`) and raises ValueError.
    """
    name = schema.partition("(")[0]
    implementations: dict[Backend, Callable[..., Any] | str] = {"reference": reference}
    refuses: dict[Backend, Callable[..., str | None]] = {}
    if triton:
        implementations["triton"] = triton
        refuses["triton"] = triton_refuses or refuses_float64
    if cuda:
        implementations["cuda"] = cuda
        if cuda_refuses:
            refuses["cuda"] = cuda_refuses
    _library.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    overload = getattr(torch.ops.yaongi, name).default
    op = OPS[name] = Op(name, implementations, refuses, value_check, overload, pure="!" not in schema)
    _library.impl(name, op.run_on_cpu, "CPU")
    _library.impl(name, op.run_on_gpu, "CUDA")
    torch.library.register_fake(f"yaongi::{name}", fake, lib=_library)
    return op


def define_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the autograd formula of an op, as `torch.library.register_autograd`."""
    torch.library.register_autograd(f"yaongi::{name}", backward, setup_context=setup_context, lib=_library)


def define_no_autograd(name: str) -> None:
    """Register that an op has no derivative: differentiating through it is an error, where torch only warns."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name}: there is no derivative of this op")

    define_autograd(name, backward, lambda ctx, inputs, output: None)


def refuses_float64(*args: Any) -> str | None:
    """The `refuses` function of a backend that takes every call but those in float64."""
    if any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float64 for arg in args):
        return "it takes no float64"
    return None


@functools.cache
def unavailable(backend: Backend) -> str | None:
    """Why this machine can't run a backend, in one line, or None when it can."""
    if backend == "reference":
        return None
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    capability = torch.cuda.get_device_capability()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        return None if capability >= (8, 0) else f"needs compute capability 8.0 or newer, got {capability}"
    if capability != (9, 0):
        return f"built for compute capability 9.0 (H100, H200) alone, got {capability[0]}.{capability[1]}"
    return _load_library()


@functools.cache
def cuda_launcher(name: str) -> Callable[..., Any]:
    """A launcher of `_C.so`, once `unavailable("cuda")` is None; below `OpOverload`, whose call is one more frame."""
    return getattr(torch.ops.yaongi_cuda, name).default._op


def _load_library() -> str | None:
    if not LIBRARY_FILE.exists():
        return "yaongi/_C.so is not built: `YAONGI_CUDA=1 pip install -e .` builds it or says why it can't"
    try:
        torch.ops.load_library(str(LIBRARY_FILE))
    except OSError as error:
        return f"yaongi/_C.so does not load: {str(error).splitlines()[0]}"
    return None


class use_backend:
    """Forces a backend, for every op or for one: `use_backend("triton")`, `use_backend("reference", op="moe")`.

    Takes effect at once and for every thread; as a context manager it restores the former choice at its end.
    `use_backend(None)` picks by itself again. Raises ValueError for an unknown name and RuntimeError, saying why, when
    this machine can't run the backend.
    """

    def __init__(self, backend: Backend | None, *, op: str | None = None) -> None:
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"use_backend: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
        if op is not None and op not in OPS:
            raise ValueError(f"use_backend: op must be one of {', '.join(sorted(OPS))}, got {op!r}")
        reason = unavailable(backend) if backend else None
        if reason:
            raise RuntimeError(f'use_backend: "{backend}" can\'t run here: {reason}')
        self._op, self._former = op, _forced.get(op)
        _force(op, backend)

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _force(self._op, self._former)


def _force(op: str | None, backend: Backend | None) -> None:
    if backend is None:
        _forced.pop(op, None)
    else:
        _forced[op] = backend


def check_values(enabled: bool) -> None:
    """Turn checked mode on or off: ops then also refuse bad values, at the cost of a synchronisation per call."""
    global _value_checks
    _value_checks = enabled


@dataclass(frozen=True)
class Availability:
    """Whether this machine can run one op on one backend; `reason` says why not."""

    op: str
    backend: Backend
    reason: str | None


def info() -> list[Availability]:
    """Every op on every backend: what this machine can run, and for what it can't, why."""
    return [Availability(op.name, backend, op.unavailable(backend)) for op in OPS.values() for backend in BACKENDS]
