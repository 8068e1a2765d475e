"""Rows that join a running batch and leave it: prompts in pieces, caches in slots, and each row's own sampling."""

from typing import Any

import pytest
import torch
from model_support import ENGRAM, roughened, small_config, small_model, token_ids
from oracle import assert_equal_to_float64
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yaongi.model import EngramConfig, Yaongi, decoding, slots
from yaongi.model.count import cache_bytes
from yaongi.model.decoding import Cache, RecordedStep, prefill, read, read_on, step
from yaongi.model.sampling import RowSampling, Sampling, choose
from yaongi.model.slots import RecordedReads, Slots

LENGTH = 30
ENGRAMS = (ENGRAM, EngramConfig(layer=3, heads=2, head_dim=4, rows=70, orders=(2, 3, 4), gate="demo"))


def model_with_engrams() -> Yaongi:
    """Return a small model with two Engrams of different orders over compressed ids."""
    return roughened(Yaongi(small_config(engram=ENGRAMS), compression=[token // 2 for token in range(61)]))


class OneDevice(TorchDispatchMode):
    """Refuses operations with tensors that are not on the meta device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at its tensors."""
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors), function
        return result


@pytest.fixture
def recorded_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let slots without a GPU do what they would record; prompts are padded to 4, 8, 16 … tokens."""
    monkeypatch.setattr(slots, "may_be_recorded", lambda model, cache: True)
    monkeypatch.setattr(slots, "GraphMemory", lambda: None)
    monkeypatch.setattr(slots, "GraphedFunction", lambda function, *_: function)
    monkeypatch.setattr(slots, "SHORTEST_READ", 4)


@pytest.mark.parametrize("pieces", [(9, 21), (1, 1, 28), (2, 3, 1, 5, 19), (29, 1)], ids=str)
def test_a_prompt_read_in_pieces_is_the_prompt(pieces: tuple[int, ...]) -> None:
    model = model_with_engrams()
    ids = token_ids(model, 2, LENGTH)
    with torch.no_grad():
        wanted = model.hidden_states(ids)
        first, *rest = ids.split(pieces, dim=1)
        hidden, cache = read(model, first, capacity=LENGTH)
        found = torch.cat([hidden, *(read_on(model, piece, cache) for piece in rest)], dim=1)
    assert_equal_to_float64(found, wanted, 1e-5)
    assert cache.position == LENGTH
    with pytest.raises(ValueError, match=r"^read_on: input_ids must be at most 0 tokens long, got 2$"):
        read_on(model, ids[:, :2], cache)


def test_reading_goes_on_after_steps() -> None:
    model = model_with_engrams()
    ids = token_ids(model, 2, LENGTH)
    _, cache = prefill(model, ids[:, :7], capacity=LENGTH)
    for place in range(7, 12):
        step(model, ids[:, place], cache)
    with torch.no_grad():
        found, wanted = read_on(model, ids[:, 12:25], cache), model(ids)
    assert_equal_to_float64(model.lm_head(found), wanted[:, 12:25], 1e-5)
    assert_equal_to_float64(step(model, ids[:, 25], cache), wanted[:, 25], 1e-5)


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
def test_rows_join_and_leave_a_running_batch(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other lengths, from padded prompts, each at its own position; a slot is used again."""
    if recorded:
        monkeypatch.setattr(decoding, "GraphedFunction", lambda function, *_: function)
        monkeypatch.setattr("yaongi.model.slots.stepper", lambda model, cache, **_: RecordedStep(model, cache))
    model = model_with_engrams()
    ids, pad = token_ids(model, 4, LENGTH), torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        wanted = model(ids)
    documents = torch.tensor([[0] * 3 + [1] * 5, [1] * 8]).int()
    _, pair = prefill(model, torch.cat([torch.cat([pad, ids[:1, :5]], 1), ids[1:2, :8]]), documents, capacity=8)
    _, alone = prefill(model, ids[2:3, :2], capacity=64)
    slots = Slots(model, 3, LENGTH)
    assert [slots.rows(needed) for needed in (1, 2, 3)] == [1, 2, 3]
    slots.put([0, 1], pair, [5, 8])
    read_so_far = {0: 5, 1: 8}

    def check(rows: dict[int, int], size: int) -> None:
        """Step once, with row → slot, and compare."""
        tokens = torch.zeros(size, dtype=torch.int64)
        for row, slot in rows.items():
            tokens[slot] = ids[row, read_so_far[row]]
        logits = slots.step(tokens, max(read_so_far[row] for row in rows))
        for row, slot in rows.items():
            assert_equal_to_float64(logits[slot], wanted[row, read_so_far[row]], 1e-5)
            read_so_far[row] += 1

    for _ in range(4):
        check({0: 0, 1: 1}, 2)
    slots.put([2], alone, [2])
    read_so_far[2] = 2
    for _ in range(10):
        check({0: 0, 1: 1, 2: 2}, 3)
    _, late = prefill(model, ids[3:, :4], capacity=4)
    slots.put([0], late, [4])  # in place of row 0
    read_so_far[3] = 4
    while read_so_far[1] < LENGTH:
        check({1: 1, 2: 2, 3: 0}, 3)
    for _ in range(5):  # the others are stepped beyond their room
        check({3: 0}, 3)
    check({3: 0}, 1)


@pytest.mark.usefixtures("recorded_reads")
def test_shapes_of_readings_are_few() -> None:
    recorded = Slots(small_model(), 6, 40, recorded_tokens=64)
    assert recorded.recorded_lengths == [4, 8, 16, 32, 40]
    assert [recorded.shape(1, longest) for longest in (1, 4, 5, 33, 40, 41)] == [
        *((1, length) for length in (4, 4, 8, 40, 40)),
        (1, 41),
    ]
    assert [recorded.shape(rows, 7) for rows in (1, 2, 3, 5)] == [(1, 8), (2, 8), (4, 8), (6, 8)]
    assert Slots(small_model(), 6, 400, recorded_tokens=10).recorded_lengths == [4, 8, 10]
    assert Slots(small_model(), 6, 40).shape(3, 7) == (3, 7)


@pytest.mark.usefixtures("recorded_reads")
def test_a_recorded_reading_is_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of other lengths, whose rows and tokens are padded, into slots that held others before; then steps."""
    model, shapes = model_with_engrams(), []
    read_into = RecordedReads.__call__
    monkeypatch.setattr(
        RecordedReads, "__call__", lambda *given: (shapes.append(tuple(given[1].shape)), read_into(*given))[1]
    )
    ids = token_ids(model, 4, LENGTH)
    with torch.no_grad():
        wanted, logits = model.hidden_states(ids), model(ids)
    both = Slots(model, 4, LENGTH, recorded_tokens=64)
    for rows, places, lengths in (
        ([0, 1, 2], [3, 0, 1], [5, 1, 13]),
        ([3], [3], [26]),
        ([2, 0], [1, 0], [4, 3]),
        ([1, 3, 0], [0, 1, 2], [LENGTH - 5] * 3),  # too many tokens to be recorded
    ):
        hidden = both.read(places, [ids[row, :length].tolist() for row, length in zip(rows, lengths, strict=True)])
        assert hidden.shape == (len(rows), max(lengths), model.config.hidden_size)
        for row, length, found in zip(rows, lengths, hidden, strict=True):
            assert_equal_to_float64(found[-length:], wanted[row, :length], 1e-5)
        for more in range(4):
            tokens = torch.zeros(4, dtype=torch.int64)
            for row, place, length in zip(rows, places, lengths, strict=True):
                tokens[place] = ids[row, length + more]
            found = both.step(tokens, max(lengths) + more)
            for row, place, length in zip(rows, places, lengths, strict=True):
                assert_equal_to_float64(found[place], logits[row, length + more], 1e-5)
    assert shapes == [(4, 16), (1, LENGTH), (2, 4)]


def test_a_recorded_reading_never_waits_for_the_gpu() -> None:
    """Read on the meta device, where no number can be had, and let no tensor come from the host."""
    model = Yaongi(small_config(engram=ENGRAMS), device="meta", dtype=torch.bfloat16)
    cache = prefill(model, torch.zeros(3, 1, dtype=torch.int64, device="meta"), capacity=LENGTH)[1]
    ids, numbers = (torch.zeros(shape, dtype=torch.int64, device="meta") for shape in ((2, 16), (2,)))
    result: list[torch.Tensor] = []
    with torch.no_grad(), OneDevice():
        slots._read_into(model, cache, 64, result, ids, numbers, numbers)
    assert result[0].shape == (64, model.config.hidden_size)


def test_what_a_slot_held_does_not_reach_its_next_row() -> None:
    model = small_model()
    ids = token_ids(model, 1, 9)
    slots = Slots(model, 1, LENGTH)
    _, cache = prefill(model, ids[:, :3], capacity=3)
    wanted = step(model, ids[:, 3], prefill(model, ids[:, :3], capacity=LENGTH)[1])
    for layer in slots._cache.layers:
        for name, value in vars(layer.mixer).items() if layer.mixer else ():
            if isinstance(value, torch.Tensor) and name != "rates":
                value.fill_(torch.nan)
    slots.put([0], cache, [3])
    assert_equal_to_float64(slots.step(ids[:, 3], LENGTH - 1), wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_the_caches_are_counted(dtype: torch.dtype) -> None:
    config = small_config(engram=ENGRAMS)
    model = Yaongi(config, dtype=dtype)
    cache = Slots(model, 3, LENGTH)._cache
    parts = [cache, *(part for layer in cache.layers for part in (layer.mixer, layer.engram) if part is not None)]
    tensors = {
        value.data_ptr(): value.nbytes
        for part in parts
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor) and name != "rates"
    }
    assert isinstance(cache, Cache)
    assert sum(tensors.values()) == cache_bytes(config, 3, LENGTH, dtype.itemsize)


def test_rows_with_settings_of_their_own_choose_as_alone() -> None:
    torch.manual_seed(3)
    cases: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.6},
        {"temperature": 1.5, "top_k": 3},
        {"temperature": 2.0, "top_k": 7, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 1e-8},
    ]
    rows = [Sampling(**case) for case in cases]
    settings = RowSampling.of(rows, 50, torch.device("cpu"))
    for _ in range(50):
        logits, uniforms = 3 * torch.randn(len(rows), 50), torch.rand(len(rows), dtype=torch.float64)
        logits[4, 5] = torch.nan
        found = choose(logits, settings, uniforms)
        alone = [choose(logits[i : i + 1], row, uniforms[i : i + 1]) for i, row in enumerate(rows)]
        assert found.tolist() == torch.cat(alone).tolist()
        assert found[4] == -1
    assert RowSampling.of([rows[2]] * 3, 50, torch.device("cpu")) is rows[2]
    with pytest.raises(ValueError, match=r"^generate: repetition_penalty must be 1 for rows that differ, got another$"):
        RowSampling.of([Sampling(repetition_penalty=1.1)], 50, torch.device("cpu"))
