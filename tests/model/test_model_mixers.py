"""The mixers against plain computations: experts and their balance, attention backends, Mamba-2's recurrence."""

import math

import pytest
import torch
from model_support import assert_relative, packed, small_config, small_model, token_ids
from torch.nn import functional as F

from yaongi.model.mixers.attention import Attention
from yaongi.model.mixers.attention_backends import attend, document_cu_seqlens, plan_attention
from yaongi.model.mixers.mamba2 import Mamba2
from yaongi.model.mixers.moe import MoE
from yaongi.model.mixers.router import sequence_balance, split_into_bf16

Tensor = torch.Tensor


def test_three_parts_add_up_compiled_too() -> None:
    """Check them bit for bit; a compiler that removes a rounding would make the second and third part zero."""
    t = torch.randn(64, 16)
    for split in (split_into_bf16, torch.compile(split_into_bf16)):
        parts = split(t)
        assert parts.dtype == torch.bfloat16
        assert torch.equal(parts.float().unflatten(1, (3, -1)).sum(1), t)


def test_experts_against_a_loop_over_tokens() -> None:
    model = small_model("E", torch.float64)
    mixer: MoE = model.backbone.layers[0].mixer
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    y, _ = mixer(x)
    experts, shared = mixer.experts, mixer.shared_experts
    for row in range(2):
        for place in range(5):
            token = x[row, place]
            scores = (mixer.gate.weight @ token).sigmoid()
            chosen = (scores + mixer.gate.e_score_correction_bias).topk(2).indices
            answer = shared.down_proj.weight @ (shared.up_proj.weight @ token).relu() ** 2
            for e in chosen:
                share = 2.5 * scores[e] / scores[chosen].sum()  # the weight depends on the score, not on the bias
                answer = answer + share * (experts.down_proj[e] @ (experts.up_proj[e] @ token).relu() ** 2)
            assert_relative(y[row, place], answer, 1e-10)


def test_sequence_balance_is_its_formula() -> None:
    logits = torch.randn(3, 7, 6, dtype=torch.float64)
    ids = logits.topk(2, dim=-1).indices.int()
    total = 0.0
    for row in range(3):
        scores = logits[row].sigmoid()
        mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
        counts = torch.bincount(ids[row].flatten().long(), minlength=6)
        total += float((6 / (2 * 7) * counts * mean).sum()) / 3
    assert float(sequence_balance(logits, ids)) == pytest.approx(total, rel=1e-12)
    even = torch.arange(6, dtype=torch.int32).view(1, 3, 2)
    assert float(sequence_balance(torch.zeros(1, 3, 6), even)) == pytest.approx(1)


def test_the_correction_bias_balances_a_skewed_router_within_200_steps() -> None:
    """Start with scores that favour some experts by up to 0.1; the bias moves 1e-3 per step, by the batch's load."""
    model = small_model("E", experts=8)
    mixer: MoE = model.backbone.layers[0].mixer
    mixer.gate.e_score_correction_bias.zero_()
    lean = torch.linspace(-0.4, 0.4, 8)

    def loads() -> Tensor:
        logits = lean + 0.5 * torch.randn(4096, 8)
        ids = (logits.sigmoid() + mixer.gate.e_score_correction_bias).topk(2).indices
        return torch.bincount(ids.flatten(), minlength=8)

    def variation(load: Tensor) -> float:
        return float(load.double().std() / load.double().mean())

    skewed = variation(loads())
    for _ in range(200):
        model.update_router_bias(loads()[None], rate=1e-3)
    assert skewed > 0.4
    assert variation(loads()) < 0.1


def test_the_bias_update_is_its_formula() -> None:
    model = small_model("EME")
    before = [m.gate.e_score_correction_bias.clone() for m in (model.backbone.layers[0].mixer, _last(model))]
    model.update_router_bias(torch.tensor([[9, 1, 5, 5, 5, 5], [0, 0, 0, 0, 0, 6]]), rate=0.5)
    signs = [[-1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, -1]]
    for old, sign, mixer in zip(before, signs, (model.backbone.layers[0].mixer, _last(model)), strict=True):
        centred = torch.tensor(sign) - torch.tensor(sign).float().mean()
        torch.testing.assert_close(mixer.gate.e_score_correction_bias, old + 0.5 * centred)
    with pytest.raises(ValueError, match=r"update_router_bias: loads must be \(2, 6\), got \(1, 6\)"):
        model.update_router_bias(torch.zeros(1, 6))


def test_the_bias_does_not_drift() -> None:
    """One busy expert of 160 pushes all others up; a drift of 5 would cost a bfloat16 copy the biases' differences."""
    model = small_model("E", experts=160)
    bias = model.backbone.layers[0].mixer.gate.e_score_correction_bias
    bias.copy_(torch.linspace(-0.05, 0.05, 160))
    loads = torch.ones(1, 160, dtype=torch.int64)
    for step in range(3000):
        loads.fill_(1)[0, step % 160] = 500
        model.update_router_bias(loads, rate=0.03)
    assert float(bias.mean()) == pytest.approx(0, abs=1e-4)


