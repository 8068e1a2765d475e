"""The loader: the rows of a step are a function of the step alone; damaged data is an error before the first step."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from yaongi.data.loader import Loader
from yaongi.data.row_loader import Batch
from yaongi.data.shards import ShardSet
from yaongi.data.streams import TokenStream
from yaongi.data.tokenizer import Tokenizer

ROW = 64


def make(folder: Path, **options: object) -> Loader:
    return Loader(folder, **{"row_tokens": ROW, "batch_rows": 24, "seed": 3, **options})  # type: ignore[arg-type]


def joined(parts: list[Batch]) -> torch.Tensor:
    return torch.cat([part.input_ids for part in parts])


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """Return a copy of the shards that the test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "tokens"))


def test_shapes_and_documents(shards: Path) -> None:
    batch = make(shards).batch(5)
    assert batch.input_ids.shape == batch.document_ids.shape == (24, ROW)
    assert batch.input_ids.dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32
    steps = batch.document_ids.diff(dim=1)
    assert set(steps.unique().tolist()) <= {0, 1}
    assert (batch.document_ids[:, 0] == 0).all()
    assert ((steps == 1) == (batch.input_ids[:, :-1] == 3)).all(), "a document ends with its EOS, and only there"
    assert batch.samples.tolist() == list(range(120, 144))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 24), (1, 4), (2, 12), (2, 3), (8, 3), (8, 1), (24, 1)])
def test_a_step_does_not_depend_on_processes_or_micro_batches(shards: Path, world_size: int, micro_batch: int) -> None:
    loader = make(shards)
    micros = 24 // world_size // micro_batch
    for step in (0, 7):
        parts = [
            loader.batch(step, rank=rank, world_size=world_size, micro=micro, micro_batch=micro_batch)
            for rank in range(world_size)
            for micro in range(micros)
        ]
        assert joined(parts).equal(loader.batch(step).input_ids)


@pytest.mark.parametrize("world_size", [3, 5, 7])
def test_processes_need_not_divide_the_micro_batches(shards: Path, world_size: int) -> None:
    """Give each process neighbouring micro-batches, and none of them more than one more than another."""
    loader = make(shards)
    counts = [loader.micro_batches(rank, world_size, 3) for rank in range(world_size)]
    assert max(counts) - min(counts) == 1
    parts = [
        loader.batch(1, rank=rank, world_size=world_size, micro=micro, micro_batch=3)
        for rank in range(world_size)
        for micro in range(counts[rank])
    ]
    assert joined(parts).equal(loader.batch(1).input_ids)


def test_the_order_is_pure(shards: Path) -> None:
    first, second = make(shards), make(shards)
    for step in (40, 2, 11):
        first.batch(step)
    assert first.batch(9).input_ids.equal(second.batch(9).input_ids)
    assert not first.batch(9).input_ids.equal(make(shards, seed=4).batch(9).input_ids)
    assert first.read([225]).input_ids.equal(second.batch(9).input_ids[9:10])


def test_an_epoch_gives_each_row_once_and_the_next_in_another_order(shards: Path) -> None:
    loader = make(shards, mix="en=1")
    rows = loader.rows["en"]
    stream = loader.streams[0]
    every = sorted(tuple(stream.rows.read(row)[0].tolist()) for row in range(rows))
    epochs = [loader.read(range(epoch * rows, (epoch + 1) * rows)).input_ids.tolist() for epoch in (0, 1)]
    assert sorted(map(tuple, epochs[0])) == sorted(map(tuple, epochs[1])) == every
    assert epochs[0] != epochs[1]


def test_rows_across_shards_hold_the_whole_stream(shards: Path) -> None:
    shard_set = ShardSet.open(shards)
    files = shard_set.shards("train", "math")
    assert len(files) > 1
    whole = np.concatenate([np.fromfile(shards / shard.file, "<u2") for shard in files])
    stream = TokenStream(shard_set, files)
    assert stream.tokens == len(whole)
    for start, count in ((0, 10), (files[0].tokens - 5, 10), (100, len(whole) - 100), (files[0].tokens, 3)):
        assert (stream.read(start, count) == whole[start : start + count]).all()


def test_the_mixture_reaches_the_batches(shards: Path) -> None:
    loader = make(shards)
    batch = loader.read(range(2000))
    counts = torch.bincount(batch.domains, minlength=4).tolist()
    assert counts == [800, 400, 500, 300]


