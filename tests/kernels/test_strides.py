"""Every op with every tensor argument, and every incoming gradient, in every layout: the contiguous call's result.

A call may also be refused, in one line. On a GPU the results are equal to the bit.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import IN_PLACE, PUBLIC, UNCASED, Case, cases
from support import Results, tensors_in, widened, with_backends

import yaongi.kernels
from yaongi.kernels import use_backend

Tensor = torch.Tensor
Layout = Callable[[Tensor], Tensor | None]  # a tensor of the same shape in another layout; None where there is none


def transposed(t: Tensor) -> Tensor | None:
    """The last two dimensions swapped in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else None


def swapped(t: Tensor) -> Tensor | None:
    """The first two dimensions swapped in memory, the last one contiguous."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else None


def every_second_row(t: Tensor) -> Tensor | None:
    wide = t.new_empty(2 * t.shape[0], *t.shape[1:])
    wide[::2] = t
    return wide[::2]


def every_second_column(t: Tensor) -> Tensor | None:
    wide = t.new_empty(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def columns_of_a_wider_tensor(t: Tensor) -> Tensor | None:
    """Rows that start at multiples of 16 bytes."""
    wide = t.new_empty(*t.shape[:-1], t.shape[-1] + 16)
    wide[..., 16:] = t
    return wide[..., 16:]


def odd_columns(t: Tensor) -> Tensor | None:
    """Rows that start anywhere."""
    wide = t.new_empty(*t.shape[:-1], t.shape[-1] + 5)
    wide[..., 3:-2] = t
    return wide[..., 3:-2]


def one_row_for_all(t: Tensor) -> Tensor | None:
    return t[:1].expand(t.shape)


def one_column_for_all(t: Tensor) -> Tensor | None:
    return t[..., :1].expand(t.shape)


def unaligned(t: Tensor) -> Tensor | None:
    """Contiguous, but the first element is not at a multiple of 16 bytes."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


def odd_unit_strides(t: Tensor) -> Tensor | None:
    """Dimensions of size 1 with a stride of 7, which nobody should read."""
    if 1 not in t.shape:
        return None
    return t.as_strided(t.shape, [7 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)])


def entry_of_a_vector(t: Tensor) -> Tensor | None:
    """A scalar that starts at a multiple of its own size alone."""
    return None if t.dim() else torch.stack([t, t, t])[1]


LAYOUTS: dict[str, Layout] = {
    function.__name__: function
    for function in (
        transposed,
        swapped,
        every_second_row,
        every_second_column,
        columns_of_a_wider_tensor,
        odd_columns,
        one_row_for_all,
        one_column_for_all,
        unaligned,
        odd_unit_strides,
        entry_of_a_vector,
    )
}


def laid_out(value: Any, layout: Layout) -> tuple[Any, Any] | None:
    """An argument in a layout, and a contiguous one of the same values; lists of tensors entry by entry."""
    if isinstance(value, list):
        pairs = [laid_out(t, layout) for t in value]
        return None if None in pairs else tuple(map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]
    other = layout(value) if value.dim() or layout is entry_of_a_vector else None
    return None if other is None else (other, other.clone(memory_format=torch.contiguous_format))


def call(op: str, case: Case, arguments: dict[str, Any], layout: Layout | None = None, gradient: int = -1) -> Results:
    """All that a call returns, writes or gives as a gradient; one incoming gradient may have a layout of its own.

    With a layout its result comes with that of the contiguous gradient of the same values, as `plain …`.
    """
    arguments = {n: t.detach() if isinstance(t, Tensor) else t for n, t in arguments.items()}
    inputs = [arguments[name].requires_grad_() for name in case.wanted]
    outputs = getattr(yaongi.kernels, op)(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,) if outputs is not None else ()
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for name in IN_PLACE.get(op, ()):
        results |= {f"{name} {i}": t.detach() for i, t in enumerate(tensors_in(arguments[name]))}
    floats = [o for o in outputs if o.is_floating_point()]
    if inputs:
        waves = [torch.arange(o.numel(), dtype=torch.float64).cos().view(o.shape).to(o) for o in floats]
        names = [f"d{name}" for name in case.wanted]
        if layout is not None:
            pair = laid_out(waves[gradient], layout)
            if pair is None:
                return {}
            waves[gradient], plain = pair
            others = [*waves[:gradient], plain, *waves[gradient + 1 :]]
            found = torch.autograd.grad(floats, inputs, others, retain_graph=True)
            results |= {f"plain {name}": d for name, d in zip(names, found, strict=True)}
        results |= dict(zip(names, torch.autograd.grad(floats, inputs, waves), strict=True))
    return widened(results)


def assert_equal(results: Results, expected: Results, backend: str) -> None:
    for name, result in results.items():
        if backend == "reference":  # another order of summation in torch's own products
            torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12, msg=name)
        else:
            assert torch.equal(result, expected[name]), name


def places() -> list[tuple[str, str]]:
    """(op, argument) for every tensor argument of every op."""
    found = []
    for op, case in cases().items():
        tensors = [name for name, value in case.arguments.items() if isinstance(value, (Tensor, list))]
        found += [(op, name) for name in (*tensors, *case.scalars)]
    return found


def case_of(op: str, layout: str) -> Case:
    """The op's case; with one row where a layout is about dimensions of size 1."""
    case = cases()[op]
    return case.one_row() if layout == "odd_unit_strides" else case


def backend_of(backend: str) -> tuple[str, torch.dtype | None]:
    """The device of a backend, and the dtype to test it in; None is the dtype that its fast kernels take."""
    return ("cpu", torch.float64) if backend == "reference" else ("cuda", None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "name", "backend"), with_backends(places()))
def test_an_argument_in_any_layout(op: str, name: str, layout: str, backend: str) -> None:
    device, dtype = backend_of(backend)
    case = case_of(op, layout)
    arguments = case.on(device, dtype)
    pair = laid_out(arguments[name], LAYOUTS[layout])
    if pair is None:
        return  # a tensor of this shape has no such layout
    other, plain = pair
    with use_backend("reference" if backend == "reference" else None):
        expected = call(op, case, case.on(device, dtype) | {name: plain})
        before = [t.clone() for t in tensors_in(other)]
        results, refusal = None, ""
        try:
            results = call(op, case, arguments | {name: other})
        except (TypeError, ValueError) as error:
            refusal = str(error)
    if results is None:
        assert refusal.startswith(f"{op}: ")
        assert "\n" not in refusal
        for t, old in zip(tensors_in(other), before, strict=True):
            assert torch.equal(t, old)
        return
    assert_equal(results, expected, backend)
    for key, result in results.items():
        written = key.rpartition(" ")[0] in IN_PLACE.get(op, ())
        assert written or result.is_contiguous(), f"{key}: strides {result.stride()}, as no fake promises"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "backend"), with_backends((op,) for op, case in cases().items() if case.wanted))
def test_an_incoming_gradient_in_any_layout(op: str, layout: str, backend: str) -> None:
    device, dtype = backend_of(backend)
    case = case_of(op, layout)
    with use_backend("reference" if backend == "reference" else None):
        for gradient in range(2):
            try:
                results = call(op, case, case.on(device, dtype), LAYOUTS[layout], gradient)
            except IndexError:  # one output alone
                assert gradient
                continue
            plain = {n.removeprefix("plain "): t for n, t in results.items() if n.startswith("plain ")}
            assert_equal({n: results[n] for n in plain}, plain, backend)


def test_every_op_has_a_case() -> None:
    assert set(cases()) == PUBLIC - UNCASED
