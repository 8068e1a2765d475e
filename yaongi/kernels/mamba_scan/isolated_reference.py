"""What is not finite stays in its document, for the references: isolation.py says how the kernels do it.

The mathematics would multiply other documents' tokens by a decay of zero, and 0 · NaN is NaN. So a document with a
value that is not finite is computed with zeros in its place, and all its results are then NaN.
"""

import functools
from collections.abc import Callable

import torch

Tensor = torch.Tensor


def isolated(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make a forward pass keep documents apart; c needs no care, because a token's c is in its own output alone."""

    @functools.wraps(scan)
    def forward(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        b: Tensor,
        c: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        document_ids: Tensor | None,
        initial_state: Tensor | None,
        *options: object,
    ) -> tuple[Tensor, Tensor]:
        if document_ids is None or _all_finite(x, dt, b, initial_state):
            return scan(x, dt, A, b, c, D, dt_bias, document_ids, initial_state, *options)
        lost = _lost_tokens(document_ids, x, _step(dt), b, first=initial_state)
        x, dt, b = _finite(x), dt.nan_to_num(0.0, 0.0, -torch.inf), _finite(b)
        initial_state = None if initial_state is None else _finite(initial_state)
        y, final = scan(x, dt, A, b, c, D, dt_bias, document_ids, initial_state, *options)
        return _marked(y, lost), _marked(final, lost[:, -1])

    return forward


def isolated_backward(scan_backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Make a backward pass keep documents apart; the parameters' gradients belong to all documents."""

    @functools.wraps(scan_backward)
    def backward(
        dy: Tensor,
        dfinal_state: Tensor | None,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        b: Tensor,
        c: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        document_ids: Tensor | None,
        initial_state: Tensor | None,
        *options: object,
    ) -> tuple[Tensor, ...]:
        if document_ids is None or _all_finite(x, dt, b, c, dy, initial_state, dfinal_state):
            return scan_backward(dy, dfinal_state, x, dt, A, b, c, D, dt_bias, document_ids, initial_state, *options)
        tokens = (x, _step(dt), b, c, dy)
        lost = _lost_tokens(document_ids, *tokens, first=initial_state, last=dfinal_state)
        dy, x, b, c = map(_finite, (dy, x, b, c))
        dt = dt.nan_to_num(0.0, 0.0, -torch.inf)
        dfinal_state = None if dfinal_state is None else _finite(dfinal_state)
        initial_state = None if initial_state is None else _finite(initial_state)
        dx, ddt, dA, db, dc, dD, ddt_bias, dinitial = scan_backward(
            dy, dfinal_state, x, dt, A, b, c, D, dt_bias, document_ids, initial_state, *options
        )
        lost_group = lost.unflatten(2, (b.shape[2], -1)).any(3)
        lost_head = lost.flatten(0, 1).any(0)
        return (
            _marked(dx, lost),
            _marked(ddt, lost),
            _marked(dA, lost_head),
            _marked(db, lost_group),
            _marked(dc, lost_group),
            _marked(dD, lost_head),
            _marked(ddt_bias, lost_head),
            _marked(dinitial, lost[:, 0]),
        )

    return backward


def _all_finite(*tensors: Tensor | None) -> bool:
    """Return whether it is known that nothing has to be kept apart.

    A sum is quick, and is not finite if one of its terms isn't. For a GPU's the host would wait, so there it isn't
    known; nor is it on the meta device.
    """
    return all(t is None or (t.is_cpu and bool(t.sum(dtype=torch.float64).isfinite())) for t in tensors)


def _lost_tokens(
    document_ids: Tensor, x: Tensor, *others: Tensor, first: Tensor | None, last: Tensor | None = None
) -> Tensor:
    """Return for tokens and heads (B, L, H) whether their document holds a value that is not finite.

    The tensors are (B, L, heads or groups, …). The states before the first and after the last token are of the first
    and the last document.
    """
    broken = ~x.isfinite().all(-1)  # (B, L, H)
    for t in others:
        broken |= ~t.isfinite().all(-1).repeat_interleave(x.shape[2] // t.shape[2], dim=2)
    for state, token in ((first, 0), (last, -1)):
        if state is not None:
            broken[:, token] |= ~state.isfinite().flatten(2).all(2)
    changes = document_ids.diff(dim=1, prepend=document_ids[:, :1]) != 0
    document = changes.cumsum(1).unsqueeze(-1).expand_as(broken)  # counted from 0 in each row
    of_documents = torch.zeros_like(document).scatter_reduce_(1, document, broken.long(), "amax")
    return of_documents.gather(1, document) > 0


def _step(dt: Tensor) -> Tensor:
    """Return what is finite where the step size is: dt of −∞ is a step of 0."""
    return dt.clamp(min=0).unsqueeze(-1)


def _finite(t: Tensor) -> Tensor:
    return t.nan_to_num(0.0, 0.0, 0.0)


def _marked(result: Tensor, lost: Tensor) -> Tensor:
    """Return a result with NaN where its leading dimensions are lost; an absent one, which is empty, as it is."""
    if not result.numel():
        return result
    return result.masked_fill(lost.reshape(*lost.shape, *(1,) * (result.dim() - lost.dim())), torch.nan)
