"""Definition of ops, and the choice of the implementation that runs.

Every op has a plain torch `reference`, and may have a `triton` and a `cuda` implementation with the same signature.
CPU tensors take the reference. GPU tensors take the first of cuda, triton and reference that their GPU and the
arguments allow. `use_backend` forces one of them: a call that it can't take is then an error.

What every implementation may rely on is arranged here, once for all ops: autocast is off, the tensors' GPU is the
current device, and a fast implementation's tensors are addressable (see `addressable`) or have been copied.
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
# The forced backend by op; the key None stands for every op. A plain dict, because the backward pass runs in another
# thread and would not see a context variable.
_forced: dict[str | None, Backend] = {}
PLAIN_ARGUMENTS = frozenset((torch.Tensor, torch.nn.Parameter, type(None), float, int, bool, str))
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
    written: tuple[int, ...]  # positions of the arguments that it modifies
    resolved: dict[Backend, Callable[..., Any]] = field(default_factory=dict)
    candidates: dict[int, list[tuple[Backend, Callable[..., str | None] | None]]] = field(default_factory=dict)
    differentiable: type[torch.autograd.Function] | None = None  # the autograd formula without the dispatcher

    def __call__(self, *args: Any) -> Any:
        """Call the op through torch's dispatcher, or directly where the dispatcher would add nothing.

        The dispatcher and its Python autograd layer cost as much host time as the rest of a call (docs/LAB.md). So a
        call on plain tensors, without transforms or modes, goes straight to its autograd formula, or without gradients
        to an implementation.
        """
        if self.written or _dispatcher_needed(args):
            return self.overload(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self.differentiable.apply(*args) if self.differentiable else self.overload(*args)
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        """Run the op where its tensors are, without autograd."""
        return self.run_on_gpu(*args) if _first_tensor(args).is_cuda else self.run_on_cpu(*args)

    def implementation(self, backend: Backend) -> Callable[..., Any]:
        """Return a backend's function; a name such as `package.module:function` is imported at its first use."""
        if backend not in self.resolved:
            function = self.implementations[backend]
            if isinstance(function, str):
                module, attribute = function.split(":")
                function = getattr(importlib.import_module(module), attribute)
            self.resolved[backend] = function
        return self.resolved[backend]

    @property
    def family(self) -> str:
        """The public op that this op belongs to: itself, or the op whose backward pass it is."""
        return self.name.partition("_backward")[0]

    def unavailable(self, backend: Backend, device: int = 0) -> str | None:
        """Return why a GPU can't run the op on a backend, or None if it can."""
        if backend not in self.implementations:
            return "not written"
        return unavailable(backend, device)

    def run_on_cpu(self, *args: Any) -> Any:
        """Run the reference, the only implementation for CPU tensors."""
        forced = self._forced_backend()
        if forced not in (None, "reference"):
            raise RuntimeError(f'{self.name}: use_backend("{forced}") needs tensors on a GPU, got tensors on the CPU')
        return self._run("reference", args)

    def run_on_gpu(self, *given: Any) -> Any:
        """Run the forced implementation, or the first that takes these arguments."""
        device, forced = _first_tensor(given).get_device(), self._forced_backend()
        args = given if forced == "reference" else tuple(map(_addressable, given))
        if forced is not None:
            reason = self.unavailable(forced, device) or self._refusal(forced, args)
            if reason:
                raise RuntimeError(f'{self.name}: use_backend("{forced}") is impossible here: {reason}')
        backend = forced or self.pick(args, device)
        if device == torch.cuda.current_device():
            results = self._run(backend, args)
        else:
            with torch.cuda.device(device):
                results = self._run(backend, args)
        for i in self.written:
            for target, source in zip(_tensors(given[i]), _tensors(args[i]), strict=True):
                if target is not source:
                    target.copy_(source)
        return results

    def pick(self, args: tuple[Any, ...], device: int = 0) -> Backend:
        """Return the first backend that takes these arguments on a GPU; the reference takes all."""
        if device not in self.candidates:
            usable = [backend for backend in BACKENDS if self.unavailable(backend, device) is None]
            self.candidates[device] = [(backend, self.refuses.get(backend)) for backend in usable]
        return next(
            backend for backend, refuses in self.candidates[device] if refuses is None or refuses(*args) is None
        )

    def _forced_backend(self) -> Backend | None:
        return None if not _forced else _forced.get(self.family) or _forced.get(None)

    def _refusal(self, backend: Backend, args: tuple[Any, ...]) -> str | None:
        refuses = self.refuses.get(backend)
        return refuses(*args) if refuses else None

    def _run(self, backend: Backend, args: tuple[Any, ...]) -> Any:
        device_type = "cuda" if _first_tensor(args).is_cuda else "cpu"
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return self._run(backend, args)
        if _value_checks and self.value_check:
            self.value_check(*args)
        results = self.implementation(backend)(*args)
        if self.written and backend != "reference":  # torch counts its own writes, which the reference makes
            written = [t for i in self.written for t in _tensors(args[i]) if t is not None]
            torch.autograd.graph.increment_version(written)
        return results


