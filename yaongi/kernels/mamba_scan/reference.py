"""The Mamba-2 scan in plain torch, chunked and vectorised: see README.md beside this file for the mathematics.

Letters of the einsums: b batch, z chunk, i output and j input position in the chunk, g group, r head of the group,
p head dimension, n state dimension. Where x has 16 bits, the operands of matrix products are rounded to its dtype, as
tensor cores take them (README.md, Precision). Every exponent is a sum of non-positive numbers. Sums and differences of
exponents are in float64, which keeps the small differences of long decays; only their exponentials are rounded.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from yaongi.kernels.common.dtypes import compute_dtype
from yaongi.kernels.mamba_scan.isolated_reference import isolated, isolated_backward

Tensor = torch.Tensor
ZERO_DECAY = -1e4  # exponent of a decay that is zero in float64; sums of larger ones would bury the small exponents


@dataclass(frozen=True)
class _Chunked:
    """The inputs cut into chunks, and the decays that the forward and the backward pass use."""

    x: Tensor  # (B, Z, Q, G, R, P)
    delta: Tensor  # (B, Z, Q, G, R), the step sizes
    u: Tensor  # (B, Z, Q, G, R, P) = delta · x
    b: Tensor  # (B, Z, Q, G, N)
    c: Tensor  # (B, Z, Q, G, N)
    within: Tensor  # (B, Z, G, R, Q, Q), the decay from input j to output i; 0 where j > i or documents differ
    carry_in: Tensor  # (B, Z, Q, G, R), from the chunk's entry to output i
    carry_out: Tensor  # (B, Z, Q, G, R), from input j to the chunk's end
    dtype: torch.dtype  # of the operands of matrix products

    def factor(self, value: Tensor) -> Tensor:
        """Round an operand of a matrix product to `dtype`."""
        return value.to(self.dtype).to(value.dtype)

    @property
    def through(self) -> Tensor:
        """Return the decay over a whole chunk, (B, Z, G, R)."""
        return self.carry_in[:, :, -1]

    def scores(self) -> Tensor:
        """Return c_i · b_j, (B, Z, G, 1, Q, Q)."""
        return torch.einsum("bzign,bzjgn->bzgij", self.c, self.b).unsqueeze(3)

    def entering_states(self, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the state at each chunk's entry (B, Z, G, R, P, N), and the final state (B, G, R, P, N)."""
        kept = self.factor(self.carry_out.unsqueeze(-1) * self.u)
        gained = torch.einsum("bzjgrp,bzjgn->bzgrpn", kept, self.b)
        entering, final = _carry(gained, self.through, initial_state)
        return self.factor(entering), final


@isolated
def mamba_scan_reference(
    x: Tensor,  # (B, L, H, P)
    dt: Tensor,  # (B, L, H)
    A: Tensor,  # (H)
    b: Tensor,  # (B, L, G, N)
    c: Tensor,  # (B, L, G, N)
    D: Tensor | None,  # (H)
    dt_bias: Tensor | None,  # (H)
    document_ids: Tensor | None,  # (B, L)
    initial_state: Tensor | None,  # (B, H, P, N)
    return_final_state: bool,
    chunk: int | None = None,  # tokens of a chunk: any number gives the same result
) -> tuple[Tensor, Tensor]:  # (B, L, H, P), (B, H, P, N) or empty
    """Return y_t = h_t·c_t + D·x_t, with h_t = exp(δ_t·A)·h_{t−1} + δ_t·x_t ⊗ b_t, δ = softplus(dt + dt_bias)."""
    wide = compute_dtype(x, dt, A, b, c, D, dt_bias, initial_state)
    chunk = chunk or _fastest_chunk(x, b)
    parts = _chunked(x, _step_sizes(dt, dt_bias, wide), A.to(wide), b, c, document_ids, chunk)
    entering, final = parts.entering_states(initial_state)
    mixing = parts.factor(parts.scores() * parts.within * parts.delta.movedim(2, -1).unsqueeze(-2))
    y = torch.einsum("bzgrij,bzjgrp->bzigrp", mixing, parts.x)
    y = y + parts.carry_in.unsqueeze(-1) * torch.einsum("bzign,bzgrpn->bzigrp", parts.c, entering)
    y = _joined(y, x)
    if D is not None:
        y = y + D.to(wide).unsqueeze(-1) * x.to(wide)
    return _rounded(y, x), final.flatten(1, 2).contiguous() if return_final_state else final.new_empty(0)


