"""Helpers of the ops' tests: backends as a parameter, the tolerance rule for a whole call, and refused calls."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import assert_close

import yaongi.kernels
from yaongi.kernels import use_backend
from yaongi.kernels.backend import OPS

Results = dict[str, torch.Tensor]
# For opcheck of ops that take 8-bit floats: its test of the schema does arithmetic with the arguments.
WITHOUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def with_backends(places: Iterable[tuple[str, ...]]) -> list[Any]:
    """Extend tuples that begin with an op by each backend: the reference, and the fast ones where it has any."""
    found: list[Any] = []
    for place in places:
        found.append((*place, "reference"))
        if set(OPS[place[0]].implementations) != {"reference"}:
            found.append(pytest.param(*place, "fast", marks=pytest.mark.gpu))
    return found


def backends(*on_gpu: str) -> list[Any]:
    """Return the values of a `backend` parameter: the reference on the CPU, and the named ones on a GPU."""
    return ["reference", *(pytest.param(name, marks=pytest.mark.gpu) for name in on_gpu)]


def device_of(backend: str, op: str) -> str:
    """Return the device on which a backend of an op is tested."""
    assert backend in OPS[op].implementations, f"{op} has no {backend} implementation: don't list it"
    return "cpu" if backend == "reference" else "cuda"


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def converted(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the same nested value with every floating-point tensor changed and its strides kept."""
    if isinstance(value, torch.Tensor):
        return with_strides(change(value.detach()), value.stride()) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: converted(item, change) for key, item in value.items()}
    return type(value)(converted(item, change) for item in value) if isinstance(value, (list, tuple)) else value


def widened(results: Results) -> Results:
    """Return results with 8-bit floats as float16, which holds them exactly: torch compares and tests that."""
    return {name: t.half() if t.dtype.itemsize == 1 and t.is_floating_point() else t for name, t in results.items()}


def with_strides(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Return the same values laid out with these strides, for example those of a slice of a wider tensor."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def assert_rule(run: Callable[[Any], Results], arguments: Any, backend: str) -> None:
    """Assert the tolerance rule for every result, and that a second run gives the same bits."""
    with use_backend("reference"):
        exact, plain = run(converted(arguments, torch.Tensor.double)), run(converted(arguments, torch.clone))
    with use_backend(backend):
        first, second = run(converted(arguments, torch.clone)), run(converted(arguments, torch.clone))
    for name, result in first.items():
        assert_close(result, exact[name], plain[name], name)
        assert torch.equal(result, second[name]), f"{name}: other bits in a second run"


def document_ids(batch: int, lengths: tuple[int, ...]) -> torch.Tensor:
    """Return ids (B, L): documents of these lengths, in reversed order in every second row."""
    rows = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in (lengths, lengths[::-1])]
    return torch.stack([rows[i % 2] + 3 * i for i in range(batch)]).int()


def outputs_and_gradients(function: Callable[..., Any], arguments: dict[str, Any], wanted: Iterable[str]) -> Results:
    """Return the outputs of a call, and the gradients of Σ output·cos(0, 1, 2, …) for the wanted arguments."""
    wanted = list(wanted)
    arguments = {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    inputs = [arguments[name].requires_grad_() for name in wanted]
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if wanted:
        floats = [o for o in outputs if o.is_floating_point()]
        waves = [torch.arange(o.numel(), dtype=torch.float64).cos().view(o.shape).to(o) for o in floats]
        gradients = torch.autograd.grad(floats, inputs, waves)
        results |= {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return results


@dataclass(frozen=True)
class Bad:
    """A bad call: the arguments that differ from a good one, and the error it must raise."""

    changes: dict[str, Any]
    error: type[Exception]
    message: str


def bad_calls(cases: Iterable[tuple[dict[str, Any], type[Exception], str]]) -> Any:
    """Parametrize a test over bad calls, with ids of a number and the changed arguments."""
    calls = [Bad(*case) for case in cases]
    return pytest.mark.parametrize(
        "bad", [pytest.param(bad, id=f"{i}-{'-'.join(bad.changes)}") for i, bad in enumerate(calls)]
    )


def assert_refused(function: Callable[..., Any], good: dict[str, Any], bad: Bad) -> None:
    """Assert that the bad call raises its one-line message, which starts with the op, and changes no tensor."""
    arguments = good | bad.changes
    tensors = [t for t in tensors_in(arguments) if not t.is_meta]
    before = [t.detach().clone() for t in tensors]
    with pytest.raises(bad.error) as caught:
        function(**arguments)
    assert type(caught.value) is bad.error
    assert str(caught.value) == f"{function.__name__}: {bad.message}"
    for tensor, old in zip(tensors, before, strict=True):
        now, then = (widened({"": t.detach()})[""].nan_to_num(9) for t in (tensor, old))
        assert torch.equal(now, then)


@contextlib.contextmanager
def checked_mode() -> Iterator[None]:
    """Turn checked mode on within the block."""
    yaongi.kernels.check_values(True)
    try:
        yield
    finally:
        yaongi.kernels.check_values(False)
