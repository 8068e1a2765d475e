"""`moe_step`: registration and the public function."""

import torch

from yaongi.kernels import backend, check
from yaongi.kernels.moe.op import check_ids
from yaongi.kernels.moe_step.reference import moe_step_reference

Tensor = torch.Tensor
MOST_TOKENS = 4  # beyond, tokens share experts: `moe` reads each of them once


def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _value_check(
    x: Tensor, w_up: Tensor, w_down: Tensor, shared_up: Tensor, shared_down: Tensor, ids: Tensor, *rest: object
) -> None:
    check.finite("moe_step", x=x, w_up=w_up, w_down=w_down, shared_up=shared_up, shared_down=shared_down)
    check_ids("moe_step", ids, w_up.shape[0])


def _triton_refuses(x: Tensor, *rest: Tensor) -> str | None:
    if x.dtype not in check.HALF_DTYPES:
        return f"it takes float16 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    return f"it takes up to {MOST_TOKENS} tokens, got {x.shape[0]}" if x.shape[0] > MOST_TOKENS else None


_op = backend.define(
    "moe_step(Tensor x, Tensor w_up, Tensor w_down, Tensor shared_up, Tensor shared_down, Tensor expert_ids, "
    "Tensor expert_weights, bool settled) -> Tensor",
    reference=moe_step_reference,
    fake=_fake,
    triton="yaongi.kernels.moe_step.token_experts:moe_step_triton",
    triton_refuses=_triton_refuses,
    value_check=_value_check,
)


@torch.no_grad()
def moe_step(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    *,
    settled: bool = False,
) -> Tensor:
    """Apply routed experts, as `moe` does, and a shared one to few tokens, and add up; it has no gradient.

    Args:
        x: (T, D), any float.
        w_up, w_down: (E, F, D) and (E, D, F), x's dtype.
        shared_up, shared_down: (S, D) and (D, S), x's dtype.
        expert_ids: (T, K) int32; a pair whose id is not in 0..E − 1 is skipped.
        expert_weights: (T, K) float32 (float64 for x in float64).
        settled: no work that is still under way on the GPU writes the shared expert's weights, so that they may be read
            before that work has ended.

    Returns:
        y (T, D) in x's dtype, contiguous; summed in float32 (float64 for float64).

    Raises:
        TypeError: kind, dtype or device. ValueError: shape or value.
    """
    args = check.Arguments("moe_step")
    args.tensor("x", x, ("T", "D"))
    args.tensor("w_up", w_up, ("E", "F", "D"), (x.dtype,))
    args.tensor("w_down", w_down, ("E", "D", "F"), (x.dtype,))
    args.tensor("shared_up", shared_up, ("S", "D"), (x.dtype,))
    args.tensor("shared_down", shared_down, ("D", "S"), (x.dtype,))
    args.tensor("expert_ids", expert_ids, ("T", "K"), (torch.int32,))
    args.tensor("expert_weights", expert_weights, ("T", "K"), (torch.promote_types(x.dtype, torch.float32),))
    args.boolean("settled", settled)
    return _op(x, w_up, w_down, shared_up, shared_down, expert_ids, expert_weights, settled)