def addressable(t: Tensor) -> Tensor:
    """Return a tensor that the fast kernels can read in place: this one, or a contiguous copy.

    They read in place what starts at a multiple of 16 bytes and is contiguous, or has unit stride along the last
    dimension and positive multiples of 16 bytes as its other strides, as TMA needs them. The strides of dimensions of
    size 1 don't count. A scalar may be anywhere: it can be an entry of a vector.
    """
    if not t.dim() or (
        t.data_ptr() % 16 == 0 and (t.is_contiguous() or _tma_can_read(t.shape, t.stride(), t.element_size()))
    ):
        return t
    return t.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=1024)
def _tma_can_read(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> bool:
    *outer, last = zip(shape, strides, strict=True)
    return last[1] == 1 and all(n == 1 or (stride > 0 and stride * size % 16 == 0) for n, stride in outer)


def _addressable(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return addressable(arg)
    return [addressable(t) for t in arg] if isinstance(arg, list) and arg and isinstance(arg[0], torch.Tensor) else arg


def _tensors(arg: Any) -> list[Tensor]:
    return arg if isinstance(arg, list) else [arg]


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    """Return the first tensor of a call; all its tensors are on one device."""
    return args[0] if isinstance(args[0], torch.Tensor) else args[0][0]


def _dispatcher_needed(args: tuple[Any, ...]) -> bool:
    """Return whether a call must go through torch's dispatcher. The first argument is a tensor."""
    if torch.compiler.is_compiling() or _transforms() is not None or _modes():
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
    """Define `torch.ops.yaongi.<name>`; calling the returned object calls the op.

    Args:
        schema: as for `torch.library`; every function below takes its arguments by position.
        reference, fake: the op in plain torch, and its results' shapes on meta tensors.
        triton, cuda: the fast implementations. A string `package.module:function` is imported at its first use.
        triton_refuses, cuda_refuses: return why the backend can't take these arguments, or None.
        value_check: runs before the op in checked mode (`check_values(True)`) and raises ValueError.
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
    arguments = overload._schema.arguments
    written = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
    op = OPS[name] = Op(name, implementations, refuses, value_check, overload, written)
    _library.impl(name, op.run_on_cpu, "CPU")
    _library.impl(name, op.run_on_gpu, "CUDA")
    torch.library.register_fake(f"yaongi::{name}", fake, lib=_library)
    return op


def define_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the autograd formula of an op; arguments as for `torch.library.register_autograd`."""
    torch.library.register_autograd(f"yaongi::{name}", backward, setup_context=setup_context, lib=_library)
    op = OPS[name]

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            results = op.run(*args)
            setup_context(ctx, args, results)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    op.differentiable = Differentiable


def define_no_autograd(name: str) -> None:
    """Make differentiating through an op an error; torch alone would only warn."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name}: there is no derivative of this op")

    define_autograd(name, backward, lambda ctx, inputs, output: None)


def refuses_float64(*args: Any) -> str | None:
    """Refuse calls with float64 tensors: the `refuses` function of a backend with no other limits."""
    if any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float64 for arg in args):
        return "it takes no float64"
    return None


@functools.cache
def unavailable(backend: Backend, device: int = 0) -> str | None:
    """Return why a GPU of this machine can't run a backend, in one line, or None if it can."""
    if backend == "reference":
        return None
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    if torch.version.hip is not None:
        return "the kernels hold PTX, which an AMD GPU can't run"
    capability = torch.cuda.get_device_capability(device)
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        return None if capability >= (8, 0) else f"needs compute capability 8.0 or newer, got {capability}"
    if capability != (9, 0):
        return f"built for compute capability 9.0 (H100, H200) alone, got {capability[0]}.{capability[1]}"
    return _load_library()


@functools.cache
def cuda_launcher(name: str) -> Callable[..., Any]:
    """Return a launcher of `_C.so`, once `unavailable("cuda")` is None; `_op` skips a Python frame of `OpOverload`."""
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

    A public op's name stands for its backward pass too.

    It takes effect immediately and in every thread; as a context manager it restores the previous choice at its end.
    `use_backend(None)` returns to the automatic choice.

    Raises:
        ValueError: unknown name. RuntimeError: this machine can't run the backend; the message says why.
    """

    def __init__(self, backend: Backend | None, *, op: str | None = None) -> None:
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"use_backend: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
        families = {op.family for op in OPS.values()}
        if op is not None and op not in families:
            raise ValueError(f"use_backend: op must be one of {', '.join(sorted(families))}, got {op!r}")
        if backend is not None and op is not None and backend not in OPS[op].implementations:
            written = " or ".join(OPS[op].implementations)
            raise ValueError(f"use_backend: backend must be {written} for op={op!r}, got {backend!r}")
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
    """Turn checked mode on or off: ops then also refuse bad values, which costs a synchronisation per call."""
    global _value_checks
    _value_checks = enabled


@dataclass(frozen=True)
class Availability:
    """Whether this machine can run one op on one backend; `reason` is None if it can."""

    op: str
    backend: Backend
    reason: str | None


def info() -> list[Availability]:
    """Return for every op and backend whether this machine can run it, and if not, why."""
    return [Availability(op.name, backend, op.unavailable(backend)) for op in OPS.values() for backend in BACKENDS]
