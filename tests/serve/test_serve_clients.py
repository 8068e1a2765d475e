"""Programs that speak OpenAI's protocol: lm-eval's clients, and LogicKor's judge."""

import itertools
from pathlib import Path

import httpx
import pytest
import torch

from yaongi.data.chats.encode import encode_prompt
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.logickor.judge import Judge
from yaongi.model import Yaongi
from yaongi.model.generation import generate

lm_eval_clients = pytest.importorskip("lm_eval.models.openai_completions", reason="needs lm-eval")
CONTEXTS = ["고양이는 나무 아래에", "바다로 가는 길에서", "나는 오늘 학교에서", "물음: 하나에 둘을 더하면?\n답:"]
CHOICES = [" 있다.", " 없다", " A", " 책"]


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what transformers reads."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


def until(model: Yaongi, tokenizer: Tokenizer, prompt: list[int], stop: str) -> str:
    """Return the greedy answer up to a stop string."""
    return tokenizer.decode(generate(model, [prompt], max_new_tokens=20)[0]).split(stop)[0]


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"num_concurrent": 4}], ids=["single", "batch", "async"])
def test_lm_eval_s_completions(
    client: httpx.Client, model: Yaongi, tokenizer: Tokenizer, tokenizer_folder: Path, options: dict[str, int]
) -> None:
    """Likelihoods of choices, and answers, are the model's."""
    from lm_eval.api.instance import Instance

    lm = lm_eval_clients.LocalCompletionsAPI(
        base_url=f"{client.base_url}/v1/completions",
        model="small",
        tokenizer=str(tokenizer_folder),
        max_length=200,
        max_retries=1,
        **options,
    )
    pairs = list(itertools.product(CONTEXTS, CHOICES))
    found = lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    for (context, choice), (score, greedy) in zip(pairs, found, strict=True):
        ids, before = tokenizer.encode(context + choice), len(tokenizer.encode(context))
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
        wanted = sum(float(logprobs[place - 1, ids[place]]) for place in range(before, len(ids)))
        assert score == pytest.approx(wanted, abs=1e-3)
        assert greedy == all(int(logprobs[place - 1].argmax()) == ids[place] for place in range(before, len(ids)))
    settings = {"until": ["다", "\n\n"], "max_gen_toks": 20, "do_sample": False}
    asked = [Instance("generate_until", {}, (context, settings), i) for i, context in enumerate(CONTEXTS)]
    for context, answer in zip(CONTEXTS, lm.generate_until(asked, disable_tqdm=True), strict=True):
        assert answer == until(model, tokenizer, tokenizer.encode(context), "다")


def test_lm_eval_s_chats(client: httpx.Client, model: Yaongi, tokenizer: Tokenizer) -> None:
    from lm_eval.api.instance import Instance

    lm = lm_eval_clients.LocalChatCompletion(
        base_url=f"{client.base_url}/v1/chat/completions", model="small", max_retries=1
    )
    settings = {"until": ["다"], "max_gen_toks": 20}
    talks = [[{"role": "system", "content": "짧게."}, {"role": "user", "content": context}] for context in CONTEXTS]
    asked = [
        Instance("generate_until", {}, (lm.apply_chat_template(talk), settings), i) for i, talk in enumerate(talks)
    ]
    for talk, answer in zip(talks, lm.generate_until(asked, disable_tqdm=True), strict=True):
        assert answer == until(model, tokenizer, encode_prompt(talk, tokenizer), "다")


def test_logickor_s_judge(client: httpx.Client, model: Yaongi, tokenizer: Tokenizer) -> None:
    """It asks without a limit, greedily."""
    talk = [{"role": "user", "content": "평가하라: 고양이"}]
    said = Judge(f"{client.base_url}/v1", "small").ask(talk)
    prompt = encode_prompt(talk, tokenizer)
    assert said == tokenizer.decode(generate(model, [prompt], max_new_tokens=256 - len(prompt))[0])
