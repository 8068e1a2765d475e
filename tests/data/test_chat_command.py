"""`python -m yaongi.data chat`: from files of any kind to shards, with counts of what was lost and why."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from texts import random_texts

from yaongi.data.__main__ import main
from yaongi.data.chats.encode import encode_chat
from yaongi.data.chats.rows import ChatRows, PreferenceRows
from yaongi.data.sources.row_sources import open_row_sources
from yaongi.data.stages.tokenize_chats import ChatOptions, tokenize_chats
from yaongi.data.tokenizer import Tokenizer


def exchange(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def exchanges(count: int) -> list[dict[str, Any]]:
    """Return rows of which no two are alike."""
    return [exchange(f"{n} {text}?", text[:20]) for n, text in enumerate(random_texts(5, count, words=6))]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def build(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """Return a function that writes sources into `tmp_path/chat`, and gives the manifest and what was said."""

    def built(*sources: Path, workers: int = 1, **options: Any) -> tuple[dict[str, Any], list[str]]:
        said: list[str] = []
        opened = open_row_sources([str(source) for source in sources])
        out = tmp_path / "chat"
        return tokenize_chats(opened, tokenizer, out, ChatOptions(**options), workers=workers, say=said.append), said

    return built


Build = Callable[..., tuple[dict[str, Any], list[str]]]


def contents(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of a split's conversations."""
    conversations = ChatRows(folder, split, 4096).conversations
    return [tokenizer.decode(conversations.read(n).ids.tolist()) for n in range(len(conversations))]


def test_as_a_person_uses_it(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = exchanges(40)
    rows[1]["messages"].append({"role": "user", "content": "그리고?"})
    tokenizer.save(tmp_path / "tokenizer")
    arguments = ["chat", "--source", str(write_rows(tmp_path / "a.jsonl", rows)), "--val", "0.2", "--workers", "1"]
    arguments += ["--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "chat"), "--row-tokens", "1k"]
    monkeypatch.setattr(sys, "argv", ["yaongi.data", *arguments, "--show", "2"])
    main()
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["conversations", "turns", "targets"] in lines
    assert ["lost,", "after", "the", "last", "answer", "0", "1", "0"] in lines
    assert said.count("⟦") == said.count("<|im_end|>⟧") == 2
    rows_read = ChatRows(tmp_path / "chat", "train", 1000, tokenizer_hash=tokenizer.hash)
    held_out = ChatRows(tmp_path / "chat", "val", 1000)
    assert len(rows_read.conversations) + len(held_out.conversations) == 40
    assert 2 <= len(held_out.conversations) <= 20
    first = rows_read.conversations.read(0)
    assert first.ids.tolist() in [encode_chat(row["messages"][:2], tokenizer).ids for row in rows]
    main()
    assert "up to date" in capsys.readouterr().out


def test_every_kind_of_file_and_a_folder_with_splits(tokenizer: Tokenizer, tmp_path: Path, build: Build) -> None:
    rows = exchanges(12)
    train, val = tmp_path / "data" / "train", tmp_path / "data" / "val"
    write_rows(train / "a.jsonl", rows[:2])
    (train / "b.json").write_text(json.dumps(rows[2:4]))
    (train / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[4]).encode()))
    parquet.write_table(pyarrow.Table.from_pylist(rows[5:8]), train / "d.parquet")
    write_rows(val / "a.jsonl", rows[8:9])
    table = tmp_path / "e.csv"
    table.write_text('instruction,input,output\n"하나, 둘",,셋\n넷,다섯,여섯\n')
    manifest, _ = build(tmp_path / "data", table, held_out=0.0)
    written = contents(tmp_path / "chat", "train", tokenizer)
    assert [text.split("\n")[1].partition("<|im_end|>")[0] for text in written] == [
        *(row["messages"][0]["content"] for row in rows[:8]),
        "하나, 둘",
        "넷",
    ]
    assert written[-1].startswith("<|im_start|>user\n넷\n다섯<|im_end|>")
    assert len(contents(tmp_path / "chat", "val", tokenizer)) == 1
    assert manifest["counts"]["kept, train"]["conversations"] == 10


def test_the_counts_add_up(tmp_path: Path, build: Build) -> None:
    rows = exchanges(30)
    rows[3]["messages"][1]["content"] = ""
    rows[4]["messages"] = rows[4]["messages"][:1]
    rows[5]["messages"] += [{"role": "user", "content": "다시"}, {"role": "assistant", "content": "길다 " * 90}]
    rows[6]["messages"][0]["content"] = "길다 " * 90
    open_end = {"messages": [*rows[1]["messages"], {"role": "user", "content": "그래서?"}]}
    read = [*rows, rows[0], open_end]  # the last is a duplicate, as what nobody answers goes
    manifest, said = build(write_rows(tmp_path / "a.jsonl", read), row_tokens=128, held_out=0.3)
    counts = manifest["counts"]
    assert {name: count["conversations"] for name, count in counts.items() if name.startswith("lost")} == {
        "lost, after the last answer": 0,
        "lost, duplicate": 2,
        "lost, empty answer": 1,
        "lost, no answer": 1,
        "lost, too long": 1,
    }
    assert counts["lost, too long"]["turns"] == 4
    assert counts["read"]["conversations"] == 32
    assert counts["read"]["turns"] == sum(len(row["messages"]) for row in read)
    for column in ("conversations", "turns", "targets"):
        assert counts["read"][column] == sum(count[column] for name, count in counts.items() if name != "read")
    targets = sum(ChatRows(tmp_path / "chat", split, 128).targets for split in ("train", "val"))
    assert targets == counts["kept, train"]["targets"] + counts["kept, val"]["targets"]
    assert any(line.startswith("warning:") and "too long" in line for line in said)


