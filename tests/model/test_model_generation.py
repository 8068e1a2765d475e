"""Generation: caches against the full forward, the choice of tokens, stops, unequal prompts, the command."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import ENGRAM, packed, roughened, small_config, small_model, token_ids
from oracle import assert_equal_to_float64

from yaongi.data.tokenizer import Tokenizer, train_tokenizer
from yaongi.model import EngramConfig, Yaongi
from yaongi.model.generation import choose, generate, prefill, step

LENGTH = 30
ENGRAMS = (ENGRAM, EngramConfig(layer=3, heads=2, head_dim=4, rows=70, orders=(2, 3, 4), gate="demo"))
PROMPTS = [[5, 7, 11], list(range(17)), [60] * 8, [1]]


def model_of(engram: bool) -> Yaongi:
    """Return a small model, on request with two Engrams of different orders over compressed ids."""
    compression = [token // 2 for token in range(61)] if engram else None
    return roughened(Yaongi(small_config(engram=ENGRAMS if engram else ()), compression=compression))


def cached_logits(model: Yaongi, input_ids: torch.Tensor, prompt: int, document_ids: torch.Tensor | None = None) -> Any:
    """Return the logits (B, L − prompt + 1, V) from the prompt's last token on, computed by prefill and steps."""
    read = None if document_ids is None else document_ids[:, :prompt]
    logits, cache = prefill(model, input_ids[:, :prompt], read, capacity=input_ids.shape[1])
    steps = [step(model, input_ids[:, position], cache) for position in range(prompt, input_ids.shape[1])]
    return torch.stack([logits, *steps], dim=1)


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 9, 13, LENGTH])
@pytest.mark.parametrize("engram", [False, True], ids=["plain", "engram"])
def test_prefill_and_steps_equal_the_forward(prompt: int, engram: bool) -> None:
    model = model_of(engram)
    input_ids = token_ids(model, 3, LENGTH)
    with torch.no_grad():
        full = model(input_ids)[:, prompt - 1 :]
    assert_equal_to_float64(cached_logits(model, input_ids, prompt), full, 1e-5)


@pytest.mark.parametrize("pattern", ["M", "E", "*", "MMM", "*E*"])
def test_each_mixer_alone(pattern: str) -> None:
    model = small_model(pattern)
    input_ids = token_ids(model, 2, LENGTH)
    with torch.no_grad():
        full = model(input_ids)[:, 10:]
    assert_equal_to_float64(cached_logits(model, input_ids, 11), full, 1e-5)


@pytest.mark.parametrize("prompt", [10, 11, 12, 15])
def test_steps_go_on_with_the_last_document(prompt: int) -> None:
    model = model_of(engram=True)
    input_ids = token_ids(model, 3, LENGTH)
    document_ids = packed((9, LENGTH - 9), (2, 3, LENGTH - 5), (LENGTH,))
    with torch.no_grad():
        full = model(input_ids, document_ids)[:, prompt - 1 :]
    assert_equal_to_float64(cached_logits(model, input_ids, prompt, document_ids), full, 1e-5)


