"""The benchmark's work, on a small model on this machine."""

from pathlib import Path

import bench_serve
import httpx
import pytest

from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi


def test_its_figures_are_taken(client: httpx.Client, model: Yaongi) -> None:
    prompts = bench_serve.prompts_of(model, 4, 9)
    assert prompts == bench_serve.prompts_of(model, 4, 9)
    assert bench_serve.generated_rate(model, prompts, 40) > 0
    assert bench_serve.served_rate(str(client.base_url), prompts, 20) > 0
    assert bench_serve.first_token_ms(str(client.base_url), prompts[0]) > 0


@pytest.mark.long
def test_it_starts_the_command(model: Yaongi, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with bench_serve.served(model, tokenizer, tmp_path / "model", "--slots", "2") as running:
        assert httpx.get(f"{running.url}/v1/models", trust_env=False).json()["data"][0]["id"] == "served"