def test_little_lost_is_no_warning(tmp_path: Path, build: Build) -> None:
    _, said = build(write_rows(tmp_path / "a.jsonl", exchanges(30)), held_out=0.3)
    assert not any("warning" in line for line in said)
    _, said = build(tmp_path / "a.jsonl", held_out=0.0)
    assert any("no conversations are held out" in line for line in said)


def test_too_long_can_be_an_error(tmp_path: Path, build: Build) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*exchanges(2), exchange("길다 " * 90, "x")])
    with pytest.raises(ValueError, match=r"chat: .*a.jsonl, row 2: a conversation must fit into 128 tokens") as caught:
        build(path, row_tokens=128, too_long="error")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "chat").exists()


def test_what_asks_the_same_is_in_one_split(tokenizer: Tokenizer, tmp_path: Path, build: Build) -> None:
    """So is what differs in blanks, in the form of its syllables, or in later turns."""
    rows = []
    for n, row in enumerate(exchanges(60)):
        question = row["messages"][0]["content"]
        rows += [row, exchange(f" {question.replace(' ', '  ')}\n", f"다른 답 {n}"), exchange(question, f"또 다른 {n}")]
        rows[-1]["messages"] += [{"role": "user", "content": f"이어서 {n}"}, {"role": "assistant", "content": "네"}]
    build(write_rows(tmp_path / "a.jsonl", rows), held_out=0.3)
    questions = {}
    for split in ("train", "val"):
        texts = contents(tmp_path / "chat", split, tokenizer)
        questions[split] = {" ".join(text.split("<|im_end|>")[0].split()) for text in texts}
    assert sum(map(len, questions.values())) == 60
    assert min(map(len, questions.values())) > 5


def test_what_is_held_out_as_a_whole_is_not_trained_on(tokenizer: Tokenizer, tmp_path: Path, build: Build) -> None:
    rows = exchanges(6)
    write_rows(tmp_path / "d" / "train" / "a.jsonl", rows[:4])
    write_rows(tmp_path / "d" / "val" / "a.jsonl", rows[3:5])
    manifest, _ = build(write_rows(tmp_path / "first.jsonl", rows[4:]), tmp_path / "d", held_out=0.0)
    assert manifest["counts"]["lost, duplicate"]["conversations"] == 2
    assert len(contents(tmp_path / "chat", "val", tokenizer)) == 2
    assert len(contents(tmp_path / "chat", "train", tokenizer)) == 4


def test_benchmarks_are_left_out_of_training(tokenizer: Tokenizer, tmp_path: Path, build: Build) -> None:
    quoted = random_texts(9, 1, words=30)[0]
    rows = [*exchanges(5), exchange("질문", f"답은 {quoted} 입니다")]
    benchmark = tmp_path / "benchmark.txt"
    benchmark.write_text(" ".join(quoted.split()[8:24]))
    source = write_rows(tmp_path / "a.jsonl", rows)
    manifest, said = build(source, held_out=0.0, benchmarks=(str(benchmark),))
    assert manifest["counts"]["lost, quotes a benchmark"]["conversations"] == 1
    assert not any("NOT dropped" in line for line in said)
    assert len(contents(tmp_path / "chat", "train", tokenizer)) == 5
    manifest, said = build(source, held_out=0.0)
    assert "lost, quotes a benchmark" not in manifest["counts"]
    assert any("NOT dropped" in line for line in said)