@pytest.mark.parametrize("engram", [False, True], ids=["plain", "engram"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_unequal_prompts_in_a_batch(engram: bool, sampling: dict[str, float]) -> None:
    """Check that a greedy answer does not depend on the rest of the batch, and that a sampled batch is reproducible."""
    model = model_of(engram)
    together = generate(model, PROMPTS, max_new_tokens=12, stop=(), **sampling)
    assert [len(answer) for answer in together] == [12] * len(PROMPTS)
    if sampling:
        assert together == generate(model, PROMPTS, max_new_tokens=12, stop=(), **sampling)
        assert together != generate(model, PROMPTS, max_new_tokens=12, stop=(), seed=1, **sampling)
    else:
        assert together == [generate(model, [p], max_new_tokens=12, stop=())[0] for p in PROMPTS]


def test_stop_tokens_end_a_row_alone() -> None:
    model = small_model()
    free = generate(model, PROMPTS, max_new_tokens=12, stop=())
    stop = free[0][4]
    stopped = generate(model, PROMPTS, max_new_tokens=12, stop=[stop])
    assert stopped == [answer[: answer.index(stop)] if stop in answer else answer for answer in free]


def test_the_config_s_ends_stop_by_default() -> None:
    model = small_model()
    first = generate(model, PROMPTS[:1], max_new_tokens=1, stop=())[0][0]
    for ends in ({"eos_token_id": first}, {"stop_token_ids": (first + 1, first)}):
        assert generate(small_model(**ends), PROMPTS[:1], max_new_tokens=5) == [[]]


def shares(draws: int = 4000, **settings: Any) -> torch.Tensor:
    """Return how often each of five tokens with probabilities 0.5, 0.25, 0.15, 0.08, 0.02 is chosen."""
    probabilities = torch.tensor([0.15, 0.5, 0.02, 0.25, 0.08])
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    random = torch.Generator().manual_seed(0)
    chosen = choose(probabilities.log().expand(draws, -1), random=random, **settings)
    return torch.bincount(chosen, minlength=5) / draws


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({}, [0.15, 0.5, 0.02, 0.25, 0.08]),
        ({"temperature": 0.5}, [0.0649, 0.7207, 0.0012, 0.1802, 0.0184]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"top_k": 99}, [0.15, 0.5, 0.02, 0.25, 0.08]),
        ({"top_p": 0.1}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.76}, [1 / 6, 5 / 9, 0, 5 / 18, 0]),
        ({"top_p": 1.0}, [0.15, 0.5, 0.02, 0.25, 0.08]),
        ({"top_k": 3, "top_p": 0.6}, [0, 2 / 3, 0, 1 / 3, 0]),
    ],
    ids=str,
)
def test_the_distribution_of_the_choice(settings: dict[str, Any], expected: list[float]) -> None:
    found = shares(**settings)
    assert (found - torch.tensor(expected)).abs().max() < 0.025
    assert found[torch.tensor(expected) == 0].sum() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts must be at least one, got none"),
        ({"prompts": [[1], []]}, "every prompt must be at least one token, got an empty one"),
        ({"prompts": [[61]]}, "token ids must be 0 to 60, got 61"),
        ({"prompts": [[-1]]}, "token ids must be 0 to 60, got -1"),
        ({"prompts": [[1] * 55]}, "prompts must be at most 54 tokens long (64 less the 10 to generate), got 55"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^generate: ") as caught:
        generate(small_model("M", max_sequence_length=64), **({"prompts": [[1]], "max_new_tokens": 10} | changes))
    assert str(caught.value) == f"generate: {message}"


def test_beyond_the_capacity() -> None:
    model = small_model("M*")
    with pytest.raises(ValueError, match=r"^prefill: input_ids must be at most 3 tokens long \(capacity\), got 4$"):
        prefill(model, token_ids(model, 1, 4), capacity=3)
    _, cache = prefill(model, token_ids(model, 1, 4), capacity=4)
    with pytest.raises(ValueError, match=r"^step: position must be below 4 \(capacity\), got 4$"):
        step(model, torch.tensor([1]), cache)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = [f"{a}{b} {b}{a}" for a in "abcdefghijklmnop" for b in "qrstuvwxyz"]
    return train_tokenizer([" ".join(words)] * 20, 512)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m yaongi.generate` with these arguments."""
    command = [sys.executable, "-m", "yaongi.generate", *arguments, "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small_model(vocab_size=tokenizer.vocab_size, max_sequence_length=64).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    options = ("--max-new-tokens", "5", "--seed", "3")
    done = run(str(tmp_path), "--prompt", "aq", "--prompt", "qa b", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("aq")
    assert "\nqa b" in done.stdout
    assert done.stdout == run(str(tmp_path), "--prompt", "aq", "--prompt", "qa b", *options).stdout
    long = run(str(tmp_path), "--prompt", "aq" * 200)
    assert long.returncode == 1
    assert long.stderr.startswith("error: generate: prompts must be at most ")
    assert long.stderr.count("\n") == 1


def test_the_command_with_another_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    done = run(str(tmp_path), "--prompt", "aq")
    assert done.stderr == "error: generate: tokenizer must have 61 pieces, got 512\n"
    done = run(str(tmp_path / "none"), "--prompt", "aq")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
