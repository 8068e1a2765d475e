"""What holds for every op however it is called: autocast, other GPUs, writes that autograd sees, documents apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import IN_PLACE, cases, run
from support import Results, tensors_in, with_backends
from test_strides import backend_of

import yaongi.kernels
from yaongi.kernels import mamba_core, moe, use_backend
from yaongi.kernels.backend import OPS

Tensor = torch.Tensor


def chosen(backend: str) -> use_backend:
    """The reference, or what an op takes by itself."""
    return use_backend("reference" if backend == "reference" else None)


@pytest.mark.parametrize(("op", "backend"), with_backends((op,) for op in cases()))
def test_autocast_changes_nothing(op: str, backend: str) -> None:
    """An op's float32 parts stay float32 under autocast."""
    case, (device, _) = cases()[op], backend_of(backend)
    dtype = torch.float32 if backend == "reference" else None
    with chosen(backend):
        expected = run(op, case.on(device, dtype), case.wanted)
        with torch.autocast(device, torch.bfloat16):
            results = run(op, case.on(device, dtype), case.wanted)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize(("op", "backend"), with_backends((op,) for op in IN_PLACE))
def test_autograd_sees_what_is_written(op: str, backend: str) -> None:
    """A tensor that was saved for a backward pass and then written makes that pass an error."""
    case = cases()[op]
    device, dtype = backend_of(backend)
    arguments = case.on(device, dtype)
    written = [t for name in IN_PLACE[op] for t in tensors_in(arguments[name])]
    before = [t._version for t in written]
    with chosen(backend), torch.no_grad():
        getattr(yaongi.kernels, op)(**arguments)
    assert all(t._version > old for t, old in zip(written, before, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", cases())
def test_two_gpus_give_the_same_bits(op: str) -> None:
    """An op runs where its tensors are, whichever GPU is the current one."""
    case = cases()[op]
    assert torch.cuda.current_device() == 0
    first, second = (run(op, case.on(device), case.wanted) for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    for name, result in second.items():
        assert result.device.index == 1, name
        assert torch.equal(result.cpu(), first[name].cpu()), name


@pytest.mark.gpu
@pytest.mark.memcheck
@pytest.mark.parametrize("op", cases())
def test_small_cases_stay_inside_their_tensors(op: str) -> None:
    """Run both directions on the last GPU; memcheck sees every overrun with PYTORCH_NO_CUDA_MEMORY_CACHING=1."""
    case = cases()[op]
    results = run(op, case.on(f"cuda:{torch.cuda.device_count() - 1}"), case.wanted)
    assert all(t.isfinite().all() for t in results.values())


def with_documents() -> list[str]:
    return [op for op, case in cases().items() if "document_ids" in case.arguments]


def of_the_last_document(op: str, backend: str, change: Callable[[Tensor], Tensor]) -> tuple[Results, Results, Tensor]:
    """The last document's outputs, the gradients of their sum, and which tokens are of another document.

    `change` is applied to the floats of the other documents' tokens.
    """
    case = cases()[op]
    device, dtype = backend_of(backend)
    arguments = case.on(device, dtype)
    ids = arguments["document_ids"]
    others = ids != ids[:, -1:]
    sequences = [n for n in case.rows if n in case.wanted and arguments[n].shape[:2] == ids.shape]
    for name in sequences:
        arguments[name] = arguments[name].clone()
        arguments[name][others] = change(arguments[name][others])
    inputs = [arguments[name].requires_grad_() for name in sequences]
    with chosen(backend):
        outputs = getattr(yaongi.kernels, op)(**arguments)
        y = outputs[0] if isinstance(outputs, tuple) else outputs
        gradients = torch.autograd.grad(y[~others].float().sin().sum(), inputs)
    return {"y": y[~others].detach()}, dict(zip(sequences, gradients, strict=True)), others


@pytest.mark.parametrize(("op", "backend"), with_backends((op,) for op in with_documents()))
def test_documents_are_apart(op: str, backend: str) -> None:
    """A document's outputs change with the others before it by no more than a rounding; their gradients are zero."""
    outputs, gradients, others = of_the_last_document(op, backend, lambda t: t)
    changed, _, _ = of_the_last_document(op, backend, lambda t: 3 * t + 1)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if outputs["y"].dtype == torch.float64 else {"rtol": 0.016, "atol": 0.02}
    torch.testing.assert_close(outputs["y"], changed["y"], **tolerance)
    for name, gradient in gradients.items():
        assert not gradient[others].any(), f"d{name}: {gradient[others].abs().max()}"
        assert gradient[~others].any(), f"d{name}"


def experts(**changes: Any) -> dict[str, Any]:
    """Arguments of `moe` in float32 that require gradients."""
    arguments = cases()["moe"].on("cpu", torch.float32)
    floats = {n: t.requires_grad_() for n, t in arguments.items() if t.is_floating_point()}
    return arguments | floats | changes


def test_a_second_derivative_past_autograd_is_refused() -> None:
    """The weights' gradients don't go through autograd, so a second derivative would be incomplete."""
    arguments = experts()
    sums = tuple(torch.zeros_like(arguments[name]) for name in ("w_up", "w_down"))
    y = moe(**arguments, weight_gradients=sums)
    (dx,) = torch.autograd.grad(y.square().sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


class _NoGradient(torch.autograd.Function):
    """Passes a tensor on; no gradient comes back."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, other: Tensor) -> Tensor:
        return t + other

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def test_no_gradient_of_the_output_is_none_of_the_inputs() -> None:
    case = cases()["mamba_core"]
    arguments = case.on("cpu", torch.float32)
    projected = arguments["projected"].requires_grad_()
    other = torch.zeros(2, 90, 64, requires_grad=True)
    _NoGradient.apply(mamba_core(**arguments), other).sum().backward()
    assert other.grad is not None
    assert projected.grad is None


def test_a_choice_holds_for_the_backward_pass_too() -> None:
    with use_backend("reference", op="moe"):
        for name in ("moe", "moe_backward", "moe_backward_accumulate"):
            assert OPS[name]._forced_backend() == "reference"
        assert OPS["moe_route"]._forced_backend() is None


def test_a_backend_that_an_op_does_not_have_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^use_backend: backend must be reference or triton for op='moe', got 'cuda'$"
    ):
        use_backend("cuda", op="moe")
    with pytest.raises(ValueError, match=r"^use_backend: op must be one of .*, got 'moe_backward'$"):
        use_backend("reference", op="moe_backward")


@pytest.mark.parametrize("size", [1e12, 1e30])
def test_a_huge_step_forgets_only_what_was_before(size: float) -> None:
    """The reference's decays after it are those of the sequence that begins there, in another document too."""
    case = cases()["mamba_scan"]
    arguments = case.on("cpu", torch.float64) | {"initial_state": None}
    for ids in (None, arguments["document_ids"]):
        whole = arguments | {"document_ids": ids}
        whole["dt"] = whole["dt"].clone()
        whole["dt"][:, 20] = size
        tail = {n: v[:, 21:] if n in ("x", "dt", "b", "c") else v for n, v in whole.items()}
        tail |= {"document_ids": None if ids is None else ids[:, 21:]}
        y, _ = yaongi.kernels.mamba_scan(**whole)
        after, _ = yaongi.kernels.mamba_scan(**tail)
        same = torch.zeros_like(after) if ids is not None else after
        late = slice(None) if ids is None else ids[:, 21:] != ids[:, 20:21]  # tokens that the step's own state misses
        if ids is not None:
            torch.testing.assert_close(y[:, 21:][late], after[late], rtol=1e-9, atol=1e-12)
        else:  # the step leaves the state δ·x ⊗ b behind, which decays as usual
            change = y[:, 21:] - same
            b, c, A = whole["b"], whole["c"], whole["A"]
            delta = torch.nn.functional.softplus(whole["dt"] + whole["dt_bias"])
            heads = whole["x"].shape[2] // b.shape[2]
            b, c = (t.repeat_interleave(heads, 2) for t in (b, c))
            decay = (delta[:, 21:] * A).cumsum(1).exp()
            scores = (c[:, 21:] * b[:, 20:21]).sum(-1) * delta[:, 20:21] * decay
            expected = scores.unsqueeze(-1) * whole["x"][:, 20:21]
            torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
