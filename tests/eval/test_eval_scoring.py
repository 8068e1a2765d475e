"""Scoring: packed, padded and alone agree with the plain definition, whatever shares a pass or a row."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yaongi.data.packing import pack
from yaongi.eval.progress import Done
from yaongi.eval.scoring import ALONE, Request, Score, Scorer
from yaongi.model import EngramConfig, ModelConfig, Yaongi

MAX_LENGTH = 48


def model_of(dtype: torch.dtype = torch.float64) -> Yaongi:
    """Return a model with every kind of layer, Engram too, and weights large enough to be sure of something."""
    engram = EngramConfig(layer=1, heads=2, head_dim=4, rows=50, orders=(2, 3))
    config = ModelConfig(
        pattern="MEM*ME",
        hidden_size=24,
        vocab_size=61,
        mamba_heads=4,
        mamba_head_dim=6,
        mamba_groups=2,
        mamba_state=5,
        attention_heads=4,
        attention_kv_heads=2,
        attention_head_dim=8,
        experts=6,
        experts_per_token=2,
        expert_size=10,
        shared_expert_size=14,
        max_sequence_length=MAX_LENGTH,
        engram=(engram,),
    )
    model = Yaongi(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def some_requests(count: int = 40, longest: int = MAX_LENGTH + 9) -> list[Request]:
    """Return requests with shared contexts, shared passes, prefixes of each other, none and too long contexts."""
    rng = random.Random(5)

    def ids(n: int) -> list[int]:
        return [rng.randrange(61) for _ in range(n)]

    found = []
    for number in range(count):
        context = ids(rng.choice((0, 1, 3, 17, longest)) if number % 5 else 12)
        answer = ids(rng.randint(1, 6))
        found += [Request(context, [letter]) for letter in range(4)]  # one pass
        found += [
            Request(context, answer),
            Request(context, answer[:-1] + ids(1)),
            Request([*context, *answer], ids(2)),
        ]
    rng.shuffle(found)
    return found


def plain(model: Yaongi, request: Request) -> Score:
    """Score by the definition: one forward pass over the request alone, its whole head, token by token."""
    whole = [*request.context, *request.continuation][-(MAX_LENGTH + 1) :]
    first = len(whole) - len(request.continuation)
    total, greedy = 0.0, True
    if first == 0:
        total, greedy, first = -math.log(61), False, 1
    if len(whole) > 1:
        with torch.no_grad():
            table = model(torch.tensor([whole[:-1]]))[0].double().log_softmax(-1)
        for place in range(first, len(whole)):
            total += float(table[place - 1, whole[place]])
            greedy = greedy and int(table[place - 1].argmax()) == whole[place]
    return Score(total, greedy)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("row_tokens", "rows_per_pass"), [(0, 0), (MAX_LENGTH, 3), (200, 1)])
def test_packed_is_alone(dtype: torch.dtype, tolerance: float, row_tokens: int, rows_per_pass: int) -> None:
    model, requests = model_of(dtype), some_requests(12)
    found = Scorer(model, row_tokens=row_tokens, rows_per_pass=rows_per_pass).score(requests)
    for request, score in zip(requests, found, strict=True):
        wanted = plain(model, request)
        assert score.log_likelihood == pytest.approx(wanted.log_likelihood, rel=tolerance)
        assert score.greedy == wanted.greedy
    assert any(score.greedy for score in found)
    assert not all(score.greedy for score in found)


def test_packed_is_padded() -> None:
    """One request per row, padded on the right: the same as packed."""
    model, requests = model_of(), some_requests(6)
    packed = Scorer(model, rows_per_pass=4).score(requests)
    for request, score in zip(requests, packed, strict=True):
        padded = Scorer(model, rows_per_pass=1, row_tokens=MAX_LENGTH).score([request])[0]
        assert score.log_likelihood == pytest.approx(padded.log_likelihood, rel=1e-12)
        assert score.greedy == padded.greedy


def test_letters_and_prefixes_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(model_of())
    context = list(range(20))
    letters = [Request(context, [letter]) for letter in range(4)]
    scorer.score([*letters, Request(context, [20, 21, 22]), Request(context[:5], [5])])
    assert (scorer.tally.requests, scorer.tally.tokens) == (6, 22)


def test_a_cut_request_is_counted() -> None:
    scorer = Scorer(model_of())
    scorer.score([Request([1] * (MAX_LENGTH + 5), [2, 3]), Request([1] * (MAX_LENGTH - 1), [2, 3])])
    assert (scorer.tally.cut, scorer.tally.cut_tokens) == (1, 6)


def test_nothing_to_read() -> None:
    """One token without a context needs no pass; no requests need nothing."""
    scorer = Scorer(model_of())
    assert scorer.score([]) == []
    assert scorer.score([Request([], [7])]) == [Score(pytest.approx(-math.log(61)), False)]
    assert scorer.tally.positions == 0
    assert scorer.tally.fill == 1


@pytest.mark.parametrize("length", [0, MAX_LENGTH + 1])
def test_bad_continuations(length: int) -> None:
    with pytest.raises(ValueError, match=f"continuation must be 1 to {MAX_LENGTH} tokens long .*, got {length}"):
        Scorer(model_of()).score([Request([1], [1] * length)])


def test_a_score_that_is_no_number() -> None:
    model = model_of()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="log-likelihoods must be finite numbers, got nan"):
        Scorer(model).score([Request([1], [2])])


def test_out_of_memory_halves_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests, said = model_of(), some_requests(12), []
    wanted = Scorer(model, row_tokens=64, rows_per_pass=8).score(requests)
    run: Any = model.hidden_states

    def small(ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        if len(ids) > 3:
            raise torch.OutOfMemoryError
        return run(ids, documents)

    monkeypatch.setattr(model, "hidden_states", small)
    scorer = Scorer(model, row_tokens=64, rows_per_pass=8, say=said.append)
    found = scorer.score(requests)
    assert scorer.rows_at_once == 2
    assert said == [f"out of memory: {rows} rows per pass from here on" for rows in (4, 2)]
    for one, other in zip(found, wanted, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-12)
    monkeypatch.setattr(model, "hidden_states", lambda *_: small(torch.zeros(9, 1), torch.zeros(1)))
    with pytest.raises(torch.OutOfMemoryError):
        Scorer(model, say=said.append).score(requests)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_batches(size: int) -> None:
    """What the processes find adds up to what one finds, to the bit, and each runs its share."""
    model, requests = model_of(torch.float32), some_requests(12)
    alone = Scorer(model, row_tokens=64, rows_per_pass=2)
    wanted = alone.score(requests)
    added: dict[int, list[torch.Tensor]] = {}

    class Part(type(ALONE)):  # type: ignore[misc]
        def sum_on_host(self, numbers: torch.Tensor) -> torch.Tensor:
            added.setdefault(self.rank, []).append(numbers.clone())
            return numbers

    calls = []
    for rank in range(size):
        count = 0

        def counted(*arguments: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return Yaongi.hidden_states(model, *arguments)

        model.hidden_states = counted  # type: ignore[method-assign]
        Scorer(model, Part(rank, size, ALONE.device), row_tokens=64, rows_per_pass=2).score(requests)
        calls.append(count)
    totals = [sum(parts) for parts in zip(*added.values(), strict=True)]
    found = [t - (0.0 if r.context else math.log(61)) for r, t in zip(requests, totals[0].tolist(), strict=True)]
    assert found == [score.log_likelihood for score in wanted]
    assert [bool(hit) for hit in totals[1]] == [
        score.greedy or (bool(hit) and not request.context)
        for hit, score, request in zip(totals[1], wanted, requests, strict=True)
    ]
    assert max(calls) - min(calls) <= 1


def test_after_a_kill_nothing_is_run_twice(tmp_path: Path) -> None:
    """The second of two runs goes on after the batches of the first, one of them torn, with the same bits."""
    model, requests = model_of(torch.float32), some_requests(12)
    wanted = Scorer(model, row_tokens=64, rows_per_pass=1).score(requests)
    run: Any = model.hidden_states
    runs = 0

    def dies(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        if runs == 5:
            raise KeyboardInterrupt
        runs += 1
        return run(*arguments)

    model.hidden_states = dies  # type: ignore[method-assign]
    done = Done(tmp_path, "model", ALONE)
    with pytest.raises(KeyboardInterrupt):
        Scorer(model, row_tokens=64, rows_per_pass=1, done=done).score(requests)
    done.close()
    file = tmp_path / "model-0.jsonl"
    kept = file.read_bytes()
    assert kept.count(b"\n") == 4  # results are read one batch late
    file.write_bytes(kept[:-20])
    done = Done(tmp_path, "model", ALONE)
    assert len(done) == 3
    runs = -100
    assert Scorer(model, row_tokens=64, rows_per_pass=1, done=done).score(requests) == wanted
    again = runs
    done.close()
    assert Scorer(model, row_tokens=64, rows_per_pass=1, done=Done(tmp_path, "model", ALONE)).score(requests) == wanted
    assert runs == again
    assert len(Done(tmp_path, "other", ALONE)) == 0


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 90))
def test_pack(lengths: list[int], row_tokens: int) -> None:
    """Every sequence once, no row too long, and no two rows that would fit into one."""
    rows = pack(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(total <= row_tokens for total in sums)
    assert len(sums) < 2 or sums[0] + sums[1] > row_tokens


def test_rows_are_full() -> None:
    """At least 97 % of the positions are tokens: with prompts of many lengths, of nearly the same, and with few."""
    random = np.random.default_rng(0)
    scorer = Scorer(model_of(), longest=8192)
    for lengths in (
        random.gamma(9, 70, 5000).clip(60, 2000),
        random.normal(520, 15, 3000),
        random.normal(2100, 20, 500),
    ):
        sizes = lengths.astype(int).tolist()
        row = scorer.choose_row_tokens(sizes)
        assert sum(sizes) / (row * len(pack(sizes, row))) > 0.97, row
    assert scorer.choose_row_tokens([100]) == 128
    assert Scorer(model_of(), row_tokens=64).choose_row_tokens([40, 30]) == 64
    with pytest.raises(ValueError, match="sequences must be 1 to 10 tokens long, got 11"):
        pack([3, 11], 10)


def test_scores_of_other_dtypes_are_wide() -> None:
    """A model in bfloat16 is scored in float32: the log-likelihoods of all tokens add up to one."""
    model = model_of(torch.bfloat16)
    found = Scorer(model).score([Request([3, 4, 5], [token]) for token in range(61)])
    assert sum(math.exp(score.log_likelihood) for score in found) == pytest.approx(1, abs=1e-6)
    assert sum(score.greedy for score in found) == 1
