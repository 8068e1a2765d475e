"""Helpers of the tests of `mamba_scan` and `mamba_step`: arguments of a call, and the sequential recurrence."""

from typing import Any

import torch
from support import document_ids
from torch.nn import functional as F

DIFFERENTIABLE = ("x", "dt", "A", "b", "c", "D", "dt_bias", "initial_state")


OPTIONAL = ("D", "dt_bias", "initial_state")


SIZES = (2, 4, 3, 2, 5)  # B, H, P, G, N


def arguments(
    sizes: tuple[int, int, int, int, int],
    L: int,
    documents: tuple[int, ...] | None = None,
    absent: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return arguments of one call; x, b and c are slices of one wider tensor, like the convolution's output."""
    B, H, P, G, N = sizes
    wide = torch.promote_types(dtype, torch.float32)
    packed = torch.randn(B, L, H * P + 2 * G * N).to(device, dtype)
    x, b, c = packed.split([H * P, G * N, G * N], dim=-1)
    made = {
        "x": x.unflatten(-1, (H, P)),
        "dt": torch.randn(B, L, H).to(dtype),
        "A": -(2 * torch.rand(H)).exp().to(wide) / 2,
        "b": b.unflatten(-1, (G, N)),
        "c": c.unflatten(-1, (G, N)),
        "D": torch.randn(H).to(wide),
        "dt_bias": torch.randn(H).to(wide) - 1,
        "document_ids": document_ids(B, documents) if documents else None,
        "initial_state": torch.randn(B, H, P, N).to(wide),
    }
    tensors = {name: None if t is None or name in absent else t.to(device) for name, t in made.items()}
    return tensors | {"return_final_state": True}


def differentiable(args: dict[str, Any]) -> list[str]:
    """Return the names of a call's arguments that get a gradient."""
    return [name for name in DIFFERENTIABLE if args[name] is not None]


def mamba_scan_sequential(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the recurrence token by token; differentiable by autograd."""
    batch, length, heads, head_dim = x.shape
    b, c = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (b, c))
    state = A.new_zeros(batch, heads, head_dim, b.shape[3]) if initial_state is None else initial_state
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias, threshold=100.0)
    outputs = []
    for t in range(length):
        if document_ids is not None and t > 0:
            same = document_ids[:, t] == document_ids[:, t - 1]
            state = torch.where(same[:, None, None, None], state, 0)
        update = (delta[:, t, :, None] * x[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(2)
        state = torch.exp(delta[:, t] * A)[..., None, None] * state + update
        outputs.append((state * c[:, t].unsqueeze(2)).sum(-1))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + D.unsqueeze(-1) * x), state


def positional(args: dict[str, Any]) -> list[Any]:
    """Return the tensors of a call in the order of the op's schema."""
    names = ("x", "dt", "A", "b", "c", "D", "dt_bias", "document_ids", "initial_state")
    return [args[name] for name in names]
