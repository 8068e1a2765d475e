"""Model folders: everything is restored, damaged or foreign folders are refused in one line, loading is by shards."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import ENGRAM, roughened, small_config, small_model, token_ids
from programs import run_module
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from yaongi.model import Yaongi
from yaongi.model.hub.folder import export_nemotron_h, save

ROOT = Path(__file__).resolve().parents[2]
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
NEVER_EXPORTED = ("layers_block_type", "time_step_limit")  # keys that make other readers of the hub's layout fail


def save_pretrained(model: Yaongi, folder: Path, *, shard_bytes: int) -> None:
    """Do what the method does, with shards of this size."""
    save(model, model.config, model.count_parameters(), folder, shard_bytes=shard_bytes)


def engram_model(dtype: torch.dtype = torch.float32) -> Yaongi:
    """Return a model with Engram and a compression of its ids."""
    config = small_config(engram=[ENGRAM])
    return roughened(Yaongi(config, dtype=dtype, compression=[i // 2 for i in range(61)]))


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the object of a JSON file in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_engram", [False, True])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, with_engram: bool) -> None:
    model = engram_model(dtype) if with_engram else small_model(dtype=dtype)
    save_pretrained(model, tmp_path, shard_bytes=5000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    back = Yaongi.from_pretrained(tmp_path, dtype=None)
    state = back.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    assert back.config.pattern == model.config.pattern
    ids = token_ids(model, 2, 9)
    assert torch.equal(back(ids), model(ids))
    wide = Yaongi.from_pretrained(tmp_path)
    assert wide.lm_head.weight.dtype == torch.float32
    assert wide.backbone.layers[0].mixer.A_log.dtype == torch.float32
    if with_engram:
        assert back.config == model.config


def test_the_hubs_config_holds_what_others_read(tmp_path: Path) -> None:
    model = small_model(routed_scale=1.5, eos_token_id=7)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "MEM*ME",
        "num_hidden_layers": 6,
        "n_shared_experts": 1,
        "expand": 2,
        "time_step_min": 1e-30,
        "routed_scaling_factor": 1.5,
        "dtype": "float32",
    }
    assert expected.items() <= fields.items()
    assert not set(NEVER_EXPORTED) & fields.keys()
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == set(load_file(tmp_path / SHARD))
    assert "backbone.layers.1.mixer.experts.5.up_proj.weight" in index["weight_map"]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 7
    counts = Yaongi(model.config, device="meta").count_parameters()
    card = (tmp_path / "README.md").read_text()
    assert f"{counts.total:,}" in card
    assert f"{counts.active:,}" in card


def test_saving_over_a_larger_model_leaves_no_old_weights(tmp_path: Path) -> None:
    save_pretrained(engram_model(), tmp_path, shard_bytes=5000)
    small_model().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == [SHARD]
    assert not (tmp_path / "modeling_yaongi.py").exists()
    assert not list(tmp_path.glob("*.tmp"))
    Yaongi.from_pretrained(tmp_path)


def test_a_model_without_values_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_pretrained: backbone.* must have values, got a tensor on the meta"):
        Yaongi(small_config(), device="meta").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(Yaongi(small_config(), seed=1), tmp_path, shard_bytes=20_000)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls = iter(range(3))

    def full_disk(*arguments: Any, **options: Any) -> None:
        if next(calls) == 2:
            raise OSError("no space left on device")
        save_file(*arguments, **options)

    monkeypatch.setattr("yaongi.model.hub.weights.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(Yaongi(small_config(), seed=2), tmp_path, shard_bytes=20_000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("with_engram", [False, True])
@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [(7, None, [7]), ([7, 5], None, [7, 5]), (7, 9, [9]), (7, [9, 7, 5], [9, 7, 5]), ([7, 5], [], [7, 5])],
)
def test_every_end_of_an_answer_is_read_and_kept(
    config: Any, generation: Any, ends: list[int], with_engram: bool, tmp_path: Path
) -> None:
    """generation_config.json counts first, as for transformers; a save writes all of them back."""
    model = engram_model() if with_engram else Yaongi(small_config())
    model.save_pretrained(tmp_path)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        if value is None:
            (tmp_path / name).unlink()
        else:
            fields = json.loads((tmp_path / name).read_text()) | {"eos_token_id": value}
            (tmp_path / name).write_text(json.dumps(fields))
    again = Yaongi.from_pretrained(tmp_path)
    assert again.config.answer_ends == ends
    again.save_pretrained(tmp_path / "again")
    assert Yaongi.from_pretrained(tmp_path / "again").config.answer_ends == ends
    saved = [json.loads((tmp_path / "again" / n).read_text()) for n in ("config.json", "generation_config.json")]
    assert [fields["eos_token_id"] for fields in saved] == [ends if len(ends) > 1 else ends[0]] * 2


def test_a_save_removes_only_what_a_save_wrote(tmp_path: Path) -> None:
    """Another model's shards go; adapters, averaged weights, other formats and notes stay."""
    others = ("model.lora.safetensors", "model-ema.safetensors", "model.fp8-00001-of-00002.safetensors", "model.gguf")
    save_pretrained(Yaongi(small_config(), seed=1), tmp_path, shard_bytes=20_000)
    old = {path.name for path in tmp_path.glob("model-*-of-*.safetensors")}
    for name in (*others, "notes.txt"):
        (tmp_path / name).write_text("mine")
    save_pretrained(Yaongi(small_config(), seed=2), tmp_path, shard_bytes=40_000)
    new = {path.name for path in tmp_path.glob("model-0*-of-*.safetensors")}
    assert new
    assert not old & new
    assert all((tmp_path / name).read_text() == "mine" for name in (*others, "notes.txt"))
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.parametrize("state", ["shards", "single", "both"])
def test_another_tools_single_file_counts_before_the_index(state: str, tmp_path: Path) -> None:
    """As transformers reads a folder that it saved over: the index stays, and the single file is newer."""
    first, second = Yaongi(small_config(), seed=1), Yaongi(small_config(), seed=2)
    save_pretrained(first, tmp_path, shard_bytes=20_000)
    if state != "shards":
        save_pretrained(second, tmp_path / "second", shard_bytes=10**9)
        (tmp_path / "second" / SHARD).rename(tmp_path / "model.safetensors")
    if state == "single":
        (tmp_path / INDEX).unlink()
    wanted = first if state == "shards" else second
    head = wanted.state_dict()["lm_head.weight"]
    assert torch.equal(Yaongi.from_pretrained(tmp_path).state_dict()["lm_head.weight"], head)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(theirs.state_dict()["lm_head.weight"], head)
    if state != "shards":
        with pytest.raises(FileExistsError, match=r"folder must have no model.safetensors, which would be"):
            save_pretrained(first, tmp_path, shard_bytes=20_000)


