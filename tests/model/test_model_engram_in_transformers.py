"""A model with Engram in transformers, loaded by `trust_remote_code`, behaves as any causal language model does."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from model_support import ENGRAM, roughened, small_config
from oracle import assert_equal_to_float64
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from yaongi.data.tokenizer import Tokenizer, train_tokenizer
from yaongi.model import EngramConfig, Yaongi, compression_map
from yaongi.model.generation import generate

Tensor = torch.Tensor
NEAR = 1e-5  # relative, float32
ENGRAMS = [ENGRAM, EngramConfig(layer=3, heads=2, head_dim=4, rows=70, orders=(2, 3, 4), gate="demo")]
TEXTS = ["aq qa", "bq ar sb cq tc", "z"]
LONGEST = 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = [f"{a}{b} {b}{a}" for a in "abcdefghijklmnop" for b in "qrstuvwxyz"]
    return train_tokenizer([" ".join(words)] * 20, 512)


@pytest.fixture(scope="module")
def ours(tokenizer: Tokenizer) -> Yaongi:
    config = small_config(engram=ENGRAMS, vocab_size=512, max_sequence_length=300)
    return roughened(Yaongi(config, compression=compression_map(tokenizer.pieces()))).eval()


@pytest.fixture(scope="module")
def folder(ours: Yaongi, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    ours.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let transformers copy remote code to a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules") / "cache")
        )
        yield


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def fast(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(4, 512, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(side: str, ours: Yaongi, theirs: Any, fast: Any) -> None:
    batch = fast(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    assert not batch["attention_mask"].all()
    for use_cache in (False, True):
        logits = theirs(**batch, use_cache=use_cache).logits
        for text, row, mask in zip(TEXTS, logits, batch["attention_mask"].bool(), strict=True):
            alone = ours(torch.tensor([fast(text)["input_ids"]]))[0]
            assert_equal_to_float64(row[mask], alone, NEAR, text)


@torch.no_grad()
def test_padding_on_both_sides_and_within_and_empty_rows(ours: Yaongi, theirs: Any) -> None:
    ids = ids_of(3, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0], [1] * 9, [0] * 9])
    logits = theirs(input_ids=ids, attention_mask=mask).logits
    assert_equal_to_float64(logits[0, 2:6], ours(ids[:1, 2:6])[0], NEAR)
    assert_equal_to_float64(logits[1], ours(ids[1:2])[0], NEAR)
    assert logits.isfinite().all()
    mask[1, 4:6] = 0
    found = theirs(input_ids=ids, attention_mask=mask).logits[1]
    wanted = ours(torch.cat([ids[1:2, :4], ids[1:2, 6:]], dim=1))[0]
    assert_equal_to_float64(found[[0, 1, 2, 3, 6, 7, 8]], wanted, NEAR)


@torch.no_grad()
def test_the_cache_continues_by_one_token_and_by_several(ours: Yaongi, theirs: Any) -> None:
    ids = ids_of(2, 30)
    full = ours(ids)
    first = theirs(input_ids=ids[:, :7], use_cache=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == 7
    parts = [first.logits]
    for start, end in ((7, 8), (8, 15), (15, 16), (16, 30)):
        parts.append(theirs(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True).logits)
    assert_equal_to_float64(torch.cat(parts, dim=1), full, NEAR)
    kept = theirs(input_ids=ids, logits_to_keep=3).logits
    assert_equal_to_float64(kept, full[:, -3:], NEAR)


def test_labels_are_shifted_and_may_have_no_target(ours: Yaongi, theirs: Any) -> None:
    ids = ids_of(2, 12)
    labels = ids.clone()
    labels[0, 3:7] = -100
    labels[1, :] = -100
    loss = theirs(input_ids=ids, labels=labels).loss
    wanted = F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_equal_to_float64(loss, wanted, NEAR)
    loss.backward()
    wanted.backward()
    expected = dict(ours.named_parameters())
    for name, parameter in theirs.yaongi.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.is_sparse, name
        assert_equal_to_float64(parameter.grad, expected[name].grad.to_dense(), 1e-4, name)
    ours.zero_grad()
    theirs.zero_grad()


def test_rows_packed_by_position_ids_keep_apart(ours: Yaongi, theirs: Any) -> None:
    ids = ids_of(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad():
        logits = theirs(input_ids=ids, position_ids=positions).logits[0]
        apart = [ours(part)[0] for part in ids.split([5, 3, 4], dim=1)]
    assert_equal_to_float64(logits, torch.cat(apart), NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_gives_our_own_greedy_text(side: str, ours: Yaongi, theirs: Any, fast: Any) -> None:
    wanted = generate(ours, [fast(text)["input_ids"] for text in TEXTS], max_new_tokens=LONGEST, stop=())
    batch = fast(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    greedy = {"do_sample": False, "eos_token_id": None}
    width = batch["input_ids"].shape[1]
    for limit in ({"max_new_tokens": LONGEST}, {"max_length": width + LONGEST}, {"max_new_tokens": 20, "use_cache": 0}):
        found = theirs.generate(**batch, **greedy, **limit)
        assert found[:, width:].tolist() == wanted, limit


def test_generate_goes_on_past_the_room_of_its_cache(ours: Yaongi, theirs: Any) -> None:
    ids = ids_of(1, 5)
    found = theirs.generate(ids, max_new_tokens=280, do_sample=False, eos_token_id=None)
    assert found[:, 5:].tolist() == generate(ours, ids.tolist(), max_new_tokens=280, stop=())


def test_beams_samples_and_several_answers(theirs: Any, fast: Any) -> None:
    batch = fast(TEXTS, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    beams = [theirs.generate(**batch, num_beams=3, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert torch.equal(*beams)
    drawn = theirs.generate(**batch, do_sample=True, num_return_sequences=2, **options)
    assert drawn.shape[0] == 2 * len(TEXTS)


def test_generation_ends_as_the_folder_says(ours: Yaongi, folder: Path, fast: Any, tmp_path: Path) -> None:
    ids = fast(TEXTS[0])["input_ids"]
    answer = generate(ours, [ids], max_new_tokens=9, stop=())[0]
    model = Yaongi.from_pretrained(folder)
    model.config = dataclasses.replace(model.config, stop_token_ids=(answer[4],))
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    found = theirs.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0, len(ids) :].tolist()
    assert found == answer[: answer.index(answer[4]) + 1]


def test_pipeline(folder: Path, ours: Yaongi, fast: Any) -> None:
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    pipe.model.generation_config.eos_token_id = None
    answer = generate(ours, [fast(TEXTS[0])["input_ids"]], max_new_tokens=8, stop=())[0]
    found = pipe(TEXTS[0], max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert found == fast.decode(answer, skip_special_tokens=True)
    assert len(pipe(TEXTS, max_new_tokens=3, batch_size=3)) == len(TEXTS)


def test_save_and_load_again(theirs: Any, ours: Yaongi, tmp_path: Path) -> None:
    theirs.generation_config.max_length = 77
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True, dtype="bfloat16")
    assert again.generation_config.max_length == 77
    assert again.dtype == torch.bfloat16
    back = Yaongi.from_pretrained(tmp_path / "again")
    assert back.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    theirs.save_pretrained(tmp_path / "state", state_dict={n: t + 0 for n, t in theirs.state_dict().items()})
    assert torch.equal(Yaongi.from_pretrained(tmp_path / "state").lm_head.weight, ours.lm_head.weight)


def test_new_models_from_the_config(folder: Path, ours: Yaongi) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.max_position_embeddings, config.vocab_size, config.num_hidden_layers) == (300, 512, 6)
    new = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    wanted = Yaongi(ours.config, compression=ours.backbone.compression.numpy()).state_dict()
    for name, tensor in new.yaongi.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    ids = ids_of(2, 8)
    base = AutoModel.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        assert_equal_to_float64(new.yaongi.lm_head(base(ids).last_hidden_state), new(ids).logits, NEAR)
    assert (
        AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.bfloat16).dtype == torch.bfloat16
    )


def test_gradient_checkpointing_gives_the_same_gradient(theirs: Any) -> None:
    ids = ids_of(2, 9)
    found = []
    for switch in (theirs.gradient_checkpointing_disable, theirs.gradient_checkpointing_enable):
        switch()
        theirs.zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        found.append(theirs.get_input_embeddings().weight.grad.clone())
    assert theirs.is_gradient_checkpointing
    theirs.gradient_checkpointing_disable()
    theirs.zero_grad()
    assert_equal_to_float64(found[1], found[0], NEAR)


def test_transformers_trainer_trains_and_saves_it(folder: Path, fast: Any, tmp_path: Path) -> None:
    """Run a few steps on padded batches of the library's own collator, and read what it saved."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    before = {name: tensor.clone() for name, tensor in model.yaongi.state_dict().items()}
    fast.pad_token = "<|pad|>"
    settings = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[], use_cpu=True,
        gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": fast(text)["input_ids"]} for text in TEXTS * 4]
    trainer = Trainer(model, settings, DataCollatorForLanguageModeling(fast, mlm=False), rows)
    assert trainer.train().training_loss < 20
    assert 0 < trainer.evaluate(rows)["eval_loss"] < 20
    trainer.save_model(str(tmp_path / "trained"))
    after = Yaongi.from_pretrained(tmp_path / "trained").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in model.yaongi.state_dict().items())
    same = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert set(same) <= {"backbone.compression", *(n for n in before if n.endswith("e_score_correction_bias"))}


