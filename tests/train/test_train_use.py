"""A run is used while it trains: its newest checkpoint, or any, by generate, export and eval bpb."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from programs import run_module
from safetensors.torch import load_file
from small_run import ROOT, environment, final_tensors, run, session_of

from yaongi.model import Yaongi
from yaongi.model.hub.checkpoint_folders import find_weights

OUT = ("--stop-after", "6", "--sample-tokens", "0")


@pytest.fixture(scope="module")
def begun(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that has done six of twelve steps: checkpoints at 3 and 6, an evaluation at 6."""
    out = tmp_path_factory.mktemp("begun") / "run"
    done = run(tokens, out, *OUT)
    assert done.returncode == 0, done.stderr
    return out


def use(*words: object) -> subprocess.CompletedProcess[str]:
    """Run another command of the package, in another folder than the training's."""
    return run_module(*map(str, words), env=environment(), cwd=ROOT / "tests")


def test_a_run_s_newest_checkpoint(begun: Path, tmp_path: Path) -> None:
    """Generate from the run, from its checkpoint, and from its export: the same text, though there is no model yet."""
    newest = begun / "checkpoints" / "step-00000006"
    assert not (begun / "model").exists()
    assert find_weights(begun) == newest
    texts = []
    for folder in (begun, newest):
        done = use("yaongi.generate", folder, "--prompt", "가나 ", "--max-new-tokens", "5", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        assert done.stderr == (f"weights: {newest}\n" if folder == begun else "")
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    hub = tmp_path / "hub"
    done = use("yaongi.export", begun, "--out", hub, "--drop-engram")
    assert done.returncode == 0, done.stderr
    saved = load_file(next(hub.glob("*.safetensors")))
    tensors = final_tensors(begun)
    for name in ("lm_head.weight", "backbone.layers.0.mixer.in_proj.weight"):
        assert torch.equal(saved[name], tensors[f"model/{name}"])
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} <= {p.name for p in hub.iterdir()}


def test_any_checkpoint(begun: Path) -> None:
    """The weights are those of its step; without Engram's compression its hashes would be others."""
    older = Yaongi.from_pretrained(begun / "checkpoints" / "step-00000003")
    newer = Yaongi.from_pretrained(begun)
    tensors = final_tensors(begun)
    assert newer.config.compressed_vocab_size == int(tensors["model/backbone.compression"].max()) + 1
    for name, tensor in newer.state_dict().items():
        assert torch.equal(tensor, tensors[f"model/{name}"]), name
    assert not torch.equal(older.lm_head.weight, newer.lm_head.weight)


def test_eval_bpb_is_the_training_s(begun: Path, tokens: Path) -> None:
    """The same rows give the same bits per byte as the evaluation of that step."""
    done = use("yaongi.eval", "bpb", begun, "--data", tokens, "--rows", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    first, second, *lines = done.stdout.splitlines()
    assert first == f"weights: {begun / 'checkpoints' / 'step-00000006'}"
    assert second == "bits per byte of held-out rows of 64 tokens"
    records = map(json.loads, (begun / "metrics.jsonl").read_text().splitlines())
    bits = [r for r in records if r["event"] == "evaluation"][-1]
    assert bits["step"] == 6
    assert {line.split()[0]: line.split()[1] for line in lines[:-1]} == {k: f"{v:.4f}" for k, v in bits["bpb"].items()}


def test_master_weights(tokens: Path, tmp_path: Path) -> None:
    """A bfloat16 model's weights are the casts of its float32 masters; asked for, they come in float32."""
    session = session_of(tokens, tmp_path / "run", "--dtype", "bfloat16")
    with session:
        session.train_step(next(session.batches()))
        session.save(wait=True)
    stored = Yaongi.from_pretrained(tmp_path / "run", dtype=None)
    assert all(torch.equal(t, stored.state_dict()[n]) for n, t in session.model.state_dict().items())
    wide = Yaongi.from_pretrained(tmp_path / "run").lm_head.weight
    master = session.optimizer.tensors()["lm_head.weight"]["master"]
    assert torch.equal(wide, master)
    assert not torch.equal(wide, session.model.lm_head.weight.float())


def test_what_can_t_be_used(begun: Path, tmp_path: Path) -> None:
    """Damage is one line; a checkpoint of an earlier version has its tokenizer elsewhere."""
    copy = tmp_path / "run"
    shutil.copytree(begun, copy)
    newest = copy / "checkpoints" / "step-00000006"
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = use("yaongi.generate", copy, "--prompt", "a")
    assert done.stderr == f"error: checkpoint: {newest} is damaged: {file.name} has changed since it was saved\n"
    (newest / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is damaged: run.json has changed since it was saved"):
        Yaongi.from_pretrained(newest)
    older = copy / "checkpoints" / "step-00000003"
    (older / "tokenizer.model").unlink()
    (older / "SHA256SUMS").unlink()
    done = use("yaongi.generate", older, "--prompt", "가", "--max-new-tokens", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr


def test_the_save_comes_before_the_evaluation(begun: Path, tokens: Path, tmp_path: Path) -> None:
    """A run that is cut short in an evaluation has saved; resumed, it makes up for the evaluation first."""
    events = [json.loads(line)["event"] for line in (begun / "metrics.jsonl").read_text().splitlines()]
    assert events[-3:] == ["step", "checkpoint", "evaluation"]
    copy = tmp_path / "run"
    shutil.copytree(begun, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert run(tokens, copy, "--sample-tokens", "0", "--stop-after", "7").returncode == 0
    made_up = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [r["event"] for r in made_up][-3:] == ["evaluation", "step", "checkpoint"]
    assert made_up[-3]["bpb"] == json.loads(lines[-1])["bpb"]