def test_the_number_of_processes_changes_nothing(tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yaongi.data.stages.tokenize_chats._BATCH_ROWS", 8)
    path = write_rows(tmp_path / "a.jsonl", [*exchanges(50), *exchanges(10)])
    one, _ = build(path, held_out=0.2, shard_tokens=500)
    (tmp_path / "chat").rename(tmp_path / "one")
    two, _ = build(path, held_out=0.2, shard_tokens=500, workers=2)
    assert one == two
    assert len(one["splits"]["train"]["chat"]["shards"]) > 1


def test_preferences(tokenizer: Tokenizer, tmp_path: Path, build: Build) -> None:
    rows = [{"prompt": f"질문 {n}", "chosen": f"네 {n}입니다", "rejected": f"응 {n}"} for n in range(20)]
    rows[5]["rejected"] = rows[5]["chosen"]
    manifest, _ = build(write_rows(tmp_path / "a.jsonl", [*rows, rows[0]]), held_out=0.2)
    assert manifest["counts"]["lost, chosen is rejected"]["conversations"] == 1
    assert manifest["counts"]["lost, duplicate"]["conversations"] == 1
    parts = [PreferenceRows(tmp_path / "chat", split) for split in ("train", "val")]
    assert sum(part.pairs for part in parts) == 19
    for number in range(parts[0].pairs):
        chosen, rejected = (tokenizer.decode(c.ids[c.mask].tolist()) for c in parts[0].pair(number))
        assert chosen.replace("네", "응").replace("입니다", "") == rejected
    with pytest.raises(ValueError, match="--train-on must be answers for preferences, got last"):
        build(tmp_path / "a.jsonl", train_on="last")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [*exchanges(1), {"prompt": "q", "completion": "a"}],
            "row 1: a file must hold rows of one format, messages, got",
        ),
        ([*exchanges(1), {"text": "x"}], "row 1: a row must have one of: .*, got text"),
        ([{"messages": [{"role": "bot", "content": "x"}]}], "row 0: role must be one of system, .*, got 'bot'"),
        ([*exchanges(1), {"messages": [{"role": "user", "content": 1}]}], "row 1: content must be text or .*, got int"),
        (
            [{"messages": [{"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "x"}]}],
            "row 0: text: must hold no lone surrogates",
        ),
        ([exchange("q", "")], "sources must hold conversations to learn from, got none: 1 empty answer"),
        ([], "sources must hold rows, got none"),
        (exchanges(3), "sources must hold conversations to learn from, got none: 3 held out"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_is_wrong_names_file_and_row(tmp_path: Path, build: Build, rows: list[Any], words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=words) as caught:
        build(path, held_out=0.9999)
    assert "\n" not in str(caught.value)
    assert not words.startswith("row ") or f"{path}, row" in str(caught.value)
    assert not (tmp_path / "chat").exists()


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "d" / "a.jsonl", exchanges(2))
    (tmp_path / "d" / "b.csv").write_text("instruction,output\nq,a\n")
    said: list[str] = []
    (source,) = open_row_sources([str(tmp_path / "d")], say=said.append)
    assert [Path(file.name).name for file in source.files] == ["a.jsonl"]
    assert said == ["left out 1 file: b.csv (a table: read if it is named itself)"]


def test_options_and_sources_that_do_not_fit(tmp_path: Path, build: Build) -> None:
    path = write_rows(tmp_path / "a.jsonl", exchanges(2))
    pairs = write_rows(tmp_path / "b.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    for wrong, words in (
        (lambda: build(path, pairs), "b.jsonl, row 0: must be chat, as the first row is, got preference"),
        (lambda: build(path, held_out=1.0), "--val must be a share from 0 to 1, got 1"),
        (lambda: build(path, row_tokens=4), "--row-tokens must be 8 or more, got 4"),
        (lambda: open_row_sources([]), "--source must be given: .*, got none"),
        (lambda: open_row_sources(["hf:x"]), "source must be hf:OWNER/NAME, .*, got 'hf:x'"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    with pytest.raises(FileNotFoundError, match="no such source: nowhere"):
        open_row_sources(["nowhere"])


def test_a_data_set_of_the_hub(tokenizer: Tokenizer, tmp_path: Path, build: Build) -> None:
    """From a mirror: its split train, or another one that is named."""
    pytest.importorskip("datasets")
    folder = tmp_path / "mirror" / "me" / "talks"
    rows = exchanges(5)
    write_rows(folder / "train.jsonl", rows[:3])
    write_rows(folder / "test.jsonl", rows[3:])
    for spec, wanted in (("hf:me/talks", 3), ("hf:me/talks:default:test", 2)):
        (source,) = open_row_sources([spec], mirror=tmp_path / "mirror")
        tokenize_chats([source], tokenizer, tmp_path / "chat", ChatOptions(held_out=0), workers=1, say=lambda _: None)
        assert len(contents(tmp_path / "chat", "train", tokenizer)) == wanted
    with pytest.raises(ValueError, match="the split of me/talks must be one of train, test, got dev"):
        open_row_sources(["hf:me/talks::dev"], mirror=tmp_path / "mirror")


def test_the_package_s_conversations_fill_their_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    said: list[str] = []
    sources = open_row_sources(["embedded:instructions:1500"])
    manifest = tokenize_chats(sources, tokenizer, tmp_path / "chat", ChatOptions(), workers=1, say=said.append)
    assert not any(name.startswith("lost") for name in manifest["counts"])
    assert not any("warning" in line for line in said)
    rows = ChatRows(tmp_path / "chat", "train", 1024)
    assert len(rows.conversations) == 1500
    assert rows.fill > 0.97
    assert len(ChatRows(tmp_path / "chat", "val", 1024).conversations) == 75
