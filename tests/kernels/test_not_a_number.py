"""What is not a number reaches every result that depends on it, and no other row; any finite input stays finite."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from op_cases import Case, cases, run
from support import Results, backends, with_backends
from test_strides import backend_of

import yaongi.kernels
from yaongi.kernels import moe_route, use_backend

Tensor = torch.Tensor
NEGATIVE = ("A",)  # arguments that must stay below zero


def floats() -> list[tuple[str, str]]:
    """(op, argument) for every floating-point argument of every op but the router, whose choice has its own tests."""
    found = []
    for op, case in cases().items():
        if op == "moe_route":
            continue
        for name, value in case.arguments.items():
            first = value[0] if isinstance(value, list) else value
            if isinstance(first, Tensor) and first.is_floating_point():
                found.append((op, name))
    return found


def with_one(arguments: dict[str, Any], name: str, change: Any) -> dict[str, Any]:
    """The arguments with one element changed: in the middle of the first row of `name`, or of its first tensor."""
    value = arguments[name]
    tensor = (value[0] if isinstance(value, list) else value).clone()
    place = (0, *(size // 2 for size in tensor.shape[1:])) if tensor.dim() > 1 else (tensor.shape[0] // 2,)
    tensor[place] = change(tensor[place])
    return arguments | {name: [tensor, *value[1:]] if isinstance(value, list) else tensor}


def copied(case: Case, device: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """The case's arguments, rounded to the dtype that its fast kernels take."""
    return replace(case, arguments=case.on("cpu")).on(device, dtype)


def dependent(op: str, case: Case, name: str) -> dict[str, Tensor]:
    """Which elements of the results depend on that one, by changing it in the reference in float64."""
    changes: list[Any] = [lambda v: 0.5 * v, lambda v: 2 * v]
    if name not in NEGATIVE:
        changes += [lambda v: -v, lambda v: v + 3, lambda v: v - 3]
    with use_backend("reference"):
        base = run(op, copied(case, "cpu", torch.float64), case.wanted)
        others = [run(op, with_one(copied(case, "cpu", torch.float64), name, f), case.wanted) for f in changes]
    return {n: torch.stack([other[n] != base[n] for other in others]).any(0) for n in base}


def rows_of(results: Results, case: Case) -> Results:
    """The results that have the rows of the arguments: outputs, written states, and the gradients of such arguments."""
    return {n: t for n, t in results.items() if n.startswith("output") or n.lstrip("d") in case.rows or n in case.rows}


@pytest.mark.parametrize(("op", "name", "backend"), with_backends(floats()))
def test_a_nan_reaches_all_that_depends_on_it(op: str, name: str, backend: str) -> None:
    case = cases()[op]
    device, dtype = backend_of(backend)
    wanted = dependent(op, case, name)
    with use_backend("reference" if backend == "reference" else None):
        clean = run(op, copied(case, device, dtype), case.wanted)
        results = run(op, with_one(copied(case, device, dtype), name, lambda v: torch.nan), case.wanted)
    for key, result in results.items():
        if result.is_floating_point():
            lost = wanted[key].to(device) & result.isfinite()
            assert not lost.any(), f"{key}: {int(lost.sum())} of {int(wanted[key].sum())} values lost the NaN"
    if name in case.rows:
        for key, result in rows_of(results, case).items():
            assert torch.equal(result[1:], clean[key][1:]), f"{key}: another row changed"


def sequences() -> list[tuple[str, str]]:
    """(op, argument) for every floating-point argument that documents divide, and the gradient that comes in."""
    found = []
    for op, case in cases().items():
        ids = case.arguments.get("document_ids")
        if ids is not None:
            names = [n for n in case.rows if n != "document_ids" and case.arguments[n].shape[:2] == ids.shape]
            found += [(op, name) for name in (*names, "incoming gradient")]
    return found


def by_token_shape(op: str, case: Case) -> torch.Size:
    """The output's shape: that of x, or (B, L, H·P)."""
    ids = case.arguments["document_ids"]
    return case.arguments["x"].shape if "x" in case.arguments else (*ids.shape, case.arguments["weight"].shape[0])