@pytest.mark.parametrize("packing", [False, True])
def test_trl_tunes_it(packing: bool, folder: Path, fast: Any, tmp_path: Path) -> None:
    """Run two steps of supervised tuning: padded rows with the answers' mask of our template, or packed rows."""
    trl = pytest.importorskip("trl")
    turns = [{"role": "user", "content": "aq qa"}, {"role": "assistant", "content": "bq"}]
    settings = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, max_length=64, packing=packing, bf16=False,
        assistant_only_loss=not packing, report_to=[], use_cpu=True, disable_tqdm=True, dataset_num_proc=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    rows = Dataset.from_list([{"messages": turns}] * 8)
    trainer = trl.SFTTrainer(model, settings, processing_class=fast, train_dataset=rows)
    assert 0 < trainer.train().training_loss < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 24)}, "yaongi: inputs_embeds must be left out, got Tensor"),
        ({"output_hidden_states": True}, "yaongi: output_hidden_states must be left out, got bool"),
        ({"past_key_values": ()}, "yaongi: past_key_values must be what this model returned, got tuple"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, "yaongi: attention_mask must be (B, L), got (1, 1, 2, 2)"),
        ({"input_ids": None}, "yaongi: input_ids must be given, since Engram looks them up, got none"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_it_cannot_do_is_refused_by_name(theirs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^yaongi: ") as caught:
        theirs(**{"input_ids": ids_of(1, 2)} | options)
    assert str(caught.value) == message


def test_loading_and_saving_refuse_what_they_do_not_know(theirs: Any, folder: Path) -> None:
    load = type(theirs).from_pretrained
    with pytest.raises(ValueError, match=r"^yaongi: options must be among .*, got quantization_config$"):
        load(folder, quantization_config={"bits": 4})
    with pytest.raises(ValueError, match=r"^yaongi: device_map must be one device or 'auto', got 'several devices'$"):
        load(folder, device_map={"a": 0, "b": 1})
    with pytest.raises(ValueError, match=r"^yaongi: vocabulary must keep its 512 entries, got 600$"):
        theirs.resize_token_embeddings(600)
    with pytest.raises(ValueError, match=r"^yaongi: push_to_hub must be left out of save_pretrained, got True$"):
        theirs.save_pretrained(folder / "nowhere", push_to_hub=True)
    model, report = load(folder, output_loading_info=True, device_map="auto")
    assert not any(report.values())
    assert model.device.type == "cpu" or torch.cuda.is_available()
