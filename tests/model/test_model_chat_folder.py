"""The folder of a model that was tuned on chats: transformers asks, stops and answers as we do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import ENGRAM, roughened, small_config
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from yaongi.data.chats.encode import encode_prompt
from yaongi.data.pieces import END_OF_TURN, START_OF_TURN
from yaongi.data.tokenizer import Tokenizer, train_tokenizer
from yaongi.model import Yaongi, compression_map
from yaongi.model.generation import generate

CONTENTS = ("- aq\n- qa", "bq", "user\n# z\n\nuser\n- x")
MOST = 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = [f"{a}{b}\n- {b}{a}\n# user" for a in "abcdefghijklmnop" for b in "qrstuvwxyz"]
    return train_tokenizer([" ".join(words)] * 20, 512)


def talk(content: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "sa"}, {"role": "user", "content": content}]


def tuned(tokenizer: Tokenizer, folder: Path, **changes: Any) -> Yaongi:
    """Write a model whose first answer ends by itself, with a tokenizer for chat, and return it."""
    end = tokenizer.piece_to_id(END_OF_TURN)
    config = small_config(expert_size=16, vocab_size=512, max_sequence_length=300, stop_token_ids=(end,), **changes)
    model = roughened(Yaongi(config, compression=compression_map(tokenizer.pieces()))).eval()
    with torch.no_grad():
        model.lm_head.weight[[0, 1, 2, 3, tokenizer.piece_to_id(START_OF_TURN), end]] = 0  # never the likeliest
        (answer,) = generate(model, [encode_prompt(talk(CONTENTS[0]), tokenizer)], max_new_tokens=4, stop=())
        model.lm_head.weight[end] = 1.5 * model.lm_head.weight[answer[3]]  # now said in its place
    model.save_pretrained(folder)
    tokenizer.save(folder, chat=True)
    return model


@pytest.fixture(scope="module", params=["nemotron_h", "yaongi"])
def folder(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    tuned(tokenizer, folder, engram=(ENGRAM,) if request.param == "yaongi" else ())
    return folder


@pytest.fixture(autouse=True)
def modules_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let transformers copy remote code to a folder of the test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))


def test_transformers_asks_and_stops_as_we_do(folder: Path, tokenizer: Tokenizer) -> None:
    ours = Yaongi.from_pretrained(folder)
    fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    end = tokenizer.piece_to_id(END_OF_TURN)
    assert set(theirs.generation_config.eos_token_id) == {end, tokenizer.eos_id} == set(ours.config.answer_ends)
    assert fast.eos_token_id == end
    ended = []
    for content in CONTENTS:
        prompt = encode_prompt(talk(content), tokenizer)
        asked = fast.apply_chat_template(
            talk(content), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert asked["input_ids"].tolist() == [prompt]
        found = theirs.generate(**asked, max_new_tokens=MOST, do_sample=False)[0, len(prompt) :].tolist()
        (wanted,) = generate(ours, [prompt], max_new_tokens=MOST)
        assert found[: len(wanted)] == wanted
        assert found[len(wanted) :] in ([], [end])
        ended.append(found[-1] == end)
    assert ended[0], "the first answer ends by itself"


def test_a_padded_batch_is_each_alone(folder: Path, tokenizer: Tokenizer) -> None:
    ours, fast = Yaongi.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    asked = fast.apply_chat_template(
        [talk(content) for content in CONTENTS],
        **{"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True},
    )
    found = theirs.generate(**asked, max_new_tokens=MOST, do_sample=False)[:, asked["input_ids"].shape[1] :]
    wanted = generate(ours, [encode_prompt(talk(content), tokenizer) for content in CONTENTS], max_new_tokens=MOST)
    assert fast.batch_decode(found, skip_special_tokens=True) == [tokenizer.decode(answer) for answer in wanted]


def test_a_pipeline_takes_messages(folder: Path, tokenizer: Tokenizer) -> None:
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    (wanted,) = generate(
        Yaongi.from_pretrained(folder), [encode_prompt(talk(CONTENTS[0]), tokenizer)], max_new_tokens=MOST
    )
    found = pipe(talk(CONTENTS[0]), max_new_tokens=MOST, do_sample=False)[0]["generated_text"]
    assert found[-1] == {"role": "assistant", "content": tokenizer.decode(wanted)}
