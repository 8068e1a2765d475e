"""Scoring on a GPU: packed rows are as near to the float64 model as requests alone, whatever fits into memory."""

import pytest
import torch
from test_eval_scoring import some_requests

from yaongi.eval.scoring import Request, Scorer
from yaongi.model import EngramConfig, ModelConfig, Yaongi
from yaongi.world import World

CUDA = World(0, 1, torch.device("cuda"))
pytestmark = pytest.mark.gpu


@pytest.fixture
def models() -> tuple[Yaongi, Yaongi]:
    """Return a model in float64 on the CPU, and the same in bfloat16 on the GPU, of sizes that the kernels take."""
    config = ModelConfig(
        pattern="MEM*ME",
        hidden_size=64,
        vocab_size=61,
        mamba_heads=4,
        mamba_head_dim=32,
        mamba_groups=2,
        mamba_state=16,
        attention_heads=2,
        attention_kv_heads=1,
        attention_head_dim=32,
        experts=4,
        experts_per_token=2,
        expert_size=32,
        shared_expert_size=64,
        max_sequence_length=4096,
        engram=(EngramConfig(layer=1, heads=2, head_dim=16, rows=50, orders=(2, 3)),),
    )
    exact = Yaongi(config, dtype=torch.bfloat16).double().eval()
    fast = Yaongi(config, dtype=torch.bfloat16, device="cuda").eval()
    fast.load_state_dict(exact.state_dict())
    return exact, fast


def log_likelihoods(scorer: Scorer, requests: list[Request]) -> torch.Tensor:
    return torch.tensor([score.log_likelihood for score in scorer.score(requests)], dtype=torch.float64)


def test_packed_is_alone(models: tuple[Yaongi, Yaongi]) -> None:
    exact, fast = models
    requests = some_requests(20, longest=700)
    wanted = log_likelihoods(Scorer(exact), requests)
    scorer = Scorer(fast, CUDA)
    packed = log_likelihoods(scorer, requests)
    alone = torch.cat([log_likelihoods(Scorer(fast, CUDA, rows_per_pass=1), [request]) for request in requests])
    assert (packed - wanted).abs().max() <= 2 * (alone - wanted).abs().max() + 1e-3
    rows = scorer.rows_at_once
    assert rows >= 2
    assert rows & (rows - 1) == 0
    assert torch.equal(log_likelihoods(Scorer(fast, CUDA, rows_per_pass=rows), requests), packed)


def test_out_of_memory(models: tuple[Yaongi, Yaongi]) -> None:
    """With 60 MB, the rows are too many: they are halved until they fit, and the scores stay."""
    _, fast = models
    requests = some_requests(400, longest=900)
    wanted = log_likelihoods(Scorer(fast, CUDA, 4096, 1), requests)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    said: list[str] = []
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 60e6) / total)
    try:
        scorer = Scorer(fast, CUDA, 4096, 64, say=said.append)  # 18 rows
        found = log_likelihoods(scorer, requests)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scorer.rows_at_once < 9
    assert said[0] == "out of memory: 9 rows per pass from here on"
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
