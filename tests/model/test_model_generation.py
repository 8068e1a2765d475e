"""Generation: caches against the full forward, stops, unequal prompts, streams, the command."""

import gc
import subprocess
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import ENGRAM, packed, roughened, small_config, small_model, token_ids
from oracle import assert_equal_to_float64
from programs import run_module

from yaongi.data.tokenizer import Tokenizer, train_tokenizer
from yaongi.generate import Generate
from yaongi.model import EngramConfig, Yaongi, decoding, generation
from yaongi.model.count import bytes_per_step
from yaongi.model.decoding import SHORTEST, Cache, RecordedStep, prefill, step, stepper
from yaongi.model.devices import device_of
from yaongi.model.generation import generate, stream, stream_text
from yaongi.model.mixers.mamba2 import MambaCache
from yaongi.model.sampling import Sampling

LENGTH = 30
ENGRAMS = (ENGRAM, EngramConfig(layer=3, heads=2, head_dim=4, rows=70, orders=(2, 3, 4), gate="demo"))
GOT = f"got cuda:99 with {torch.cuda.device_count()} GPUs there"
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
    """Check that an answer depends on prompt and seed, and neither on the rest of the batch nor on the tokens asked."""
    model = model_of(engram)
    options: dict[str, Any] = {"stop": (), **sampling}
    together = generate(model, PROMPTS, max_new_tokens=12, **options)
    assert [len(answer) for answer in together] == [12] * len(PROMPTS)
    assert together == [generate(model, [p], max_new_tokens=12, **options)[0] for p in PROMPTS]
    assert together[::-1] == generate(model, PROMPTS[::-1], max_new_tokens=12, **options)
    assert [answer[:5] for answer in together] == generate(model, PROMPTS, max_new_tokens=5, **options)
    if sampling:
        assert together != generate(model, PROMPTS, max_new_tokens=12, seed=1, **options)
        copies = generate(model, [PROMPTS[0]] * 3, max_new_tokens=12, **options)
        assert copies[0] == together[0]
        assert len(set(map(tuple, copies))) == 3


