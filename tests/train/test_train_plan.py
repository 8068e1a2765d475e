"""The plan for many GPUs: memory, the seconds of a step, and what a dry run says about them."""

import dataclasses
import re
from pathlib import Path

import pytest
import study_scaling
import torch
from processes import in_processes
from small_run import ROOT, arguments, train_here

from yaongi.model import Yaongi
from yaongi.model.config import Precision
from yaongi.train.config import Config, load_config
from yaongi.train.distributed.ownership import Group, assign_owners, count_owners
from yaongi.train.optimizer.partition import divide_parameters, partition_parameters
from yaongi.train.plan import passes
from yaongi.train.plan.advice import advise
from yaongi.train.plan.machines import MACHINES
from yaongi.train.plan.memory import MemoryForecast
from yaongi.train.plan.scaling import StepCost, step_seconds
from yaongi.train.plan.speed import link_speed, links_here
from yaongi.world import init_world

LONG = pytest.mark.long


def flagship(rows: int) -> StepCost:
    """Return the costs of yaongi-4b on an H100 with `rows` rows in all, 2 in a micro-batch (docs/LAB.md)."""
    return StepCost(rows // 2, 0.1618, 0.1347, 0.0068, 17.11e9, 8.56e9)


@pytest.mark.parametrize("found", study_scaling.MEASURED, ids=lambda found: f"{found.gpus} {found.cards}")
def test_several_gpus_take_what_was_measured(found: study_scaling.Measured) -> None:
    """Compare the parts of a step with the flagship's, with the micro-batches of those cards; H200s update faster."""
    each = dataclasses.replace(flagship(256), micro_seconds=found.micro)
    step = step_seconds(each, found.gpus, found.gpus)
    assert step.total == pytest.approx(found.step, rel=0.01)
    assert step.exchange == pytest.approx(found.exchange, rel=0.01)
    assert step.update == pytest.approx(found.update, rel=0.15 if "H200" in found.cards else 0.02)
    uneven = (found.gpus, found.cards[:4]) == (4, "H200")  # one of them was 3 % slower
    times = study_scaling.simulate(found.gpus, 1 << 20).times
    assert times == pytest.approx(found.times, rel=0.015 if uneven else 0.01)


@pytest.mark.parametrize(
    ("processes", "rows", "times"),
    [
        (2, 256, 1.99),
        (3, 256, 2.95),
        (8, 256, 7.80),
        (16, 256, 15.1),
        (64, 256, 50),
        (64, 1024, 59.8),
        (256, 2048, 221),
    ],
)
def test_more_gpus(processes: int, rows: int, times: float) -> None:
    """Compare with the table from which the design was chosen, whose links are faster than those measured."""
    one = step_seconds(flagship(rows), 1, 1).total
    assert one / step_seconds(flagship(rows), processes, count_owners(processes, 64)).total == pytest.approx(
        times, rel=0.04
    )


def test_the_page_is_what_the_simulation_says() -> None:
    """Write it with `python -m benchmarks.study_scaling --page docs/trillion.md`."""
    assert (ROOT / "docs" / "trillion.md").read_text() == study_scaling.page()


@pytest.fixture(scope="module")
def model() -> Yaongi:
    return Yaongi(load_config("yaongi-4b").model, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize(("processes", "gigabytes"), [(1, 54.2), (2, 39.9), (4, 32.7), (8, 29.2), (64, 26.0)])
def test_the_flagship_before_activations(model: Yaongi, processes: int, gigabytes: float) -> None:
    config = load_config("yaongi-4b")
    forecast = MemoryForecast(model, with_dtype(config), torch.device("cpu"), processes)
    parts = forecast._state
    assert sum(parts.values()) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert forecast.checkpoint_bytes / 1e9 == pytest.approx(28.65, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "processes", "rows", "gigabytes"),
    [
        ("yaongi-4b", 2, 2, 56.31),
        ("yaongi-4b-fp8", 1, 2, 68.67),
        ("yaongi-small", 1, 16, 9.53),
        ("yaongi-small", 2, 32, 15.07),
    ],
)
def test_memory_is_what_was_measured(preset: str, processes: int, rows: int, gigabytes: float) -> None:
    """Compare with the allocator's peaks on H200s, which don't hold NCCL's buffers (docs/LAB.md)."""
    config = load_config(preset)
    model = Yaongi(config.model, device="meta", dtype=torch.bfloat16)
    forecast = MemoryForecast(model, config, torch.device("cuda"), processes, MACHINES["h200"])
    parts = forecast(rows)
    assert (parts.total - parts.base) / 1e9 + 0.1 == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.parametrize(("preset", "wanted"), [("yaongi-4b", "8"), pytest.param("yaongi-4b-fp8", "more", marks=LONG)])
def test_how_many_gpus_are_enough(preset: str, wanted: str, model: Yaongi) -> None:
    """The flagship on cards of 24 GB: where its experts can be spread, eight hold a row."""
    forecast = MemoryForecast(model, load_config(preset), torch.device("cuda"), 1, MACHINES["rtx4090"])
    advice = advise(1, 1, "none", forecast.fits, forecast.enough)
    assert advice == f"try {wanted} GPUs (torchrun), shorter rows (--row-tokens) or a smaller preset"


def test_fsdp_holds_some_layers_whole() -> None:
    """Beside a half of all but the tables, five layers in bfloat16; the largest has the experts."""
    config = load_config("yaongi-small")
    asked = dataclasses.replace(config, run=dataclasses.replace(config.run, parallel="fsdp"))
    model = Yaongi(config.model, device="meta", dtype=torch.bfloat16)
    forecast = MemoryForecast(model, asked, torch.device("cuda"), 2, MACHINES["h100"])
    parts = forecast(1)
    layer = sum(p.numel() for p in model.backbone.layers[1].parameters())
    table = sum(p.numel() for name, p in model.named_parameters() if name.endswith("engram.table.weight"))
    others = sum(p.numel() for p in model.parameters()) - table
    assert parts.gathered == pytest.approx(5 * 2 * layer, rel=0.001)
    assert parts.weights + parts.masters == pytest.approx(4 * others / 2 + (2 + 4) * table, rel=0.001)


@pytest.mark.parametrize("experts", ["bf16", "fp8"])
def test_fp8_weights_take_what_bf16_and_master_copies_take(experts: Precision) -> None:
    """12 bytes per parameter: the master and two casts of a byte, a gradient, a momentum; a checkpoint is as ever."""
    config = load_config("yaongi-4b-fp8")
    precision = dataclasses.replace(config.model.precision, experts=experts)
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
    model = Yaongi(changed.model, device="meta", dtype=torch.bfloat16)
    forecast = MemoryForecast(model, with_dtype(changed), torch.device("cpu"))
    assert sum(forecast._state.values()) / 1e9 == pytest.approx(54.2, rel=0.01)
    assert forecast.checkpoint_bytes / 1e9 == pytest.approx(28.65, rel=0.01)


def with_dtype(config: Config) -> Config:
    """Return the configuration with the dtype that it has on a GPU."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="bfloat16"))


@pytest.mark.parametrize("processes", [3, 8])
def test_owners(model: Yaongi, processes: int) -> None:
    """Every number is owned once, matrices of one stack by one process, and none has much more than another."""
    train = load_config("yaongi-4b").train
    ownership = divide_parameters(model, train, processes)
    names = {p: name for name, p in model.named_parameters()}
    for stack in partition_parameters(model, train)[0]:
        assert len({ownership.owners.get(names[p]) for p in stack.parameters}) == 1
    for p, name in names.items():
        if name in ownership:
            numbers = list(range(len(p)))
            rows = (ownership.rows(name, rank) or slice(None) for rank in range(processes))
            assert [number for part in rows for number in numbers[part]] == numbers, name
    sizes = [0] * processes
    for name, owner in ownership.owners.items():
        sizes[owner] += model.get_parameter(name).numel()
    assert max(sizes) * processes / sum(sizes) < 1.05


def test_groups_of_owners() -> None:
    assert [count_owners(n, 64) for n in (1, 2, 3, 7, 64, 128, 1024)] == [1, 2, 3, 7, 64, 64, 64]
    assert [count_owners(n, 4) for n in (3, 4, 6, 7, 8)] == [3, 4, 3, 1, 4]
    assert count_owners(96, 0) == 48
    heavy, light = Group(("a", "b"), 10, 9.0), [Group((letter,), 10, 3.0) for letter in "cdef"]
    assert assign_owners([*light, heavy], 2) == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 1, "f": 0}


def print_link_speed() -> None:
    """Print the speed of the links between these processes, in bytes per second."""
    world = init_world("cpu")
    print(link_speed(world, numbers=1 << 18))
    world.close()


def test_links(tmp_path: Path) -> None:
    """Measure those of two processes; links without NVLink are pointed out."""
    done = in_processes(2, tmp_path / "log", print_link_speed)
    assert all(1e6 < float(printed) < 1e12 for printed in done.out)
    assert links_here(355e9, one_host=True) == "355 GB/s between GPUs"
    assert links_here(38e9, one_host=True) == "38 GB/s between GPUs: NVLink is not used (nvidia-smi topo -m)"
    assert links_here(38e9, one_host=False) == "38 GB/s between GPUs"


def test_a_dry_run_plans_for_many(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On one process, without a folder; and the option without a dry run is refused before anything is written."""
    given = arguments(tokens, tmp_path / "run", "--batch-tokens", "2048", "--processes", "8")
    assert train_here([*given, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert ", 8 processes, --parallel replicate\n" in printed
    assert "micro-batch  4 x 64, 1 a step and process\n" in printed
    assert re.search(r"\n +a step: micro-batches \d+ %, update \d+ %, exchange \d+ %\ncheckpoint +\d+kB\n", printed)
    with pytest.raises(ValueError, match="train: --processes must come with --dry-run, got 8"):
        train_here(given)
    assert not (tmp_path / "run").exists()


def test_a_small_model_is_timed_on_a_cpu(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its passes draw random numbers, of which nothing is left; a larger one is guessed."""
    given = [*arguments(tokens, tmp_path / "run"), "--dry-run"]
    before = torch.get_rng_state()
    train_here(given)
    assert torch.equal(torch.get_rng_state(), before)
    assert re.search(r"\ntime +about .* tokens/s, timed here\n", capsys.readouterr().out)
    monkeypatch.setattr(passes, "_LARGEST", 1000)
    train_here(given)
    assert "tokens/s, guessed from the speed of a matrix product\n" in capsys.readouterr().out


def test_evaluations_are_part_of_the_time() -> None:
    """Those of the quick start, at steps 0, 80, 160, 240 and 320: 16 rows of each domain, samples of 64 tokens."""
    config = load_config("yaongi-tiny")
    found = passes.Passes(1e9, held_out_row=0.5, sample_token=0.01, basis="")
    assert passes.evaluation_seconds(config, found, 1, domains=2) == pytest.approx(5 * (2 * 16 * 0.5 + 64 * 0.01))
    assert passes.evaluation_seconds(config, found, 3, domains=2) == pytest.approx(5 * (2 * 6 * 0.5 + 64 * 0.01))