def by_token(op: str, arguments: dict[str, Any], names: list[str], dy: Tensor) -> Results:
    """The output and the gradients of some arguments, which all have (row, token) as their first dimensions."""
    inputs = [arguments[name].requires_grad_() for name in names]
    output = getattr(yaongi.kernels, op)(**arguments)
    y = output[0] if isinstance(output, tuple) else output
    gradients = torch.autograd.grad(y, inputs, dy)
    return {"output": y.detach()} | {f"d{n}": t for n, t in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token", ["the first document's last token", "the last document's first token"])
@pytest.mark.parametrize(("op", "name", "backend"), with_backends(sequences()))
def test_a_nan_stays_in_its_document(op: str, name: str, token: str, value: float, backend: str) -> None:
    case = cases()[op]
    device, dtype = backend_of(backend)
    ids = case.arguments["document_ids"]
    names = [n for n in case.wanted if case.arguments[n].shape[:2] == ids.shape]
    first, last = int((ids[0] == ids[0, 0]).sum()) - 1, int((ids[0] != ids[0, -1]).sum())
    broken = first if "first document" in token else last
    others = (ids != ids[0, broken]).to(device)
    others[1:] = True
    dy = torch.randn(by_token_shape(op, case), generator=torch.manual_seed(0)).to(device, dtype or case.dtype)
    results = []
    for v in (None, value):
        arguments, incoming = case.on(device, dtype), dy.clone()
        if v is not None:
            target = incoming if name == "incoming gradient" else arguments[name]
            target[0, broken].view(-1)[3 % target[0, broken].numel()] = v
        with use_backend("reference" if backend == "reference" else None):
            results.append(by_token(op, arguments, names, incoming))
    clean, changed = results
    of_document = [t[~others] for t in changed.values()]
    assert not all(t.isfinite().all() for t in of_document) or (name == "dt" and value < 0), "the value is lost"
    for key, wanted in clean.items():
        torch.testing.assert_close(changed[key][others], wanted[others], msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["one logit", "all logits", "one bias", "all but two biases"])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 3), (6, 6), (48, 4)])
def test_experts_are_always_different_ones(experts: int, top_k: int, where: str, value: float, backend: str) -> None:
    """Whatever the logits and the bias: the backward pass reads and writes by these ids."""
    device = "cpu" if backend == "reference" else "cuda"
    logits, bias = torch.randn(64, experts, device=device), torch.randn(experts, device=device)
    part = {"one logit": logits[3, 2:3], "all logits": logits, "one bias": bias[1:2], "all but two biases": bias[2:]}
    part[where].fill_(value)
    with use_backend(backend, op="moe_route"):  # type: ignore[arg-type]
        ids, weights, load = moe_route(logits.requires_grad_(), bias, top_k, 2.5)
        (dlogits,) = torch.autograd.grad(weights.sum(), logits)
    assert ids.min() >= 0
    assert ids.max() < experts
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert load.sum() == ids.numel()
    if "logit" not in where:
        assert weights.isfinite().all()
        assert dlogits.isfinite().all()
    elif value != value:
        assert weights[3].isnan().all()


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("logit", [-1e4, -300.0, -88.0, -60.0, -47.0, -20.0, 0.0, 47.0, 1e4])
def test_weights_sum_to_the_scale(logit: float, backend: str) -> None:
    device = "cpu" if backend == "reference" else "cuda"
    logits = (logit + torch.rand(32, 8, device=device)).requires_grad_()
    with use_backend(backend, op="moe_route"):  # type: ignore[arg-type]
        _, weights, _ = moe_route(logits, torch.zeros(8, device=device), 3, 2.5)
        (dlogits,) = torch.autograd.grad(weights.square().sum(), logits)
    torch.testing.assert_close(weights.sum(1), torch.full((32,), 2.5, device=device), rtol=2e-6, atol=0)
    assert dlogits.isfinite().all()