def test_engram_is_exported_only_when_told_to_be_dropped(tmp_path: Path) -> None:
    model = engram_model()
    with pytest.raises(ValueError, match=r"export: model must be without Engram.*layer 1 with .* parameters: --drop"):
        export_nemotron_h(model, model.config, model.count_parameters(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_nemotron_h(model, model.config, model.count_parameters(), tmp_path / "out", drop_engram=True)
    back = Yaongi.from_pretrained(tmp_path / "out")
    assert back.config == model.config.without_engram().__class__.from_dict(back.config.to_dict())
    assert not back.config.engram
    lost = (
        Yaongi(model.config, device="meta").count_parameters().total
        - Yaongi(back.config, device="meta").count_parameters().total
    )
    assert f"{lost:,}" in (tmp_path / "out" / "README.md").read_text()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_the_export_command(tmp_path: Path) -> None:
    engram_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": "<|eos|>"}')

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_module("yaongi.export", tmp_path / "model", "--out", *arguments)

    refused = run(str(tmp_path / "out"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: export: model must be without Engram")
    assert refused.stderr.count("\n") == 1
    same = run(str(tmp_path / "model"), "--drop-engram")
    assert same.stderr.startswith("error: export: --out must be another folder than the model's")
    done = run(str(tmp_path / "out"), "--drop-engram")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said == {"padding_side": "left", "eos_token": "<|eos|>"}
    Yaongi.from_pretrained(tmp_path / "out")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder's only shard."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


def cut(folder: Path, size: int) -> None:
    """Cut the shard to its first `size` bytes."""
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: size if size > 0 else len(data) + size])


HEAD, UP = "lm_head.weight", "backbone.layers.1.mixer.experts.3.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "folder must hold config.json, got"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json: must be JSON, got"),
    "other type": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="llama")),
        ValueError,
        "config.json: model_type must be 'nemotron_h' or 'yaongi', got 'llama'",
    ),
    "other activation": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(mlp_hidden_act="silu")),
        ValueError,
        "config.json: mlp_hidden_act must be 'relu2', got 'silu'",
    ),
    "latent experts": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(moe_latent_size=8)),
        ValueError,
        "config.json: moe_latent_size must be None, got 8",
    ),
    "two shared experts": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(n_shared_experts=2)),
        ValueError,
        "config.json: n_shared_experts must be 1, got 2",
    ),
    "dense layers": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(hybrid_override_pattern="ME-*ME")),
        ValueError,
        "config: pattern must be letters of M, E and *, got '-'",
    ),
    "no size": (
        lambda f: edit_json(f / "config.json", lambda c: c.pop("ssm_state_size")),
        ValueError,
        "config.json: 'ssm_state_size' must be given, got",
    ),
    "no layers": (
        lambda f: edit_json(f / "config.json", lambda c: c.pop("hybrid_override_pattern")),
        ValueError,
        "config.json: hybrid_override_pattern or layers_block_type must be given, got neither",
    ),
    "odd dtype": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(dtype="int4")),
        ValueError,
        "config.json: dtype must be a floating one, got 'int4'",
    ),
    "other vocabulary": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(vocab_size=64)),
        ValueError,
        "backbone.embeddings.weight must be of shape (64, 24), got (61, 24)",
    ),
    "missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop(HEAD)),
        ValueError,
        f"the tensor {HEAD} must be there, got",
    ),
    "missing expert": (lambda f: rewrite(f, lambda t: t.pop(UP)), ValueError, f"the tensor {UP} must be there, got"),
    "extra tensor": (
        lambda f: rewrite(f, lambda t: t.update(more=torch.ones(2))),
        ValueError,
        "every tensor must be the model's, got the extra more",
    ),
    "extra expert": (
        lambda f: rewrite(f, lambda t: t.update({UP.replace(".3.", ".6."): t[UP].clone()})),
        ValueError,
        f"every tensor must be the model's, got the extra {UP.replace('.3.', '.6.')}",
    ),
    "misshapen tensor": (
        lambda f: rewrite(f, lambda t: t.update({HEAD: t[HEAD][:, 1:].contiguous()})),
        ValueError,
        f"{SHARD}: {HEAD} must be of shape (61, 24), got (61, 23)",
    ),
    "misshapen expert": (
        lambda f: rewrite(f, lambda t: t.update({UP: t[UP][1:].contiguous()})),
        ValueError,
        f"{SHARD}: {UP} must be of shape (10, 24), got (9, 24)",
    ),
    "no weights": (
        lambda f: [file.unlink() for file in f.glob("model*")],
        FileNotFoundError,
        "from_pretrained: model.safetensors.index.json or model.safetensors must be in",
    ),
    "no shard": (lambda f: (f / SHARD).unlink(), FileNotFoundError, f"from_pretrained: {SHARD}, which the"),
    "no index": (lambda f: (f / INDEX).write_text("{}"), ValueError, f"{INDEX}: weight_map must be a table, got None"),
    "cut at the end": (lambda f: cut(f, -7), ValueError, f"{SHARD}: must be a whole safetensors file, got"),
    "cut in the header": (lambda f: cut(f, 100), ValueError, f"{SHARD}: must be a whole safetensors file, got"),
    "empty": (lambda f: (f / SHARD).write_bytes(b""), ValueError, f"{SHARD}: must be a whole safetensors file, got"),
    "no safetensors": (
        lambda f: (f / SHARD).write_bytes(b"PK" * 500),
        ValueError,
        f"{SHARD}: must be a whole safetensors file, got",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in the hub's layout."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    Yaongi(small_config()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(
    saved: Path, tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(error) as caught:
        Yaongi.from_pretrained(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_head_for_speculation_is_left_out(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    rewrite(folder, lambda tensors: tensors.update({"mtp.layers.0.norm.weight": torch.ones(24)}))
    expected = Yaongi.from_pretrained(saved).state_dict()
    loaded = Yaongi.from_pretrained(folder).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


PEAK = """
import sys, torch
from transformers import AutoModelForCausalLM

from yaongi.model import Yaongi
import yaongi.model.hub.folder
def peak():  # of this process: getrusage would also count what its parent had when it was forked
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


Yaongi.from_pretrained(sys.argv[2])  # a small one, after which all code is loaded
before = peak()
model = Yaongi.from_pretrained(sys.argv[1])
print(peak() - before)
"""


def test_loading_keeps_one_shard_beside_the_model(tmp_path: Path) -> None:
    """Load a model of 164 MB in shards of 82 MB: the peak is the model and one shard, plus 10 % for everything else."""
    model = Yaongi(small_config("M", hidden_size=256, vocab_size=80_000))
    shard, size = 82_000_000, sum(t.nbytes for t in model.state_dict().values())
    save_pretrained(model, tmp_path, shard_bytes=shard)
    del model
    Yaongi(small_config("M")).save_pretrained(tmp_path / "small")
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) <= 1.1 * (size + shard), f"peak {int(done.stdout):,}, model {size:,}"
