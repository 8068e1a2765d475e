"""Training `yaongi-4b` on 8 to 1,024 H100s, simulated from what one GPU takes: `python -m benchmarks.study_scaling`.

The parts of a step are those of the plan (yaongi/train/plan/scaling.py), which two and four GPUs were measured to take.
At random: GPUs of different speed and micro-batches of different length, of which the slowest counts. Failures, after
which all start anew from the last checkpoint, count by their expected number. `--page docs/trillion.md` writes a page.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from yaongi.train.distributed.ownership import count_owners
from yaongi.train.plan.scaling import StepCost, step_seconds

TOKENS = 1e12
ROWS, ROW_TOKENS, EXPERTS = 2, 4096, 64  # of a micro-batch; of yaongi-4b
MICRO_SECONDS = 0.1618  # of four H100s, the mean (docs/LAB.md, 2026-11-27)


@dataclass(frozen=True)
class Measured:
    """Steps of 2^20 tokens in micro-batches of two rows, by `benchmarks.study_processes`."""

    gpus: int
    cards: str
    micro: float  # seconds of a micro-batch, one GPU alone, the mean of all
    step: float  # seconds
    times: float  # the speed of one GPU
    exchange: float  # seconds: gradients reduced, weights gathered
    update: float  # seconds: gradients to zero, the optimizer


# docs/LAB.md. The update of one GPU is docs/results.md's.
MEASURED = (
    Measured(1, "H100, 2026-11-27", 0.1618, 20.748, 1.0, 0.0, 0.1477),
    Measured(2, "H200, 2026-11-28", 0.1531, 9.8846, 1.99, 0.0519, 0.0786),
    Measured(4, "H100, 2026-11-27", 0.1618, 5.2705, 3.94, 0.0633, 0.0494),
    Measured(4, "H200, 2026-11-28", 0.1518, 5.0107, 3.89, 0.0631, 0.0435),
)
SPREAD = 0.003  # standard deviation of the GPUs' speed: 161.1 to 162.1 ms
NOISE = 0.003  # of a micro-batch
GPU_HOURS_PER_FAILURE = 51_000  # 419 interruptions in 54 days of 16,384 GPUs (the Llama 3 report)
RESTART = 300.0  # seconds: noticed, imports, data, checkpoint
CHECKPOINT = 28.65e9  # bytes
BETWEEN_CHECKPOINTS, HOLD_UP = 1800.0, 0.5  # seconds
DOLLARS = 2.5  # per GPU-hour
BATCHES = {8: 1, 16: 1, 32: 2, 64: 4, 128: 8, 256: 8, 512: 16, 1024: 32}  # 2^20 tokens per step, by GPUs
STEPS = 400  # simulated
LARGE_SPEED = 14_600  # tokens/s of a GPU, assumed


@dataclass(frozen=True)
class Outcome:
    """A simulated run over TOKENS."""

    gpus: int
    batch: int  # tokens
    step: float  # seconds, mean
    times: float  # the speed of one GPU
    days: float
    failures: float

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together."""
        return self.days * 24 * self.gpus


def cost(batch: int, faster: float = 1.0) -> StepCost:
    """Return what a step of `batch` tokens takes on one H100; `faster`: how much faster a micro-batch is."""
    micro = batch // (ROWS * ROW_TOKENS)
    return StepCost(micro, MICRO_SECONDS / faster, 0.1347, 0.0068, 17.11e9, 8.56e9)


