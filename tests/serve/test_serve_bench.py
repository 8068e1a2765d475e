"""The benchmark's work, on a small model on this machine."""

from pathlib import Path

import bench_serve

from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi


def test_its_work_runs(model: Yaongi, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompts = bench_serve.prompts_of(model, 4, 9)
    assert prompts == bench_serve.prompts_of(model, 4, 9)
    assert bench_serve.generated_rate(model, prompts, 40) > 0
    with bench_serve.served(model, tokenizer, tmp_path / "model") as running:
        assert bench_serve.served_rate(running.url, prompts, 20) > 0
        assert bench_serve.first_token_ms(running.url, prompts[0]) > 0
