"""The squared-ReLU experts in FP8 in plain torch; README.md in this folder defines them."""

import torch

from yaongi.kernels.fp8_quantize.reference import dequantized, note_largest, quantized
from yaongi.kernels.moe.reference import experts_with_rows

Tensor = torch.Tensor


def moe8_reference(
    x8: Tensor,  # (T, D)
    unit_x: Tensor,  # ()
    w_up8: Tensor,  # (E, F, D)
    w_down8: Tensor,  # (E, D, F)
    unit_up: Tensor,  # ()
    unit_down: Tensor,  # ()
    expert_ids: Tensor,  # (T, K)
    expert_weights: Tensor,  # (T, K)
    scale: Tensor,  # ()
    amax: Tensor,  # ()
    residual: Tensor | None,  # (T, D)
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (T, D), (T·K, F)
    """Return y_t = Σ_k g_tk · W_down·A + residual_t with A = relu(W_up·x_t)² in FP8, and A's codes sorted by expert."""
    wide = torch.promote_types(dtype, torch.float32)
    (T, K), D = expert_ids.shape, x8.shape[1]
    a8 = x8.new_zeros(T * K, w_up8.shape[1])
    weights = expert_weights.to(wide).flatten()
    parts = x8.new_zeros(T * K, D, dtype=wide)  # g·W_down·A of each pair; a skipped pair contributes zero
    for expert, rows, pairs in experts_with_rows(expert_ids, len(w_up8)):
        hidden = dequantized(x8[pairs // K], unit_x, wide) @ dequantized(w_up8[expert], unit_up, wide).T  # (R, F)
        act = hidden.relu().square()
        note_largest(amax, act)
        a8[rows] = quantized(act, scale)
        part = dequantized(a8[rows], 1 / scale, wide) @ dequantized(w_down8[expert], unit_down, wide).T  # (R, D)
        parts[pairs] = (weights[pairs, None] * part).to(dtype).to(wide)  # rounded as the kernels store it
    return _combined(parts.view(T, K, D), residual, dtype), a8


def moe8_backward_reference(
    d8: Tensor,  # (T, D)
    unit_d: Tensor,  # ()
    dy: Tensor,  # (T, D)
    x: Tensor,  # (T, D)
    w_up8t: Tensor,  # (E, D, F)
    w_down8t: Tensor,  # (E, F, D)
    unit_up: Tensor,  # ()
    unit_down: Tensor,  # ()
    expert_ids: Tensor,  # (T, K)
    expert_weights: Tensor,  # (T, K)
    a8: Tensor,  # (T·K, F), as the forward returned it
    unit_a: Tensor,  # ()
    scale: Tensor,  # ()
    amax: Tensor,  # ()
    addend: Tensor | None,  # (T, D)
    dw_up: Tensor | None,  # (E, F, D)
    dw_down: Tensor | None,  # (E, D, F)
) -> tuple[Tensor, Tensor, Tensor]:  # (T, D), (T, K), (T·K, F)
    """Return dx, dexpert_weights and dH in FP8; add the weights' gradients, unrounded, to dw_up and dw_down."""
    dtype, wide = dy.dtype, torch.promote_types(dy.dtype, torch.float32)
    (T, K), D = expert_ids.shape, dy.shape[1]
    weights = expert_weights.to(wide).flatten()
    dweights, dh8 = weights.new_zeros(T * K), a8.new_zeros(a8.shape)
    dparts = dy.new_zeros(T * K, D, dtype=wide)  # each pair's share of dx
    for expert, rows, pairs in experts_with_rows(expert_ids, len(w_up8t)):
        tokens, g, act = pairs // K, weights[pairs, None], dequantized(a8[rows], unit_a, wide)
        dact = dequantized(d8[tokens], unit_d, wide) @ dequantized(w_down8t[expert], unit_down, wide).T  # (R, F), dA′
        dweights[pairs] = (dact * act).sum(-1)
        dhidden = 2 * act.sqrt() * (g * dact)  # relu(H) = sqrt(A)
        note_largest(amax, dhidden)
        dh8[rows] = quantized(dhidden, scale)
        dpart = dequantized(dh8[rows], 1 / scale, wide) @ dequantized(w_up8t[expert], unit_up, wide).T  # (R, D)
        dparts[pairs] = dpart.to(dtype).to(wide)
        if dw_up is not None:  # of operands that were never in FP8, rounded as the kernels store them
            dw_up[expert] += dhidden.to(dtype).to(wide).T @ x[tokens].to(wide)
        if dw_down is not None:
            dw_down[expert] += dy[tokens].to(wide).T @ (g * act).to(dtype).to(wide)
    dx = _combined(dparts.view(T, K, D), addend, dtype)
    return dx, dweights.view(T, K).to(expert_weights.dtype), dh8


def _combined(parts: Tensor, addend: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the sum of parts (T, K, D) over K, and of the addend (T, D), rounded once."""
    total = parts.sum(1)
    return (total if addend is None else total + addend.to(total.dtype)).to(dtype)