def simulate(gpus: int, batch: int, faster: float = 1.0, seed: int = 0) -> Outcome:
    """Simulate steps, and the failures of a whole run."""
    rng = np.random.default_rng(seed)
    each, owners = cost(batch, faster), count_owners(gpus, EXPERTS)
    parts = step_seconds(each, gpus, owners)
    count = -(-each.micro_batches // gpus)
    speeds = rng.normal(1, SPREAD, gpus)
    noise = rng.normal(0, NOISE / math.sqrt(count), (STEPS, gpus))
    slowest = ((speeds + noise) * parts.micro_batches).max(1).mean()
    step = float(slowest) + parts.update + parts.exchange
    seconds = TOKENS / batch * step * (1 + HOLD_UP / BETWEEN_CHECKPOINTS)
    failures = seconds / 3600 * gpus / GPU_HOURS_PER_FAILURE
    seconds += failures * (RESTART + BETWEEN_CHECKPOINTS / 2)
    one = step_seconds(each, 1, 1).total
    return Outcome(gpus, batch, step, one / step, seconds / 86400, failures)


def table(faster: float = 1.0) -> list[str]:
    """Return a table of all numbers of GPUs, in Markdown."""
    names = ("GPUs", "tokens a step", "micro-batches a GPU", "s a step", "× one GPU", "tokens/s", "days", "GPU-hours")
    head = (*names, "dollars", "failures")
    lines = [f"| {' | '.join(head)} |", "|" + len(head) * "---|"]
    for gpus, millions in BATCHES.items():
        run = simulate(gpus, millions << 20, faster)
        micro = run.batch / (ROWS * ROW_TOKENS) / gpus
        cells = (
            f"{gpus:,}", f"{millions} M", f"{micro:.0f}", f"{run.step:.3f}",
            f"{run.times:,.1f} ({100 * run.times / gpus:.0f} %)", f"{run.batch / run.step:,.0f}", f"{run.days:.2f}",
            f"{run.gpu_hours:,.0f}", f"{DOLLARS * run.gpu_hours:,.0f}", f"{run.failures:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def checks() -> list[str]:
    """Return a table that compares the parts of a step with what was measured, in Markdown."""
    names = ("GPUs", "cards", "s a step", "× one GPU", "exchange, ms", "update, ms")
    lines = [f"| {' | '.join(names)} |", "|" + len(names) * "---|"]
    for found in MEASURED:
        faster = MICRO_SECONDS / found.micro
        run = simulate(found.gpus, 1 << 20, faster)
        parts = step_seconds(cost(run.batch, faster), found.gpus, count_owners(found.gpus, EXPERTS))
        cells = (
            f"{found.gpus}",
            found.cards,
            f"{run.step:.3f} / {found.step:.3f}",
            f"{run.times:.2f} / {found.times:.2f}",
            f"{1e3 * parts.exchange:.1f} / {1e3 * found.exchange:.1f}",
            f"{1e3 * parts.update:.1f} / {1e3 * found.update:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page() -> str:
    """Return the page for one trillion tokens."""
    steps, saves = TOKENS / 2**22, simulate(64, 4 << 20).days * 86400 / BETWEEN_CHECKPOINTS
    kept, size = TOKENS / 25e9 * CHECKPOINT / 1e12, f"{CHECKPOINT / 1e9:.2f} GB"
    notes = (
        f"A GPU-hour at {DOLLARS} dollars. A failure each {GPU_HOURS_PER_FAILURE:,} GPU-hours, as Llama 3's training "
        f"had; each costs {RESTART / 60:.0f} minutes and half of the {BETWEEN_CHECKPOINTS / 60:.0f} between two "
        "checkpoints.",
        f"GPUs differ by {100 * SPREAD:.1f} % in speed, as four did; all wait for the slowest.",
        f"64 GPUs: {steps:,.0f} steps, {saves:,.0f} checkpoints of {size}; one kept every 25 B tokens is "
        f"{kept:.2f} TB.",
        "Tokens a step grow with the GPUs, so that each has four micro-batches or more. That is a choice made before a "
        "run: learning rates aren't scaled for you.",
        f"A model of 30 B parameters, 3.2 B of them active, at an assumed {LARGE_SPEED:,} tokens/s a GPU, with which "
        f"`nemotron-3-nano` is said to be trained in FP8 elsewhere; not measured here: {large()}.",
        f"Without NVLink, at 20 GB/s, eight GPUs take {without_nvlink():.2f} s a step instead of "
        f"{simulate(8, 1 << 20).step:.2f}.",
        "Data: 2 TB of shards, 3.8 TB of text. At 40 % Korean that is 400 B tokens of it. A text read four times is "
        "worth nearly four texts, more is not (arXiv 2305.16264): 100 B different Korean tokens are "
        "wanted, about 0.5 TB.",
    )
    return "\n".join(
        [
            "# One trillion tokens, planned",
            "",
            "`yaongi-4b` on H100s in nodes of eight, made by `python -m benchmarks.study_scaling --page "
            "docs/trillion.md`. A simulation, not a measurement: of more than four GPUs nothing was measured.",
            "",
            "Simulated / measured, of steps of 1 M tokens, with the mean micro-batch of those cards; one of the four "
            "H200s was 3 % slower:",
            "",
            *checks(),
            "",
            "In bf16, as one GPU trains today (50,600 tokens/s):",
            "",
            *table(),
            "",
            "If a GPU did 83,000 tokens/s, the aim of FP8:",
            "",
            *table(83_000 / 50_600),
            "",
            *(f"- {note}" for note in notes),
            "",
        ]
    )


def large() -> str:
    """Return the days and dollars of a model of 30 B parameters on 8, 64 and 256 GPUs, as if all kept up the speed."""
    hours = TOKENS / LARGE_SPEED / 3600
    days = ", ".join(f"{hours / 24 / gpus:.1f} days on {gpus}" for gpus in (8, 64, 256))
    return f"{days} GPUs, {hours:,.0f} GPU-hours, {DOLLARS * hours:,.0f} dollars"


def without_nvlink() -> float:
    """Return the seconds of a step of eight GPUs at 20 GB/s."""
    return step_seconds(cost(1 << 20), 8, 8, 20e9).total


def main() -> None:
    """Print the table and the comparison, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    asked = parser.parse_args()
    if asked.page:
        asked.page.write_text(page())
    print("\n".join([*table(), "", "simulated / measured:", *checks()]))


if __name__ == "__main__":
    main()