def test_a_cache_grows_and_its_rows_are_chosen() -> None:
    model, chosen = model_of(engram=True), torch.tensor([2, 0, 0])
    input_ids = token_ids(model, 3, LENGTH)

    def logits(cache: Cache, rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([step(model, rows[:, place], cache) for place in range(20, LENGTH)])

    wanted = logits(prefill(model, input_ids[:, :20], capacity=LENGTH)[1], input_ids)[:, chosen]
    cache = prefill(model, input_ids[:, :20], capacity=20)[1]
    cache.grow(LENGTH)
    cache.select(chosen)
    assert_equal_to_float64(logits(cache, input_ids[chosen]), wanted, 1e-5)


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


class Repeated:
    """In place of `GraphedFunction`: runs the function at every call, and counts what would be recorded."""

    made: list["Repeated"] = []  # noqa: RUF012

    def __init__(self, function: Any, what: str, otherwise: str) -> None:
        self.function, self.calls = function, 0
        Repeated.made.append(self)

    def __call__(self, *inputs: torch.Tensor) -> None:
        """Run the function on copies, as a graph reads its own."""
        self.calls += 1
        self.function(*(given.clone() for given in inputs))


def test_a_recorded_step_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the logic without a GPU: equal logits, caches changed in place alone, a recording per length."""
    monkeypatch.setattr(decoding, "GraphedFunction", Repeated)
    monkeypatch.setattr(Repeated, "made", [])
    model = model_of(engram=True)
    ids = token_ids(model, 2, 2 * SHORTEST + 9)
    caches = [prefill(model, ids[:, :250], capacity=ids.shape[1])[1] for _ in range(2)]
    recorded, places = RecordedStep(model, caches[0]), {t.data_ptr() for t in tensors_of(caches[0])}
    for place in range(250, ids.shape[1]):
        assert_equal_to_float64(recorded(ids[:, place]), step(model, ids[:, place], caches[1]), 1e-5)
        assert caches[0].position == caches[1].position == place + 1
    assert [graph.calls for graph in Repeated.made] == [6, SHORTEST, 9]
    assert {t.data_ptr() for t in tensors_of(caches[0])} == places
    with pytest.raises(ValueError, match=r"^step: position must be below 521 \(capacity\), got 521$"):
        recorded(ids[:, 0])


def test_a_recorded_step_is_gone_with_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caches and graphs hold much memory: they must not wait for the garbage collector."""
    monkeypatch.setattr(decoding, "GraphedFunction", Repeated)
    monkeypatch.setattr(Repeated, "made", [])
    model = small_model()
    ids = token_ids(model, 1, 4)
    recorded = RecordedStep(model, prefill(model, ids, capacity=8)[1])
    recorded(ids[:, 0])
    gone = weakref.ref(recorded)
    gc.disable()
    try:
        Repeated.made.clear()
        del recorded
        assert gone() is None
    finally:
        gc.enable()


def tensors_of(cache: Cache) -> list[torch.Tensor]:
    """Return every tensor of a cache."""
    parts = [cache, *(part for layer in cache.layers for part in (layer.mixer, layer.engram) if part is not None)]
    return [value for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("stop", [(), tuple(range(0, 61, 3))], ids=["to the limit", "with ends"])
def test_running_ahead_changes_nothing(stop: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(engram=True)
    options: dict[str, Any] = {"max_new_tokens": 12, "stop": stop, "temperature": 1.0, "repetition_penalty": 1.2}
    expected = generate(model, PROMPTS, **options)
    monkeypatch.setattr(generation, "_runs_ahead", lambda device: True)
    assert generate(model, PROMPTS, **options) == expected


def test_only_plain_models_on_one_gpu_are_recorded() -> None:
    model = model_of(engram=False)
    cache = prefill(model, token_ids(model, 1, 3), capacity=5)[1]
    assert not isinstance(stepper(model, cache, cuda_graph=True), RecordedStep)


def test_the_bytes_of_a_step_are_those_of_weights_and_caches() -> None:
    """Count the bytes of all tensors that a step reads or writes, for a model whose tokens take every expert."""
    model = small_model(dtype=torch.bfloat16, experts_per_token=6, engram=[ENGRAM])
    batch, position = 3, 7
    cache = prefill(model, token_ids(model, batch, position + 1), capacity=position + 1)[1]
    weights = sum(
        p.nbytes for n, p in model.named_parameters() if not n.endswith(("embeddings.weight", "table.weight"))
    )
    wide = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)  # counted as two bytes each
    rows = 2 * batch * (24 + 2 * 2 * 4)
    moved = 0
    for layer in cache.layers:
        if isinstance(layer.mixer, MambaCache):
            moved += 2 * (layer.mixer.state.nbytes + layer.mixer.conv.nbytes)
        elif layer.mixer is not None:
            moved += layer.mixer.keys.nbytes + layer.mixer.values.nbytes
    counted = bytes_per_step(model.count_parameters(), model.config, batch, position)
    assert counted == weights - 2 * wide + rows + moved
    few = small_model(dtype=torch.bfloat16, experts_per_token=2, engram=[ENGRAM])
    expert = 2 * 2 * 24 * 10 * 6 / 6
    missing = len(few.config.layers_of("E")) * 6 * (4 / 6) ** batch * expert
    assert bytes_per_step(few.count_parameters(), few.config, batch, position) == pytest.approx(counted - missing)


def test_a_repetition_penalty_counts_prompt_and_answer_but_no_padding() -> None:
    model = small_model()
    free = generate(model, PROMPTS, max_new_tokens=20, stop=())
    assert any(len(set(answer)) < 20 for answer in free)
    never = generate(model, PROMPTS, max_new_tokens=20, stop=(), repetition_penalty=1e9)
    for prompt, answer in zip(PROMPTS, never, strict=True):
        assert len({*prompt, *answer}) == len(set(prompt)) + 20
    assert never == [generate(model, [p], max_new_tokens=20, stop=(), repetition_penalty=1e9)[0] for p in PROMPTS]


def test_a_row_ends_when_told() -> None:
    model = small_model()
    free = generate(model, PROMPTS, max_new_tokens=6, stop=())
    rows: list[list[int | None]] = [[] for _ in PROMPTS]
    counts = [0] * len(PROMPTS)

    def until(row: int, token: int) -> bool:
        counts[row] += 1
        return counts[row] > row

    for tokens in stream(model, PROMPTS, Sampling(), max_new_tokens=6, stop=(), until=until):
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
    assert rows == [answer[: i + 1] + [None] * (3 - i) for i, answer in enumerate(free)]


def test_text_is_streamed_and_ends_before_a_stop_string() -> None:
    model = small_model()

    def decode(tokens: Any) -> str:
        return "".join(f"<{token}>" for token in tokens)

    free = [decode(answer) for answer in generate(model, PROMPTS, max_new_tokens=12, stop=())]
    stop = free[0][9:17]  # parts of several tokens
    model.config = small_config(eos_token_id=60)
    texts = [""] * len(PROMPTS)
    pieces = list(stream_text(model, PROMPTS, Sampling(), decode, stop_strings=[stop], max_new_tokens=12))
    for row, piece in pieces:
        texts[row] += piece
    ends = [answer.find("<60>") if "<60>" in answer else len(answer) for answer in free]
    assert texts == [a[:end].split(stop)[0] for a, end in zip(free, ends, strict=True)]
    assert len(pieces) > 2 * len(PROMPTS)


@torch.no_grad()
def test_logits_that_are_no_numbers_are_refused() -> None:
    model = small_model("M")
    model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"^generate: logits must be finite numbers, got others in row 0$"):
        generate(model, [[1]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts must be at least one, got none"),
        ({"prompts": [[1], []]}, "every prompt must be at least one token, got an empty one"),
        ({"prompts": [[61]]}, "token ids must be 0 to 60, got 61"),
        ({"prompts": [[-1]]}, "token ids must be 0 to 60, got -1"),
        ({"prompts": [[1] * 55]}, "prompts must be at most 54 tokens long (64 less the 10 to generate), got 55"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 to 63, below max_sequence_length, got 0"),
        ({"temperature": -1.0}, "temperature must be a finite number, 0 or more, got -1.0"),
        ({"temperature": float("inf")}, "temperature must be a finite number, 0 or more, got inf"),
        ({"temperature": float("nan")}, "temperature must be a finite number, 0 or more, got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0, got 0.0"),
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


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `python -m yaongi.generate` with these arguments."""
    return run_module("yaongi.generate", *arguments, typed=stdin)


def test_the_command(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run it as a program with prompts of both kinds, and in this process for the rest."""
    small_model(vocab_size=tokenizer.vocab_size, max_sequence_length=64).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "prompt.txt").write_text("qa b\n")

    def printed(**options: Any) -> str:
        Generate(tmp_path, **{"max_new_tokens": 5, "seed": 3, "device": "cpu"} | options).run()
        return capsys.readouterr().out

    both = printed(prompt=("aq", "qa b"))
    assert both.startswith("aq")
    assert "\nqa b" in both
    assert both == printed(prompt=("aq", "qa b"))
    files = ("--prompt-file", "-", "--prompt-file", str(tmp_path / "prompt.txt"))
    done = run(str(tmp_path), *files, "--max-new-tokens", "5", "--seed", "3", "--device", "cpu", stdin="aq\n")
    assert done.stdout == both, done.stderr
    alone = printed(prompt=("qa b",))
    assert alone == "qa b" + both.split("\nqa b")[1]
    assert printed(prompt=("qa b",), stop=(alone[6:8],)) == alone[:6] + "\n"


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    small_model("M", vocab_size=tokenizer.vocab_size, max_sequence_length=64).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "generate: --prompt or --prompt-file must be given, got neither"),
        ({"prompt_file": (Path("/none"),)}, "[Errno 2] No such file or directory: '/none'"),
        ({"prompt": ("a",), "stop": ("",)}, "generate: stop strings must be one character or longer, got an empty one"),
        ({"prompt": ("a",), "device": "gpux"}, "generate: device must be auto, cpu, gpu, cuda or cuda:N, got 'gpux'"),
        ({"prompt": ("a",), "device": "cuda:99"}, f"generate: device must be one that this machine has, {GOT}"),
    ],
    ids=lambda value: None if isinstance(value, str) else "_".join(value) or "nothing",
)
def test_the_command_refuses_before_it_prints(
    folder: Path, options: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        Generate(folder, **options).run()
    assert str(caught.value) == message
    assert capsys.readouterr().out == ""


def test_the_command_s_mistake_is_one_line(folder: Path) -> None:
    done = run(str(folder), "--prompt", "aq" * 200)
    assert done.returncode == 1
    assert done.stderr.startswith("error: generate: max_new_tokens must be 1 to 63, ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(("name", "gpus", "kind"), [("auto", 0, "cpu"), ("auto", 1, "cuda"), ("gpu", 1, "cuda")])
def test_devices_by_name(name: str, gpus: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_of(name, "generate") == torch.device(kind)


def test_the_command_with_another_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    done = run(str(tmp_path), "--prompt", "aq")
    assert done.stderr == "error: generate: tokenizer must have 61 pieces, got 512\n"
    done = run(str(tmp_path / "none"), "--prompt", "aq")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
