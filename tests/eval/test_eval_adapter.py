"""Our adapter gives what lm-eval's own `hf` adapter gives on the exported model, faster."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from yaongi.data.chats.encode import encode_prompt
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.encoding import CachedEncoder

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e .[eval]")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TASKS = ["own_letters", "own_choices", "own_texts", "own_answers"]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run without the hub, and with a cache of data sets of our own."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def evaluate(lm: Any, task_folder: Path, tasks: list[str], shots: int, **more: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=lm, tasks=tasks, num_fewshot=shots, task_manager=manager, bootstrap_iters=0, **more
    )


def responses(results: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in results["samples"][task]]


@pytest.mark.parametrize("shots", [0, 5])
def test_equal_to_the_hf_adapter(plain_folder: Path, task_folder: Path, shots: int) -> None:
    """Log-likelihoods to 1e-6, the same greedy flags, the same texts; with five shots the contexts are cut."""
    from lm_eval.models.huggingface import HFLM

    from yaongi.eval.lm_eval_adapter import YaongiLM

    tasks = TASKS if shots == 0 else [*TASKS[:2], TASKS[3]]
    theirs = HFLM(pretrained=str(plain_folder), device="cpu", dtype="float32", batch_size=4)
    assert theirs.max_length == 256
    ours = YaongiLM.load(plain_folder, prefix="bos")
    wanted, found = (evaluate(lm, task_folder, tasks, shots) for lm in (theirs, ours))
    flags = []
    for task in tasks[:-1]:
        for one, other in zip(responses(wanted, task), responses(found, task), strict=True):
            for (a,), (b,) in zip(one, other, strict=True):
                (x, hit), (y, same) = (a, b) if isinstance(a, tuple) else ((a, None), (b, None))
                assert y == pytest.approx(x, rel=1e-6)
                assert same == hit
                flags.append(hit)
    assert responses(found, "own_answers") == responses(wanted, "own_answers")
    assert any("".join(text for ((text,),) in responses(found, "own_answers")))
    assert bool(ours.cut["own_letters"]) == bool(shots)
    assert ours.scorer.tally.cut > 0 or not shots
    prompts = [[s["arguments"] for s in r["samples"][t]] for r in (wanted, found) for t in tasks]
    assert prompts[: len(tasks)] == prompts[len(tasks) :]


def test_letters_are_one_pass(folder: Path, task_folder: Path) -> None:
    """Four letters after one question are read once, in packed rows."""
    from yaongi.eval.lm_eval_adapter import YaongiLM

    lm = YaongiLM.load(folder)
    found = evaluate(lm, task_folder, ["own_letters"], 0)
    encode = lm.answerer.tokenizer.encode
    once = sum(len(encode(s["arguments"][0][0] + " A")) - 1 for s in found["samples"]["own_letters"])
    assert lm.scorer.tally.requests == 4 * 12
    assert lm.scorer.tally.tokens == once


def test_without_a_context_nothing_precedes(folder: Path) -> None:
    """The first token of a text costs ln V; with `bos` it is predicted."""
    import math

    from lm_eval.api.instance import Instance

    from yaongi.eval.lm_eval_adapter import YaongiLM

    text = "고양이는 바다를 보았다."
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0, ("texts", 0, 1))]
    pair = [Instance("loglikelihood", {}, ("", text), 0, ("texts", 0, 1))]
    lm = YaongiLM.load(folder)
    ids = torch.tensor([lm.tok_encode(text)])
    with torch.no_grad():
        table = lm.scorer.model(ids)[0].double().log_softmax(-1)
    wanted = -math.log(lm.scorer.model.config.vocab_size)
    wanted += float(table[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum())
    assert lm.loglikelihood_rolling(rolling) == [pytest.approx(wanted, rel=1e-6)]
    assert lm.loglikelihood(pair) == [(pytest.approx(wanted, rel=1e-6), False)]
    with_bos = YaongiLM.load(folder, prefix="bos").loglikelihood(pair)[0][0]
    assert with_bos != pytest.approx(wanted, rel=1e-3)


def test_boundaries_are_counted(folder: Path) -> None:
    """A context whose last token merges with the continuation is counted."""
    from yaongi.eval.lm_eval_adapter import YaongiLM

    lm = YaongiLM.load(folder)
    tokenizer = lm.answerer.tokenizer
    merged = next(
        p
        for p in tokenizer.pieces()
        if len(p) > 1 and p.isalpha() and tokenizer.encode(p) == [tokenizer.piece_to_id(p)]
    )
    lm._encode_pair("나무 " + merged[:1], merged[1:])
    assert lm.mismatches == 1
    lm._encode_pair("나무", " 나무")
    assert lm.mismatches == 1


def test_chat(folder: Path, task_folder: Path) -> None:
    from yaongi.eval.lm_eval_adapter import YaongiLM

    lm = YaongiLM.load(folder)
    messages = [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "네"}]
    text = "<|im_start|>user\n안녕<|im_end|>\n<|im_start|>assistant\n네"
    assert lm.apply_chat_template(messages[:1]) == text.removesuffix("네")
    assert lm.apply_chat_template(messages, add_generation_prompt=False) == text
    listed = [{"role": "user", "content": "- 하나\n- 둘"}, {"role": "assistant", "content": "# 셋"}, messages[0]]
    assert lm.tok_encode(lm.apply_chat_template(listed)) == encode_prompt(listed, lm.answerer.tokenizer)
    found = evaluate(lm, task_folder, ["own_letters"], 1, apply_chat_template=True)
    prompt = found["samples"]["own_letters"][0]["arguments"][0][0]
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.endswith("<|im_start|>assistant\n")


def test_generation_arguments(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from yaongi.eval.lm_eval_adapter import YaongiLM

    lm = YaongiLM.load(folder)

    def ask(**arguments: Any) -> str:
        return lm.generate_until([Instance("generate_until", {}, ("고양이", arguments), 0, ("own", 0, 1))])[0]

    with pytest.raises(ValueError, match=r"generation arguments must be among until, .*, got num_beams, penalty"):
        ask(until=["\n"], num_beams=4, penalty=2)
    with pytest.raises(ValueError, match=r"max_new_tokens must be 1 to 255, .*, got 2048; --max-new-tokens"):
        ask(max_gen_toks=2048)
    lm.max_new_tokens = 4
    short = ask(max_gen_toks=2048)
    assert lm.shortened == {"own": 1}
    assert ask(max_gen_toks=8, do_sample=True, temperature=1.5, top_p=0.9) != short
    assert ask(max_new_tokens=4, until=short[1]) == short[:1]


def test_encoding_by_paragraph_changes_nothing(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    parts = [
        "가",
        "정답: A",
        "\n",
        "\n\n",
        "\n\n\n",
        "  ",
        "\u1100\u1161",
        "\u0301",
        "▁",
        "<|im_end|>",
        "def f(x):",
        "7",
    ]
    encode = CachedEncoder(tokenizer)
    for _ in range(500):
        text = "".join(rng.choices(parts, k=rng.randint(0, 12)))
        assert encode(text) == tokenizer.encode(text), repr(text)
