"""Helpers for the tests of the model: small configs, unusual parameters, packed rows, and comparisons."""

import torch

from yaongi.model import EngramConfig, ModelConfig, Yaongi

Tensor = torch.Tensor
ENGRAM = EngramConfig(layer=1, heads=2, head_dim=4, rows=50, orders=(2, 3))


def small_config(pattern: str = "MEM*ME", **changes: object) -> ModelConfig:
    """Return the config of a model of a few thousand parameters, with several groups, heads and experts."""
    fields: dict[str, object] = {
        "pattern": pattern,
        "hidden_size": 24,
        "vocab_size": 61,
        "mamba_heads": 4,
        "mamba_head_dim": 6,
        "mamba_groups": 2,
        "mamba_state": 5,
        "attention_heads": 4,
        "attention_kv_heads": 2,
        "attention_head_dim": 8,
        "experts": 6,
        "experts_per_token": 2,
        "expert_size": 10,
        "shared_expert_size": 14,
    }
    return ModelConfig.from_dict(fields | changes)


def small_model(pattern: str = "MEM*ME", dtype: torch.dtype = torch.float32, **changes: object) -> Yaongi:
    """Return a small model after `roughened`: its parameters differ from their initial values."""
    return roughened(Yaongi(small_config(pattern, **changes), dtype=dtype))


@torch.no_grad()
def roughened(model: Yaongi) -> Yaongi:
    """Change in place every parameter that starts at zero or one, enlarge the projections, and return the model."""
    random = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=random).to(tensor.device) if tensor.is_floating_point() else None
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            tensor.add_(0.2 * noise)
        elif name.endswith(("conv.weight", "e_score_correction_bias")):
            tensor.add_(0.3 * noise)
        elif name.endswith(("proj.weight", "up_proj", "down_proj", "gate.weight", "embeddings.weight", "table.weight")):
            tensor.mul_(2)
    return model


def token_ids(model: Yaongi, batch: int, length: int) -> Tensor:
    """Return random tokens (B, L), other ones at each call."""
    return torch.randint(0, model.config.vocab_size, (batch, length))


def packed(*rows: tuple[int, ...]) -> Tensor:
    """Return document ids (B, L) of rows with documents of these lengths; they don't start at zero and have gaps."""
    ids = [torch.repeat_interleave(3 + 2 * torch.arange(len(row)), torch.tensor(row)) for row in rows]
    return torch.stack(ids).int()


def gradients(model: Yaongi, loss: Tensor) -> dict[str, Tensor]:
    """Return the dense gradient of every parameter."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_relative(actual: Tensor, wanted: Tensor, relative: float, name: str = "result") -> None:
    """Check that max|actual − wanted| ≤ relative · max|wanted|."""
    assert actual.shape == wanted.shape, f"{name}: {tuple(actual.shape)} != {tuple(wanted.shape)}"
    actual, wanted = actual.detach(), wanted.detach()
    error = float((actual.double() - wanted.double()).abs().max())
    allowed = relative * max(float(wanted.double().abs().max()), 1e-30)
    assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e}"