def test_stream_equals_batches_and_resumes(shards: Path) -> None:
    loader = make(shards)
    stream = loader.stream(rank=1, world_size=2, micro_batch=4)
    taken = [next(stream) for _ in range(7)]
    assert loader.samples == 48, "two steps are handed out whole, the third isn't"
    stream.close()
    wanted = [loader.batch(n // 3, rank=1, world_size=2, micro=n % 3, micro_batch=4) for n in range(7)]
    assert joined(taken).equal(joined(wanted))

    state = json.loads(json.dumps(loader.state_dict()))
    assert state["consumed"] == loader.consumed()
    assert sum(state["consumed"].values()) == 48
    other = make(shards, batch_rows=8)
    other.load_state_dict(state)
    assert next(other.stream()).input_ids.equal(loader.batch(2).input_ids[:8])


def test_a_state_of_other_data_is_refused(shards: Path) -> None:
    state = make(shards).state_dict()
    for options, word in (
        ({"seed": 4}, "seed must be 4, got 3"),
        ({"row_tokens": 32}, "row_tokens"),
        ({"mix": "ko=1"}, "mix"),
    ):
        with pytest.raises(ValueError, match=word):
            make(shards, **options).load_state_dict(state)
    with pytest.raises(ValueError, match="the rows in --data were others"):
        make(shards).load_state_dict({**state, "manifest": "0"})


def test_closing_the_stream_ends_its_thread(shards: Path) -> None:
    stream = make(shards).stream()
    next(stream)
    assert "yaongi-loader" in {thread.name for thread in threading.enumerate()}
    stream.close()
    assert "yaongi-loader" not in {thread.name for thread in threading.enumerate()}


def test_an_error_while_reading_ahead_reaches_the_consumer(shards: Path) -> None:
    loader = make(shards)
    loader.vocab_size = 100
    with pytest.raises(ValueError, match="token ids must be below 100"):
        next(loader.stream())


def test_held_out_rows_count_their_bytes(shards: Path, tokenizer: Tokenizer) -> None:
    loader = make(shards)
    held_out = loader.held_out("ko", 5)
    assert held_out.input_ids.shape == (5, ROW)
    assert held_out.input_ids.equal(loader.held_out("ko", 5).input_ids)
    for ids, documents, predicted, text_bytes in zip(
        held_out.input_ids, held_out.document_ids, held_out.predicted, held_out.text_bytes, strict=True
    ):
        targets = [t for t in range(1, ROW) if documents[t] == documents[t - 1] and ids[t] != tokenizer.eos_id]
        assert predicted.nonzero().flatten().tolist() == targets
        assert sum(
            len(tokenizer.decode([int(ids[t])]).encode()) for t in targets if not is_byte(tokenizer, ids[t])
        ) + sum(is_byte(tokenizer, ids[t]) for t in targets) == int(text_bytes)
    assert len(loader.held_out("ko", 10**6).input_ids) > 5
    with pytest.raises(ValueError, match="train, ko, must fill a row of 1000000 tokens"):
        make(shards, row_tokens=10**6)


def is_byte(tokenizer: Tokenizer, token: torch.Tensor) -> bool:
    return tokenizer.is_byte(int(token))


def test_bad_sizes(shards: Path) -> None:
    with pytest.raises(ValueError, match="rows must be of 2 tokens"):
        make(shards, row_tokens=1)
    with pytest.raises(ValueError, match="multiple of 5 rows, for 2 processes or fewer, got 24"):
        make(shards).batch(0, world_size=2, micro_batch=5)
    with pytest.raises(ValueError, match="multiple of 8 rows, for 4 processes or fewer, got 24"):
        make(shards).batch(0, world_size=4, micro_batch=8)
    with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
        make(shards).batch(0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="no step 0, rank 1 of 2, micro-batch 3"):
        make(shards).batch(0, rank=1, world_size=2, micro=3, micro_batch=4)


def test_another_tokenizer(shards: Path, tokenizer: Tokenizer) -> None:
    make(shards, tokenizer_hash=tokenizer.hash)
    with pytest.raises(ValueError, match="made with tokenizer"):
        make(shards, tokenizer_hash="f" * 64)


def test_a_missing_domain(damaged: Path) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    del manifest["splits"]["train"]["code"]
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"mix: domains must be among ko, en, math, which have text, got code"):
        make(damaged, mix="ko=1,code=1")


def test_a_truncated_shard(damaged: Path) -> None:
    path = next((damaged / "train").glob("ko-*.bin"))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=f"{path.name} is truncated or changed"):
        make(damaged)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_changed_shard(damaged: Path, suffix: str) -> None:
    make(damaged)  # records its check
    path = next((damaged / "train").glob(f"en-*.{suffix}"))
    content = bytearray(path.read_bytes())
    content[11] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} has changed"):
        make(damaged)


def test_a_missing_shard_and_a_missing_or_broken_manifest(damaged: Path) -> None:
    next((damaged / "val").glob("*.bin")).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        make(damaged)
    (damaged / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        make(damaged)
    (damaged / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        make(damaged)
