"""Sources to shards: which documents are kept, the same for any number of processes, rebuilt only after a change."""

import json
from pathlib import Path

import numpy as np
import pytest
from texts import random_texts, write_jsonl

from yaongi.data.shards import ShardSet, ShardWriter
from yaongi.data.stages.tokenize_sources import Options, tokenize_sources
from yaongi.data.tokenizer import Tokenizer

QUESTION = "다음 가운데 물이 끓는 온도를 바르게 적은 것을 하나만 골라 그 번호를 답란에 쓰시오"


def build(specs: list[str], tokenizer: Tokenizer, out: Path, workers: int = 1, **options: object) -> dict:  # type: ignore[type-arg]
    return tokenize_sources(specs, tokenizer, out, Options(**options), workers=workers, say=lambda _: None)  # type: ignore[arg-type]


def test_shards_hold_the_documents(corpus: Path, shards: Path, tokenizer: Tokenizer) -> None:
    texts = [json.loads(line)["text"] for line in (corpus / "train" / "code.jsonl").read_text().splitlines()]
    shard_set = ShardSet.open(shards, tokenizer_hash=tokenizer.hash)
    found = []
    for shard in shard_set.shards("train", "code"):
        tokens = np.fromfile(shards / shard.file, "<u2")
        index = shard_set.index(shard).astype(int)
        assert len(tokens) == shard.tokens == index[-1, 0]
        assert (tokens[index[:, 0] - 1] == tokenizer.eos_id).all()
        for start, (end, size) in zip([0, *index[:, 0]], index, strict=False):
            text = tokenizer.decode(tokens[start : end - 1].tolist())
            assert len(text.encode()) == size
            found.append(text)
    assert found == texts
    part = shard_set.manifest["splits"]["train"]["code"]
    assert part["documents"] == len(texts)
    assert part["bytes"] == sum(len(text.encode()) for text in texts)
    assert (shard_set.token_bytes() == tokenizer.byte_lengths).all()
    assert Tokenizer.load(shards / "tokenizer").hash == tokenizer.hash


