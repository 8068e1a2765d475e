"""Training in FP8 by emulation: it learns, resumes to the bit and across precisions, skips what is not finite."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from processes import in_processes
from processes import train as train_in_processes
from small_run import FOR_KERNELS, arguments, config_of, final_tensors, losses, session_of, train_here
from study_fp8_sites import study, table

from yaongi.kernels.fp8_quantize.op import refuses_gpu
from yaongi.model import Yaongi, load_preset
from yaongi.train.command_line import parse
from yaongi.train.config import load_config
from yaongi.train.plan import passes
from yaongi.train.plan.speed import fp8_here

FP8 = [
    *("--model.precision.mamba-projections", "fp8", "--model.precision.attention-projections", "fp8"),
    *("--model.precision.shared-experts", "fp8", "--model.precision.experts", "fp8"),
    *("--model.precision.high-layers", "0"),
]
AS_ON_A_GPU = ("--dtype", "bfloat16")


def train(tokens: Path, out: Path, *more: str) -> None:
    assert train_here([*arguments(tokens, out), "--sample-tokens", "0", *more]) == 0


def records(out: Path, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["event"] == event]


def test_it_resumes_to_the_bit(tokens: Path, tmp_path: Path) -> None:
    """Weights, optimizer and scales; the checkpoint holds the history of every site."""
    train(tokens, tmp_path / "whole", *FP8, *AS_ON_A_GPU)
    train(tokens, tmp_path / "pieces", *FP8, *AS_ON_A_GPU, "--stop-after", "5")
    train(tokens, tmp_path / "pieces", *FP8, *AS_ON_A_GPU)
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    whole, pieces = (final_tensors(tmp_path / name) for name in ("whole", "pieces"))
    assert whole.keys() == pieces.keys()
    assert whole["fp8/history"].shape == (18, 16)  # four layers of five, four sites each, and two of the experts
    assert whole["fp8/history"].all(0)[-12:].all()
    for name, tensor in whole.items():
        assert torch.equal(tensor, pieces[name]), name


@pytest.mark.gpu
def test_recorded_and_plain_pieces_are_one_run(tokens: Path, tmp_path: Path) -> None:
    """On a GPU the whole run and the second piece replay CUDA graphs, the first piece doesn't: the same bits."""
    on_gpu = (*FOR_KERNELS, *FP8, "--device", "cuda")
    train(tokens, tmp_path / "whole", *on_gpu)
    train(tokens, tmp_path / "pieces", *on_gpu, "--stop-after", "3", "--no-cuda-graph")
    train(tokens, tmp_path / "pieces", *on_gpu)
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    whole, pieces = (final_tensors(tmp_path / name) for name in ("whole", "pieces"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, pieces[name]), name


def test_several_processes(tokens: Path, tmp_path: Path) -> None:
    """Have the same scales, of the largest magnitudes of all; so they learn as one does, which goes on from two."""
    more = (*FP8, *AS_ON_A_GPU, "--sample-tokens", "0", "--micro-rows", "2", "--evaluate-every", "100")
    for count, name in ((1, "one"), (2, "two")):
        asked = arguments(tokens, tmp_path / name, *more, "--stop-after", "3")
        assert not any(in_processes(count, tmp_path / f"{name}-log", train_in_processes, asked).codes)
    for (_, *got), (_, *wanted) in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert got == pytest.approx(wanted, rel=0.02)
    one, two = (final_tensors(tmp_path / name)["fp8/history"] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0.3, atol=0)
    train(tokens, tmp_path / "two", *more, "--stop-after", "4")
    assert [step for step, *_ in losses(tmp_path / "two")] == [1, 2, 3, 4]


def test_fsdp_is_refused(tokens: Path, tmp_path: Path) -> None:
    asked = arguments(tokens, tmp_path / "run", *FP8, "--parallel", "fsdp")
    done = in_processes(2, tmp_path / "log", train_in_processes, asked)
    assert done.err == [
        "error: train: fp8 must run with --parallel replicate, got fsdp: its scales and weights aren't sharded\n",
        "",
    ]


@pytest.mark.parametrize("first", ["fp8", "bf16"])
def test_a_checkpoint_goes_on_in_the_other_precision(
    first: str, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said in one line; the checkpoint of both has the same float32 weights under the same names."""
    before, after = (FP8, []) if first == "fp8" else ([], FP8)
    train(tokens, tmp_path / "run", *before, *AS_ON_A_GPU, "--stop-after", "6")
    names = final_tensors(tmp_path / "run").keys()
    capsys.readouterr()
    train(tokens, tmp_path / "run", *after, *AS_ON_A_GPU)
    said = "trained in fp8: the run goes on without it" if first == "fp8" else "trained without fp8: the first micro-b"
    assert f"the checkpoint was {said}" in capsys.readouterr().out
    assert final_tensors(tmp_path / "run").keys() ^ names == {"fp8/history"}
    assert [step for step, _, _ in losses(tmp_path / "run")] == list(range(1, 13))


def test_other_sites_are_refused(tokens: Path, tmp_path: Path) -> None:
    train(tokens, tmp_path / "run", *FP8, "--stop-after", "3")
    with pytest.raises(ValueError, match=r"^checkpoint: scales must be those of 22 fp8 sites, got 18 \(saved with oth"):
        train(tokens, tmp_path / "run", *FP8[:-2], "--model.precision.high-layers")


def test_a_gradient_does_not_depend_on_micro_batches(tokens: Path, tmp_path: Path) -> None:
    """Scales are constants of a step: two micro-batches of four rows, or eight of one, but for float32's rounding."""
    found = []
    for rows in ("4", "1"):
        session = session_of(tokens, tmp_path / rows, *FP8, "--micro-rows", rows, "--dtype", "float64")
        scales: Any = session.model.fp8_scales
        scales.known = True  # calibrated by the same numbers
        scales.scale.fill_(16.0)
        scales.unit.fill_(1 / 16)
        batches = next(session.batches())
        session.stepper._backward([(b.input_ids, b.document_ids) for b in batches], torch.tensor(400))
        weight: Any = session.model.backbone.layers[3].mixer.in_proj.weight
        found.append((weight.grad.clone(), scales.amax.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=0)


def test_what_is_not_finite_before_a_cast_is_named_and_skipped(tokens: Path, tmp_path: Path) -> None:
    """Saturation would hide an infinity; no scale changes, and the next step is as ever."""
    session = session_of(tokens, tmp_path / "run", *FP8)
    batches = session.batches()
    session.train_step(next(batches))
    scales: Any = session.model.fp8_scales
    before = scales.scale.clone(), scales.history.clone()
    layers: Any = session.model.backbone.layers
    weight = layers[3].mixer.in_proj.weight
    kept = weight.detach().clone()
    spoil = lambda module, given, out: (out[0].index_fill(1, torch.tensor([3]), torch.inf), *out[1:])  # noqa: E731
    hook = layers[1].register_forward_hook(spoil)
    result = session.stepper(next(batches), {"matrix": 0.1, "vector": 0.1, "table": 0.1}, 1e-3)
    hook.remove()
    assert result.bad == "layers.2 x, before its cast to fp8,"
    assert torch.equal(scales.scale, before[0])
    assert torch.equal(scales.history, before[1])
    assert torch.equal(weight, kept)
    assert session.stepper(next(batches), {"matrix": 0.01, "vector": 0.01, "table": 0.01}, 1e-3).bad is None


def test_plan_log_metrics_report_and_both_evaluations(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tokens, tmp_path / "run", *FP8, *AS_ON_A_GPU, "--sample-tokens", "3")
    out = capsys.readouterr().out
    roles = "mamba projections, shared experts, experts, attention projections"
    assert f"fp8: {roles} in 4 of 5 layers; emulated here, slower than" in out
    assert "| fp8 saturated 0.0%" in out
    assert "step 12: held-out bits per byte without fp8 " in out
    steps = records(tmp_path / "run", "step")
    assert all(record["fp8_saturated"] == 0 and 0 < record["fp8_reach"] <= 0.5 for record in steps[:1])
    last, without = records(tmp_path / "run", "evaluation")[-1], records(tmp_path / "run", "evaluation_without_fp8")
    assert last["bpb"].keys() == without[0]["bpb"].keys()
    assert last["bpb"] != without[0]["bpb"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "emulated here" in page
    assert "without fp8" in page
    assert len(records(tmp_path / "run", "samples")[-1]["texts"]) == 3  # generated in bf16


def test_what_fp8_cannot_do_is_refused(tokens: Path, tmp_path: Path) -> None:
    rows = ("--row-tokens", "72", "--batch-tokens", "720", "--model.max-sequence-length", "72")
    with pytest.raises(ValueError, match=r"^train: a micro-batch must be a multiple of 16 tokens for fp8, got 1 x 72$"):
        config_of(tokens, tmp_path / "run", *FP8, *rows)


def test_a_plan_times_a_multiple_of_16_tokens(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU so slow that a row of 64 tokens is too long to be timed, and 40 are not: 32 are."""
    config = config_of(tokens, tmp_path / "run", *FP8)
    monkeypatch.setattr(passes, "_FEWEST", 32)
    monkeypatch.setattr(passes, "step_speed", lambda *_: 40 / passes._SECONDS)
    found = passes.passes_here(config, None, Yaongi(config.model), 1, 1.0, torch.device("cpu"))
    assert found.basis == "timed here"


@pytest.mark.parametrize(("capability", "real"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_a_gpu_without_fp8_emulates_it_and_says_so(capability: tuple[int, int], real: bool) -> None:
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
        said = fp8_here(load_preset("yaongi-4b-fp8"), torch.device("cuda"))
        reason = refuses_gpu.__wrapped__(torch.device("cuda"))
    assert said.endswith("in 50 of 52 layers" if real else "in 50 of 52 layers; emulated here, slower than bf16")
    assert reason == (None if real else f"it needs compute capability 8.9 or newer, got {capability}")


def test_the_preset() -> None:
    """`yaongi-4b` but for the precision."""
    fp8, bf16 = load_config("yaongi-4b-fp8"), load_config("yaongi-4b")
    assert fp8.train == bf16.train
    assert fp8.model.to_dict() == bf16.model.to_dict()
    precision = fp8.model.precision
    assert precision.roles == ("mamba_projections", "shared_experts", "attention_projections")
    assert len(precision.layers(fp8.model.pattern)) == 50
    assert load_preset("yaongi-4b").precision.layers(bf16.model.pattern) == ()


def test_the_command_line_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    roles = ("mamba-projections", "attention-projections", "shared-experts", "experts")
    for field in (*roles, "high-layers", "exact", "margin"):
        assert f"--model.precision.{field}" in text or f"--model.precision.no-{field}" in text


@pytest.mark.long
def test_tiny_learns_as_without(tokens: Path, tmp_path: Path) -> None:
    """30 steps of `yaongi-tiny`: the loss of the last ten within 0.5 % of the run without FP8."""
    means = {}
    for name, precision in (("bf16", []), ("fp8", FP8)):
        out = tmp_path / name
        command = ["--preset", "yaongi-tiny", "--data", str(tokens), "--out", str(out), "--tokens", str(30 * 2048)]
        command += ["--wandb", "off", "--no-tensorboard", "--sample-tokens", "0", "--evaluate-rows", "1"]
        assert train_here([*command, "--evaluate-every", "1000", "--checkpoint-every", "0", *precision]) == 0
        found = losses(out)
        assert len(found) == 30
        means[name] = sum(loss for _, loss, _ in found[-10:]) / 10
        assert found[-1][1] < found[0][1] - 1
    assert abs(means["fp8"] / means["bf16"] - 1) < 5e-3, means


def test_the_study_of_sites(tokens: Path, tmp_path: Path) -> None:
    """All sites are looked at; what is far below the others is lost to zero, and nothing saturates."""
    found = study([*arguments(tokens, tmp_path / "run"), *FP8, "--sample-tokens", "0"], 2)
    assert len(found) == 18
    assert all(shares["saturated"] == 0 and 0 <= shares["to_zero"] < 0.5 for shares in found.values())
    assert all(0 < shares["reach"] <= 1 for shares in found.values())
    assert "| sa | 1 |" in table(found)
    assert (tmp_path / "run" / "fp8_sites.json").exists()
    with pytest.raises(ValueError, match=r"^study_fp8_sites: some role must be fp8, got none"):
        study(arguments(tokens, tmp_path / "other"), 1)