def _last(model: torch.nn.Module) -> MoE:
    return model.backbone.layers[-1].mixer


def plain_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Compute one softmax per query, in a loop; q (B, L, heads, D), k and v with fewer heads."""
    y = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = (documents[b, : t + 1] == documents[b, t]).nonzero().flatten()
            for h in range(q.shape[2]):
                kv = h * k.shape[2] // q.shape[2]
                weights = (k[b, seen, kv] @ q[b, t, h] / math.sqrt(q.shape[-1])).softmax(0)
                y[b, t, h] = weights @ v[b, seen, kv]
    return y


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex"])
@pytest.mark.parametrize("with_documents", [False, True])
def test_attention_backends_agree_with_a_loop(backend: str, with_documents: bool) -> None:
    q, k, v = (torch.randn(2, 32, heads, 16) for heads in (4, 2, 2))
    documents = packed((5, 1, 26), (32,)) if with_documents else torch.zeros(2, 32, dtype=torch.int32)
    plan = plan_attention(backend, q.shape[:2], documents if with_documents else None, q.device, q.dtype)
    assert_relative(attend(q, k, v, plan), plain_attention(q, k, v, documents), 1e-5)


def test_document_starts_count_rows_too() -> None:
    starts, longest = document_cu_seqlens(torch.Size([2, 6]), packed((2, 4), (6,)), torch.device("cpu"))
    assert (starts.tolist(), starts.dtype, longest) == ([0, 2, 6, 12], torch.int32, 6)
    starts, longest = document_cu_seqlens(torch.Size([2, 6]), None, torch.device("cpu"))
    assert (starts.tolist(), longest) == ([0, 6, 12], 6)


@pytest.mark.parametrize("rows", [((2, 4), (6,)), ((1, 1, 4), (3, 3)), ((6,), (6,))], ids=str)
def test_a_known_number_of_documents_gives_the_same_starts_without_waiting(rows: tuple[tuple[int, ...], ...]) -> None:
    documents, shape = packed(*rows), torch.Size([2, 6])
    wanted, _ = document_cu_seqlens(shape, documents, documents.device)
    found, longest = document_cu_seqlens(shape, documents, documents.device, 3)
    assert found.dtype == torch.int32
    assert len(found) == 2 * 3 + 1
    assert found.diff().min() >= 0
    assert found.unique().tolist() == wanted.tolist()
    assert longest == 6
    there = documents.to("meta")  # where no number can be had
    assert document_cu_seqlens(shape, there, there.device, 3)[0].shape == found.shape


@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_a_backend_that_cannot_run_here_says_so(backend: str) -> None:
    model = small_model("*", attention_backend=backend)
    with pytest.raises(
        ValueError, match=f"attention: attention_backend='{backend}' must have a GPU.*, got cpu and float32"
    ):
        model(token_ids(model, 1, 4))


def test_attention_has_no_positions() -> None:
    """Check that without RoPE the last token's output does not depend on the order of the earlier tokens."""
    config = small_config()
    mixer = Attention(config, None, torch.float64)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 8, 24, dtype=torch.float64)
    shuffled = torch.cat([x[:, torch.randperm(7)], x[:, 7:]], dim=1)
    plan = plan_attention("auto", x.shape[:2], None, x.device, x.dtype)
    assert_relative(mixer(shuffled, plan)[:, -1], mixer(x, plan)[:, -1], 1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba_against_its_recurrence(groups: int) -> None:
    """Compare with a loop: head h reads group h // (H/G); the gate comes first, then the norm over each group."""
    model = small_model("M", torch.float64, mamba_groups=groups)
    mixer: Mamba2 = model.backbone.layers[0].mixer
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    H, P, N = 4, 6, 5
    z, xbc, dt = mixer.in_proj(x).split([H * P, H * P + 2 * groups * N, H], dim=-1)
    padded = F.pad(xbc, (0, 0, 3, 0))
    taps = mixer.conv1d.weight[:, 0]
    conv = F.silu(sum(padded[:, k : k + 9] * taps[:, k] for k in range(4)) + mixer.conv1d.bias)
    xs, b, c = conv.split([H * P, groups * N, groups * N], dim=-1)
    xs, b, c = xs.view(2, 9, H, P), b.view(2, 9, groups, N), c.view(2, 9, groups, N)
    delta = F.softplus(dt + mixer.dt_bias)
    state, y = torch.zeros(2, H, P, N, dtype=torch.float64), torch.empty(2, 9, H, P, dtype=torch.float64)
    for t in range(9):
        for h in range(H):
            g = h // (H // groups)
            decay = torch.exp(-delta[:, t, h] * mixer.A_log[h].exp())[:, None, None]
            state[:, h] = decay * state[:, h] + (delta[:, t, h, None] * xs[:, t, h])[..., None] * b[:, t, g, None]
            y[:, t, h] = (state[:, h] * c[:, t, g, None]).sum(-1) + mixer.D[h] * xs[:, t, h]
    gated = (y.flatten(2) * F.silu(z)).unflatten(-1, (groups, -1))
    normed = (gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * mixer.norm.weight
    assert_relative(mixer(x, None), mixer.out_proj(normed), 1e-10)