@isolated_backward
def mamba_scan_backward_reference(
    dy: Tensor,  # (B, L, H, P)
    dfinal_state: Tensor | None,  # (B, H, P, N)
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    chunk: int | None = None,  # tokens of a chunk: any number gives the same result
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, dt, A, b, c, D, dt_bias and initial_state; empty for an argument that is None."""
    wide = compute_dtype(x, dt, A, b, c, D, dt_bias, initial_state)
    chunk = chunk or _fastest_chunk(x, b)
    delta = _step_sizes(dt, dt_bias, wide)
    parts = _chunked(x, delta, A.to(wide), b, c, document_ids, chunk)
    dy = dy.to(wide)
    du, dexponent, db, dc, dinitial_state = _chunk_gradients(
        parts, _by_group(_cut(dy, chunk), b.shape[2]), dfinal_state, initial_state
    )
    du, dexponent = _joined(du, x), _joined(dexponent, dt)
    ddelta = A.to(wide) * dexponent + (x.to(wide) * du).sum(-1)
    ddt = ddelta * -torch.expm1(-delta)  # softplus' = 1 − exp(−softplus)
    dx = delta.unsqueeze(-1) * du
    if D is not None:
        dx = dx + D.to(wide).unsqueeze(-1) * dy
    return (
        _rounded(dx, x),
        _rounded(ddt, dt),
        _rounded((delta * dexponent).sum((0, 1)), A),
        _rounded(_joined(db, b), b),
        _rounded(_joined(dc, c), c),
        x.new_empty(0) if D is None else _rounded((dy * x.to(wide)).sum((0, 1, 3)), D),
        x.new_empty(0) if dt_bias is None else _rounded(ddt.sum((0, 1)), dt_bias),
        x.new_empty(0) if initial_state is None else _rounded(dinitial_state.flatten(1, 2), initial_state),
    )


def mamba_step_reference(
    state: Tensor,  # (B, H, P, N), updated in place
    x: Tensor,  # (B, H, P)
    dt: Tensor,  # (B, H)
    A: Tensor,  # (H)
    b: Tensor,  # (B, G, N)
    c: Tensor,  # (B, G, N)
    D: Tensor | None,  # (H)
    dt_bias: Tensor | None,  # (H)
) -> Tensor:  # (B, H, P)
    """Do one step of the recurrence; y is computed from the state before the state is rounded."""
    wide = compute_dtype(state, x, dt, A, b, c, D, dt_bias)
    delta = _step_sizes(dt, dt_bias, wide)  # (B, H)
    heads = x.shape[1] // b.shape[1]
    b, c = (t.to(wide).repeat_interleave(heads, dim=1).unsqueeze(2) for t in (b, c))  # (B, H, 1, N)
    decay = torch.exp(delta * A.to(wide))[..., None, None]
    new = decay * state.to(wide) + (delta.unsqueeze(-1) * x.to(wide)).unsqueeze(-1) * b
    y = (new * c).sum(-1)
    if D is not None:
        y = y + D.to(wide).unsqueeze(-1) * x.to(wide)
    state.copy_(new)
    return _rounded(y, x)


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, wide: torch.dtype) -> Tensor:
    raw = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    return F.softplus(raw, threshold=40.0)  # above 40 softplus is the identity, in float64 too


def _fastest_chunk(x: Tensor, b: Tensor) -> int:
    """Return 64 or 16: a chunk of Q tokens has Q² decays and one state of P·N numbers. Measured on two CPU cores."""
    return 64 if x.shape[3] * b.shape[3] >= 1024 else 16


def _cut(value: Tensor, chunk: int) -> Tensor:
    """Pad (B, L, …) with zeros to full chunks (B, Z, Q, …); a step of size 0 changes no state."""
    padding = (0, 0) * (value.dim() - 2) + (0, -value.shape[1] % chunk)
    return F.pad(value, padding).unflatten(1, (-1, chunk))


def _by_group(value: Tensor, groups: int) -> Tensor:
    """Reshape (B, Z, Q, H, …) to (B, Z, Q, G, R, …): head h reads group h // R."""
    return value.unflatten(3, (groups, -1))


def _joined(value: Tensor, like: Tensor) -> Tensor:
    """Reshape chunks (B, Z, Q, …) to the shape of the uncut tensor, without the padding."""
    return value.flatten(1, 2)[:, : like.shape[1]].reshape(like.shape)


def _rounded(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).contiguous()


def _chunked(
    x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor, document_ids: Tensor | None, chunk: int
) -> _Chunked:
    groups, wide = b.shape[2], delta.dtype
    dtype = x.dtype if x.dtype.itemsize == 2 else wide
    x, delta = (_by_group(_cut(t.to(wide), chunk), groups) for t in (x, delta))
    exponents = (delta.double() * A.double().view(groups, -1)).clamp(min=ZERO_DECAY)  # (B, Z, Q, G, R), ≤ 0
    since_entry = exponents.cumsum(2)
    sums = since_entry.movedim(2, -1)  # (B, Z, G, R, Q)
    within = sums.unsqueeze(-1) - sums.unsqueeze(-2)  # (B, Z, G, R, Q, Q)
    until_end = since_entry[:, :, -1:] - since_entry
    same_document, entered, leaves = _document_masks(document_ids, x)
    return _Chunked(
        x=x,
        delta=delta,
        u=delta.unsqueeze(-1) * x,
        b=_cut(b.to(wide), chunk),
        c=_cut(c.to(wide), chunk),
        within=_decay(within, same_document, wide),
        carry_in=_decay(since_entry, entered, wide),
        carry_out=_decay(until_end, leaves, wide),
        dtype=dtype,
    )


def _decay(exponents: Tensor, connected: Tensor | None, wide: torch.dtype) -> Tensor:
    if connected is not None:
        exponents = exponents.masked_fill(~connected, -torch.inf)
    return exponents.to(wide).exp()


def _document_masks(document_ids: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return three masks: which inputs j reach output i, which outputs the entry reaches, which inputs reach the end.

    The first is (Q, Q) without documents, else (B, Z, 1, 1, Q, Q). The others are None without documents, else
    (B, Z, Q, 1, 1).
    """
    chunks, chunk = x.shape[1:3]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    if document_ids is None:
        return causal, None, None
    padding = document_ids[:, -1:].expand(-1, chunks * chunk - document_ids.shape[1])
    ids = torch.cat([document_ids, padding], dim=1).unflatten(1, (-1, chunk))  # (B, Z, Q)
    same = causal & (ids.unsqueeze(-1) == ids.unsqueeze(-2))
    last = ids[:, :, -1:]
    before = torch.cat([ids[:, :1, :1], last[:, :-1]], dim=1)  # (B, Z, 1); the initial state is of the first document
    return same[:, :, None, None], (ids == before)[..., None, None], (ids == last)[..., None, None]


def _carry(gained: Tensor, through: Tensor, state: Tensor | None, *, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Run state ← through_z · state + gained_z over the chunks; return the state before each chunk, and the last."""
    batch, chunks, *rest = gained.shape
    state = gained.new_zeros(batch, *rest) if state is None else state.to(gained.dtype).reshape(batch, *rest)
    before = [state] * chunks
    for z in reversed(range(chunks)) if backward else range(chunks):
        before[z] = state
        state = through[:, z, ..., None, None] * state + gained[:, z]
    return torch.stack(before, dim=1), state


def _chunk_gradients(
    parts: _Chunked,
    dy: Tensor,  # (B, Z, Q, G, R, P)
    dfinal_state: Tensor | None,  # (B, H, P, N)
    initial_state: Tensor | None,  # (B, H, P, N)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, of the exponents δ·A, and of b, c and the initial state, without the skip D·x."""
    b, c, u, carry_in, carry_out = (
        parts.b,
        parts.c,
        parts.u,
        parts.carry_in.unsqueeze(-1),
        parts.carry_out.unsqueeze(-1),
    )
    entering, _ = parts.entering_states(initial_state)
    dy_decayed, u_decayed = parts.factor(carry_in * dy), parts.factor(carry_out * u)
    gained = torch.einsum("bzigrp,bzign->bzgrpn", dy_decayed, c)
    dleaving, dinitial_state = _carry(gained, parts.through, dfinal_state, backward=True)
    dleaving = parts.factor(dleaving)

    scores = parts.scores()
    dscores = parts.within * torch.einsum("bzigrp,bzjgrp->bzgrij", dy, u)  # (B, Z, G, R, Q, Q)
    dscores_of_group = parts.factor(dscores.sum(3))
    from_entry = torch.einsum("bzigrp,bzgrpn->bzigrn", dy_decayed, entering)
    to_end = torch.einsum("bzjgrp,bzgrpn->bzjgrn", u_decayed, dleaving)

    du = torch.einsum("bzgrij,bzigrp->bzjgrp", parts.factor(scores * parts.within), dy)
    du = du + carry_out * torch.einsum("bzgrpn,bzjgn->bzjgrp", dleaving, b)
    dc = torch.einsum("bzgij,bzjgn->bzign", dscores_of_group, b) + from_entry.sum(4)
    db = torch.einsum("bzgij,bzign->bzjgn", dscores_of_group, c) + to_end.sum(4)
    dexponents = _exponent_gradients(
        dscores * scores,
        torch.einsum("bzigrn,bzign->bzigr", from_entry, c),
        torch.einsum("bzjgrn,bzjgn->bzjgr", to_end, b),
        parts.through * (dleaving * entering).sum((-2, -1)),
    )
    return du, dexponents, db, dc, dinitial_state


def _exponent_gradients(within: Tensor, carry_in: Tensor, carry_out: Tensor, through: Tensor) -> Tensor:
    """Return the gradients of the exponents, (B, Z, Q, G, R); each argument is dL/d(log decay) of one kind of decay.

    Exponent k is part of every decay over an interval that contains k, so its gradient is the sum of theirs. The
    shorter formula, dy·y − u·du summed from the end, would subtract large equal numbers.
    """
    spanning = within.flip(-2).cumsum(-2).flip(-2).tril(-1).sum(-1)  # Σ_{i ≥ k} Σ_{j < k}, (B, Z, G, R, Q)
    from_entry = carry_in.flip(2).cumsum(2).flip(2)  # Σ_{i ≥ k}
    to_end = F.pad(carry_out, (0, 0, 0, 0, 1, -1)).cumsum(2)  # Σ_{j < k}
    return spanning.movedim(-1, 2) + from_entry + to_end + through.unsqueeze(2)
