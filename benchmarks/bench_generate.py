"""Generation with `yaongi-4b` in bfloat16, beside transformers' and vLLM's on the exported model.

A step's time is that between two tokens of one answer, between which nothing is recorded. Of the others it comes from
calls for two numbers of new tokens: a call for n takes t₀ + n·t. The floor is the bytes that a step must move, at
COPY_BYTES_PER_S: weights, states, keys and values (`bytes_per_step`), at the middle of the two numbers. Ours has its
Engrams, which the others can't hold. 64 rows of transformers want 32 GB in one piece for a prompt's scan, which takes
`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.
"""

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import COPY_BYTES_PER_S, report

from yaongi.model import Yaongi, load_preset
from yaongi.model.count import bytes_per_step
from yaongi.model.generation import stream
from yaongi.model.hub.folder import export_nemotron_h
from yaongi.model.sampling import Sampling

PRESET = "yaongi-4b"
PROMPT, ROUNDS = 128, 3
OURS, THEIRS = (16, 112), (4, 64)  # numbers of new tokens
Call = Callable[[int], Any]


@pytest.fixture(scope="module")
def model() -> Iterator[Yaongi]:
    """Give the model, with initial weights."""
    yield Yaongi(load_preset(PRESET), device="cuda", dtype=torch.bfloat16).eval()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def exported(model: Yaongi, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the same model without its Engrams."""
    folder = tmp_path_factory.mktemp("exported")
    export_nemotron_h(model, model.config, model.count_parameters(), folder, drop_engram=True)
    return folder


def prompts_of(model: Yaongi, batch: int) -> list[list[int]]:
    """Return random prompts of PROMPT tokens."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(4, model.config.vocab_size, (batch, PROMPT), generator=random).tolist()


def ours_ms(model: Yaongi, batch: int, sampling: Sampling, *, cuda_graph: bool = True) -> float:
    """Return the milliseconds of a step: of the fastest of a few answers, host and GPU together."""
    first, last = OURS
    best = float("inf")
    for _ in range(1 + ROUNDS):
        options = {"max_new_tokens": last + 2, "stop": (), "cuda_graph": cuda_graph}
        times = []
        for tokens in stream(model, prompts_of(model, batch), sampling, **options):  # type: ignore[arg-type]
            times.append(time.perf_counter())
            assert None not in tokens
        assert len(times) == last + 2
        best = min(best, times[last] - times[first])
    return 1e3 * best / (last - first)


def theirs_ms(call: Call) -> float:
    """Return the milliseconds of a step: of the fastest calls of each length, host and GPU together."""
    best = dict.fromkeys(THEIRS, float("inf"))
    for length in THEIRS:
        call(length)
    for _ in range(ROUNDS):
        for length in THEIRS:
            torch.cuda.synchronize()
            start = time.perf_counter()
            call(length)
            torch.cuda.synchronize()
            best[length] = min(best[length], time.perf_counter() - start)
    short, long = THEIRS
    return 1e3 * (best[long] - best[short]) / (long - short)


def report_step(
    benchmark: Any,
    request: pytest.FixtureRequest,
    model: Yaongi,
    batch: int,
    ms: float,
    lengths: tuple[int, int] = OURS,
) -> None:
    """Report a step's time, its floor, and tokens/s."""
    position = PROMPT + sum(lengths) // 2
    moved = bytes_per_step(model.count_parameters(), model.config, batch, position)
    floor = 1e3 * moved / COPY_BYTES_PER_S
    figures = {"ms": ms, "floor_ms": floor, "of_floor": floor / ms, "tokens_per_s": 1e3 * batch / ms}
    report(benchmark, request, figures | {"gb_per_step": moved / 1e9})


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("cuda_graph", [True, False], ids=["recorded", "unrecorded"])
def test_ours(batch: int, cuda_graph: bool, model: Yaongi, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time greedy steps, recorded as a CUDA graph and not."""
    report_step(benchmark, request, model, batch, ours_ms(model, batch, Sampling(), cuda_graph=cuda_graph))


@pytest.mark.parametrize("batch", [1, 64])
def test_sampled(batch: int, model: Yaongi, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time steps that sample as the command does by default."""
    report_step(benchmark, request, model, batch, ours_ms(model, batch, Sampling(temperature=0.8, top_p=0.95)))


@pytest.mark.parametrize("batch", [1, 64])
def test_transformers(
    batch: int, model: Yaongi, exported: Path, benchmark: Any, request: pytest.FixtureRequest
) -> None:
    """Time transformers' own greedy generation on the export."""
    transformers = pytest.importorskip("transformers", reason="absent: pip install transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16).to("cuda").eval()
    ids = torch.tensor(prompts_of(model, batch), device="cuda")
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def call(length: int) -> None:
        assert theirs.generate(ids, max_new_tokens=length, **options).shape == (batch, PROMPT + length)

    bare = Yaongi(model.config.without_engram(), device="meta")
    report_step(benchmark, request, bare, batch, theirs_ms(call), THEIRS)


@pytest.mark.parametrize("batch", [1, 64])
def test_vllm(batch: int, model: Yaongi, exported: Path, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time vLLM's greedy generation on the export, without its prefix cache."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is absent: pip install vllm")
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(exported), skip_tokenizer_init=True, dtype="bfloat16", enable_prefix_caching=False, max_model_len=1024,
        gpu_memory_utilization=0.6,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(model, batch)]

    def call(length: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        assert all(len(answer.outputs[0].token_ids) == length for answer in engine.generate(prompts, sampling))

    bare = Yaongi(model.config.without_engram(), device="meta")
    report_step(benchmark, request, bare, batch, theirs_ms(call), THEIRS)