def test_two_processes_write_the_same(corpus: Path, shards: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    build([str(corpus)], tokenizer, tmp_path / "tokens", workers=2, shard_tokens=3000)
    assert (tmp_path / "tokens" / "manifest.json").read_bytes() == (shards / "manifest.json").read_bytes()


def test_a_second_run_does_nothing_until_something_changes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "en.jsonl", random_texts(1, 40))
    out = tmp_path / "tokens"
    said: list[str] = []

    def run(**options: object) -> bool:
        said.clear()
        tokenize_sources([f"en={source}"], tokenizer, out, Options(**options), workers=1, say=said.append)  # type: ignore[arg-type]
        return "up to date" not in said[-1]

    assert run()
    assert not run()
    assert run(held_out=0.3)
    assert not run(held_out=0.3)
    write_jsonl(source, random_texts(2, 40))
    assert run(held_out=0.3)
    shard = next(out.glob("train/*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert run(held_out=0.3), "damaged shards are made again"
    (tmp_path / "tokens.building").mkdir()
    assert not run(held_out=0.3)


def test_duplicates_are_dropped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = random_texts(3, 30, words=200)
    near = texts[4].replace(texts[4].split()[100], "changed")
    source = write_jsonl(tmp_path / "en.jsonl", [*texts, texts[0], f"  {texts[1]}\n", near])
    counts = build([f"en={source}"], tokenizer, tmp_path / "a")["counts"]["en/en"]
    assert (counts["documents"], counts["exact"], counts["near"]) == (30, 2, 1)
    counts = build([f"en={source}"], tokenizer, tmp_path / "b", near_duplicates=False)["counts"]["en/en"]
    assert (counts["documents"], counts["exact"], counts["near"]) == (31, 2, 0)


def test_training_documents_that_repeat_a_held_out_one_are_dropped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = random_texts(5, 10)
    write_jsonl(tmp_path / "c" / "train" / "ko.jsonl", [*texts, "그것은 다른 글이다"])
    write_jsonl(tmp_path / "c" / "val" / "ko.jsonl", texts[:3])
    manifest = build([str(tmp_path / "c")], tokenizer, tmp_path / "tokens")
    assert manifest["splits"]["val"]["ko"]["documents"] == 3
    assert manifest["splits"]["train"]["ko"]["documents"] == 8


def test_benchmark_texts_are_dropped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    quoting = f"시험에 이런 문제가 나왔다. “{QUESTION}” 아주 쉬웠다."
    short = "모두 여덟 낱말로 된 짧은 물음 하나가 여기에 있다"
    kept = "다음 가운데 물이 끓는 온도를 바르게 적은 것을 고르는 일은 쉽지 않았다"
    source = write_jsonl(tmp_path / "ko.jsonl", [quoting, f"앞말 {short} 뒷말", kept, *random_texts(6, 20)])
    rows = [{"question": QUESTION, "A": "섭씨 백 도", "answer": 1}, {"questions": [short]}, {"question": "무엇인가?"}]
    benchmark = tmp_path / "benchmark.jsonl"
    benchmark.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = build([f"ko={source}"], tokenizer, tmp_path / "t", benchmarks=(str(benchmark),), held_out=0.0)
    assert manifest["counts"]["ko/ko"]["contaminated"] == 2
    assert manifest["counts"]["ko/ko"]["documents"] == 21
    assert manifest["benchmark_items"] == 2, "an item of two words tells nothing"
    with pytest.raises(FileNotFoundError, match=r"must be a file or folder; .* benchmarks fetches some, got nothing"):
        build([f"ko={source}"], tokenizer, tmp_path / "u", benchmarks=("nothing",))


def test_each_string_of_a_row_is_an_item(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A question of twelve words, and then choices: it is quoted without them."""
    question = "다음 보기 가운데 우리 나라에서 가장 높은 산의 이름을 하나만 골라 적으시오"
    assert len(question.split()) == 12
    source = write_jsonl(
        tmp_path / "ko.jsonl", [f"어제 시험에는 “{question}” 라는 물음이 있었다.", *random_texts(6, 20)]
    )
    benchmark = tmp_path / "benchmark"
    write_jsonl(benchmark / "a.jsonl", [])
    (benchmark / "a.jsonl").write_text(json.dumps({"question": question, "choices": ["백두산", "한라산", "설악산"]}))
    manifest = build([f"ko={source}"], tokenizer, tmp_path / "t", benchmarks=(str(benchmark),), held_out=0.0)
    assert manifest["counts"]["ko/ko"]["contaminated"] == 1


def test_a_changed_benchmark_makes_shards_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every file of a folder counts, and so does its name."""
    source = write_jsonl(tmp_path / "ko.jsonl", random_texts(6, 20))
    folder = tmp_path / "benchmark"
    write_jsonl(folder / "deep" / "a.jsonl", random_texts(7, 3))

    def plan() -> object:
        return build([f"ko={source}"], tokenizer, tmp_path / "t", benchmarks=(str(folder),))["plan"]

    plans = [plan(), plan()]
    assert plans[0] == plans[1]
    write_jsonl(folder / "deep" / "a.jsonl", random_texts(8, 3))
    plans.append(plan())
    write_jsonl(folder / "b.jsonl", random_texts(9, 3))
    plans.append(plan())
    assert len({json.dumps(plan) for plan in plans}) == 3


def test_documents_are_held_out_by_hash(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = random_texts(8, 400, words=8)
    manifests = [
        build([f"en={write_jsonl(tmp_path / str(i) / 'en.jsonl', part)}"], tokenizer, tmp_path / f"t{i}", held_out=0.1)
        for i, part in enumerate((texts, texts[::-1]))
    ]
    counts = [manifest["splits"]["val"]["en"]["documents"] for manifest in manifests]
    assert counts[0] == counts[1]
    assert 20 <= counts[0] <= 65


def test_a_source_without_documents_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "en.jsonl", ["", "  \n"])
    with pytest.raises(ValueError, match="gave no documents"):
        build([f"en={source}"], tokenizer, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_ids_out_of_range_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train/ko", "s", "l", 100, 1 << 17)
    for wrong in (-1, 1 << 16):
        with pytest.raises(ValueError, match=f"0 to 65535, got {wrong}"):
            writer.add(np.array([5, wrong], np.int32), 2)
    with pytest.raises(ValueError, match="0 to 99, got 100"):
        ShardWriter(tmp_path, "train/ko", "s", "l", 100, 100).add(np.array([100], np.int32), 2)
