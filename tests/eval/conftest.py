"""A tokenizer and model folders for all tests of evaluation, and local tasks for lm-eval."""

import json
import random
from pathlib import Path

import pytest
import torch

from yaongi.data.sources.embedded.korean import korean_documents
from yaongi.data.tokenizer import Tokenizer, train_tokenizer
from yaongi.model import EngramConfig, ModelConfig, Yaongi

NOUNS = ("고양이", "서울", "바다", "나무", "학교", "책", "달", "별", "물", "집")
LETTERS = "ABCD"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return a tokenizer of Korean, with 1,024 pieces."""
    return train_tokenizer(list(korean_documents(0, 120)), 1024, say=lambda _: None)


def make_model(tokenizer: Tokenizer, folder: Path, *, engram: bool) -> Path:
    """Write a model with random weights, large enough to prefer something, and its tokenizer."""
    config = ModelConfig(
        pattern="MEM*ME",
        hidden_size=32,
        vocab_size=tokenizer.vocab_size,
        mamba_heads=4,
        mamba_head_dim=8,
        mamba_groups=2,
        mamba_state=8,
        attention_heads=4,
        attention_kv_heads=2,
        attention_head_dim=8,
        experts=4,
        experts_per_token=2,
        expert_size=16,
        shared_expert_size=16,
        max_sequence_length=256,
        engram=(EngramConfig(layer=1, heads=2, head_dim=8, rows=50, orders=(2, 3)),) if engram else (),
    )
    model = Yaongi(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        # No byte is the likeliest token: bytes that are not UTF-8 are decoded in another way by transformers.
        model.lm_head.weight[[i for i in range(tokenizer.vocab_size) if tokenizer.is_byte(i)]] = 0
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def plain_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that transformers reads."""
    return make_model(tokenizer, tmp_path_factory.mktemp("plain") / "model", engram=False)


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with Engram."""
    return make_model(tokenizer, tmp_path_factory.mktemp("engram") / "model", engram=True)


def questions(rng: random.Random, count: int) -> list[dict[str, object]]:
    """Return questions of four choices, as lines of a data set."""
    found: list[dict[str, object]] = []
    for _ in range(count):
        a, b = rng.randint(1, 60), rng.randint(1, 60)
        choices = [a + b, a + b + 1, a + b + 2, a + 2 * b + 3]
        rng.shuffle(choices)
        text = f"{rng.choice(NOUNS)}: {a}개와 {b}개는 모두 몇 개인가? "
        found.append(
            {"question": text, "answer": choices.index(a + b)} | dict(zip(LETTERS, map(str, choices), strict=True))
        )
    return found


CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/test.jsonl, dev: {folder}/dev.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: dev
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{A}}}}\\nB. {{{{B}}}}\\nC. {{{{C}}}}\\nD. {{{{D}}}}\\n정답："
doc_to_choice: {choices}
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {{version: 2.0}}
"""
ROLLING = """
task: own_texts
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/texts.jsonl}}
output_type: loglikelihood_rolling
test_split: test
num_fewshot: 0
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
ANSWERS = """
task: own_answers
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/test.jsonl, dev: {folder}/dev.jsonl}}
output_type: generate_until
test_split: test
fewshot_split: dev
doc_to_text: "{{{{question.strip()}}}}\\n답:"
doc_to_target: "{{{{[A, B, C, D][answer]}}}}"
generation_kwargs: {{until: ["\\n", "다"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
GROUP = """
group: own_group
task: [own_letters, own_choices]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""
CODE = ANSWERS.replace("own_answers", "own_code").replace("output_type", "unsafe_code: true\noutput_type")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tasks with data beside them: letters, choices of several tokens, texts, and answers."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(3)
    texts = [" ".join(rng.choice(NOUNS) for _ in range(40 if i % 2 else 320)) for i in range(4)]
    for name, lines in {
        "dev": questions(rng, 5),
        "test": questions(rng, 12),
        "texts": [{"text": text} for text in texts],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    letters, choices = '["A", "B", "C", "D"]', '"{{[A, B, C, D]}}"'
    (folder / "letters.yaml").write_text(CHOICE.format(name="own_letters", folder=folder, choices=letters))
    (folder / "choices.yaml").write_text(CHOICE.format(name="own_choices", folder=folder, choices=choices))
    for name, text in {"texts": ROLLING, "answers": ANSWERS, "group": GROUP, "code": CODE}.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder
