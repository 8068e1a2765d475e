"""Conversations for a model of a few thousand parameters, and the command line that tunes it on them."""

import random
from pathlib import Path

import numpy as np

from yaongi.data.chats.encode import encode_chat, encode_prompt
from yaongi.data.chats.rows import CHAT, PREFERENCES
from yaongi.data.shards import ShardWriter
from yaongi.data.stages.shard_folder import write_description
from yaongi.data.tokenizer import Tokenizer

LETTERS = "가나다라마바사아"


def talk(rng: random.Random) -> list[dict[str, str]]:
    """Return an exchange or two: a letter is asked for, and given."""
    messages = []
    for _ in range(rng.choice((1, 1, 2))):
        letter = rng.choice(LETTERS)
        messages += [{"role": "user", "content": letter}, {"role": "assistant", "content": letter}]
    return messages


def write_chats(folder: Path, tokenizer: Tokenizer, train: int = 60, val: int = 12) -> Path:
    """Write conversations, and return their folder."""
    rng, splits = random.Random(0), {}
    for split, count in (("train", train), ("val", val)):
        writer = ShardWriter(folder, f"{split}/{CHAT}", "own", "none", 10**6, tokenizer.vocab_size)
        for _ in range(count):
            ids, mask = encode_chat(talk(rng), tokenizer)
            writer.add(np.array(ids, np.int32), 1, np.array(mask))
        writer.close()
        splits[split] = {CHAT: writer.shards}
    header = encode_prompt([{"role": "user", "content": ""}], tokenizer)[-3:]
    write_description(folder, tokenizer, splits, kind=CHAT, answer_header=header)
    return folder


def write_preferences(folder: Path, tokenizer: Tokenizer, train: int = 60, val: int = 12) -> Path:
    """Write pairs in which the letter that was asked for is preferred to another, and return their folder."""
    rng, splits = random.Random(0), {}
    for split, count in (("train", train), ("val", val)):
        writer = ShardWriter(folder, f"{split}/{PREFERENCES}", "own", "none", 10**6, tokenizer.vocab_size)
        for _ in range(count):
            question, other = rng.sample(LETTERS, 2)
            for answer in (question, other):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                ids, mask = encode_chat(messages, tokenizer)
                writer.add(np.array(ids, np.int32), 1, np.array(mask))
        writer.close()
        splits[split] = {PREFERENCES: writer.shards}
    write_description(folder, tokenizer, splits, kind=PREFERENCES)
    return folder


def arguments(model: Path, chats: Path, out: Path, *more: str) -> list[str]:
    """Return the command line of a tuning of a few steps."""
    given = {
        "--init": model,
        "--data": chats,
        "--out": out,
        "--row-tokens": 64,
        "--batch-tokens": 256,
        "--evaluate-every": 4,
        "--evaluate-rows": 2,
        "--stop-prompts": 3,
        "--answer-tokens": 4,
        "--sample-tokens": 2,
        "--checkpoint-every": 3,
        "--wandb": "off",
    }
    return [*(str(part) for pair in given.items() for part in pair), "--no-tensorboard", *more]
