"""How many tokens Muon and Teon save: one model trained by AdamW, Muon and Teon, on equal tokens and schedule.

    python -m benchmarks.study_learning run --data TOKENS --out FOLDER    trains the missing runs, then draws
    python -m benchmarks.study_learning draw --out FOLDER                 the table, and docs/learning.png

Learning rates of the matrices are tuned first with one seed, AdamW over four values and Muon over three; the winners
train with two more seeds. Embedding, head, router, norms and tables use the same AdamW in all runs. Warm-up is a tenth
of the steps: the preset's fiftieth would be three of 153, too few for AdamW. Each run is a `python -m yaongi.train`,
whose command is printed; a run that is complete in FOLDER isn't repeated. Options that aren't listed here are passed to
each run: `--jobs 3 --micro-rows 32` fits three runs into 80 GB.

Alignment is measured where Teon would stack two layers: ‖V₁ᵀV₂‖²_F / r, the share of one layer's r leading singular
directions that lies within the other's, for the momentum buffers at the end of a Muon run. Unrelated directions have a
share of r / n.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from yaongi.files import read_json_lines

if TYPE_CHECKING:
    import matplotlib.axes

SEEDS = (0, 1, 2)
SWEEPS = {"AdamW": (2.5e-4, 5e-4, 1e-3, 2e-3), "Muon": (0.01, 0.02, 0.04)}  # learning rates of the matrices
WARMUP = 0.1  # share of the steps
LEADING = (1, 4, 16)  # r, the numbers of singular directions to compare
PAIRS = {  # matrices that Teon may stack
    "Q": "q_proj.weight",
    "K": "k_proj.weight",
    "V": "v_proj.weight",
    "Mamba out_proj": "mixer.out_proj.weight",
    "shared up_proj": "shared_experts.up_proj.weight",
    "shared down_proj": "shared_experts.down_proj.weight",
}
STYLES = {  # color and line; dashes, since some curves coincide
    "AdamW": ("tab:gray", "-"),
    "Muon": ("tab:blue", "-"),
    "Muon, half the tokens": ("tab:cyan", "-"),
    "Teon": ("tab:red", "--"),
    "Teon, more stacks": ("tab:orange", ":"),
}
Tensor = torch.Tensor


@dataclass(frozen=True)
class Run:
    """One training: a way to update the matrices, its learning rate, a seed, a share of the tokens."""

    way: str
    lr: float
    seed: int = 0
    share: float = 1.0

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        way = self.way.lower().replace(", ", "-").replace(" ", "-")
        return f"{way}-lr{self.lr:g}-seed{self.seed}" + (f"-share{self.share:g}" if self.share != 1 else "")

    @property
    def options(self) -> list[str]:
        """Options for `python -m yaongi.train`."""
        ways = {
            "AdamW": ["--matrix-optimizer", "adamw"],
            "Muon": ["--stack", "1"],
            "Teon": ["--stack", "2"],
            "Teon, more stacks": ["--stack", "2", "--stacked", "qkv,mamba,shared"],
        }
        return [*ways[self.way], "--matrix-lr", f"{self.lr:g}", "--seed", str(self.seed)]


@dataclass(frozen=True)
class Study:
    """Runs in a folder, and the settings they share."""

    out: Path
    data: Path | None
    preset: str
    tokens: float
    batch_tokens: int
    extra: tuple[str, ...]

    def command(self, run: Run) -> list[str]:
        """Return the command of a run."""
        evaluations = max(1, round(self.tokens * run.share / self.batch_tokens / 12))
        shared = (
            *("--preset", self.preset, "--data", str(self.data), "--out", str(self.out / run.name)),
            *("--tokens", f"{self.tokens * run.share:g}", "--batch-tokens", str(self.batch_tokens)),
            *("--evaluate-every", str(evaluations), "--checkpoint-every", "0", "--keep-last", "1"),
            *("--warmup", f"{WARMUP:g}", "--sample-tokens", "0", "--wandb", "off", "--no-tensorboard"),
        )
        return [sys.executable, "-m", "yaongi.train", *shared, *self.extra, *run.options]

    def evaluations(self, run: Run) -> list[dict[str, Any]]:
        """Return the evaluations of a run if it is complete, else an empty list."""
        path = self.out / run.name / "metrics.jsonl"
        records = read_json_lines(path) if path.is_file() else []
        steps = max((r["steps"] for r in records if r["event"] == "plan"), default=None)
        evaluations = [r for r in records if r["event"] == "evaluation"]
        return evaluations if evaluations and evaluations[-1]["step"] == steps else []

    def train(self, run: Run) -> None:
        """Train a run unless it is complete.

        Raises:
            ValueError: the run is complete but was made by another command.
        """
        command, kept = self.command(run), self.out / run.name / "command.txt"
        text = shlex.join(["python", *command[1:]])
        if self.evaluations(run):
            if kept.is_file() and kept.read_text() != text:
                raise ValueError(f"study: --out must be another, got {self.out} with a run of `{kept.read_text()}`")
            return
        print(text, flush=True)
        subprocess.run(command, check=True)
        kept.write_text(text)

    def best(self, way: str) -> float | None:
        """Return the learning rate with the fewest bits per byte at the end; None while a run is missing."""
        final = {lr: self.evaluations(Run(way, lr)) for lr in SWEEPS[way]}
        return min(final, key=lambda lr: mean_bits(final[lr][-1])) if all(final.values()) else None

    def groups(self) -> dict[str, list[Run]]:
        """Return the compared runs by label, as far as learning rates are known."""
        adamw, muon = self.best("AdamW"), self.best("Muon")
        groups: dict[str, list[Run]] = {}
        if adamw is not None:
            groups["AdamW"] = [Run("AdamW", adamw, seed) for seed in SEEDS]
        if muon is not None:
            groups["Muon"] = [Run("Muon", muon, seed) for seed in SEEDS]
            groups["Muon, half the tokens"] = [Run("Muon", muon, seed, 0.5) for seed in SEEDS]
            for way in ("Teon", "Teon, more stacks"):
                groups[way] = [Run(way, muon, seed) for seed in SEEDS]
        return groups

    def found(self) -> dict[str, list[list[dict[str, Any]]]]:
        """Return the evaluations of complete runs by group, for groups that have any."""
        found = {label: [e for r in runs if (e := self.evaluations(r))] for label, runs in self.groups().items()}
        return {label: runs for label, runs in found.items() if runs}


def sweep() -> Iterator[Run]:
    """Yield the runs that find the learning rates."""
    yield from (Run(way, lr) for way, rates in SWEEPS.items() for lr in rates)


def mean_bits(evaluation: dict[str, Any]) -> float:
    """Return bits per byte, averaged over domains with equal weight."""
    bits: dict[str, float] = evaluation["bpb"]
    return sum(bits.values()) / len(bits)


def spread(values: list[float]) -> str:
    """Format mean, least and most."""
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def table(study: Study) -> str:
    """Return the tables of the sweeps and of the comparison over seeds."""
    lines = ["| sweep, seed 0 | learning rate | bits per byte |", "|---|---|---|"]
    for run in sweep():
        if found := study.evaluations(run):
            lines.append(f"| {run.way} | {run.lr:g} | {mean_bits(found[-1]):.4f} |")
    for way, rates in SWEEPS.items():
        if (best := study.best(way)) in (rates[0], rates[-1]):
            lines += ["", f"{way} is best at {best:g}, the end of its sweep: a better rate may lie beyond"]
    groups = study.found()
    if not groups:
        return "\n".join(lines)
    domains = list(next(iter(groups.values()))[0][-1]["bpb"])
    header = ["matrices by", "seeds", "tokens", *domains, "mean"]
    lines += ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for label, found in groups.items():
        columns = [spread([e[-1]["bpb"][domain] for e in found]) for domain in domains]
        cells = [label, str(len(found)), f"{found[0][-1]['tokens'] / 1e6:.1f} M", *columns]
        lines.append("| " + " | ".join([*cells, spread([mean_bits(e[-1]) for e in found])]) + " |")
    return "\n".join([*lines, "", *reached(groups)])


def reached(groups: dict[str, list[list[dict[str, Any]]]]) -> list[str]:
    """Return when each run first reaches AdamW's final bits per byte, before its own learning rate has decayed."""
    if "AdamW" not in groups:
        return []
    goal = sum(mean_bits(e[-1]) for e in groups["AdamW"]) / len(groups["AdamW"])
    lines = []
    for label in [label for label in groups if label != "AdamW"]:
        when = [next((e["tokens"] / 1e6 for e in found if mean_bits(e) <= goal), None) for found in groups[label]]
        text = ", ".join("never" if tokens is None else f"{tokens:.1f} M tokens" for tokens in when)
        lines.append(f"{label} is at AdamW's final {goal:.4f} after: {text}")
    return lines


def alignment(momenta: dict[str, Tensor]) -> list[str]:
    """Return a table of shares per part, averaged over the pairs of layers, beside those of unrelated directions."""
    lines = ["| part | pairs | r | right | unrelated | left | unrelated |", "|---|---|---|---|---|---|---|"]
    for label, part in PAIRS.items():
        matrices = [m.float() for name, m in momenta.items() if name.endswith(part)]
        pairs = list(zip(matrices[::2], matrices[1::2], strict=False))
        bases = [[torch.linalg.svd(m, full_matrices=False) for m in pair] for pair in pairs]
        for r in LEADING if pairs else ():
            right = [float((a.Vh[:r] @ b.Vh[:r].T).square().sum()) / r for a, b in bases]
            left = [float((a.U[:, :r].T @ b.U[:, :r]).square().sum()) / r for a, b in bases]
            m, n = pairs[0][0].shape
            cells = (sum(right) / len(pairs), r / n, sum(left) / len(pairs), r / m)
            lines.append(f"| {label} | {len(pairs)} | {r} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return lines


def momenta_of(folder: Path) -> dict[str, Tensor]:
    """Return the momentum buffers in a run's newest checkpoint, by parameter, in the layers' order."""
    checkpoints, whole = folder / "checkpoints", folder / "checkpoint.pt"
    dcp_to_torch_save(checkpoints / (checkpoints / "latest").read_text(), whole)
    state = torch.load(whole)["optimizer"]
    whole.unlink()
    return {name: tensors["momentum"] for name, tensors in state.items() if "momentum" in tensors}


def picture(study: Study, path: Path) -> None:
    """Plot bits per byte of each domain against tokens; the band spans the seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = study.found()
    domains = list(next(iter(groups.values()))[0][-1]["bpb"])
    figure, axes = pyplot.subplots(1, len(domains), figsize=(3.5 * len(domains), 3.5), layout="constrained")
    for axis, domain in zip(axes, domains, strict=True):
        for label, found in groups.items():
            tokens = [e["tokens"] / 1e6 for e in found[0]][1:]
            curves = torch.tensor([[e["bpb"][domain] for e in run][1:] for run in found])
            color, line = STYLES[label]
            axis.plot(tokens, curves.mean(0), line, color=color, label=f"{label}, {len(found)} seeds")
            axis.fill_between(tokens, curves.amin(0), curves.amax(0), color=color, alpha=0.25, linewidth=0)
        axis.set(title=domain, xlabel="million tokens", yscale="log")
        for set_format in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            set_format("{x:.2g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set(ylabel="held-out bits per byte")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)


def draw(study: Study, path: Path) -> None:
    """Print the tables and draw the picture for the runs that exist."""
    print(table(study))
    muon = study.groups().get("Muon", [None])[0]
    if muon is not None and (study.out / muon.name / "checkpoints" / "latest").is_file():
        print("\n".join(["", *alignment(momenta_of(study.out / muon.name))]))
    if study.groups():
        picture(study, path)
        print(f"\n{path}")


def train_all(study: Study, jobs: int) -> None:
    """Train the sweeps, then the runs with the best learning rates."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(study.train, sweep()))
        list(pool.map(study.train, [run for runs in study.groups().values() for run in runs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--data", type=Path, help="token shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--picture", type=Path, default=Path("docs/learning.png"))
    parser.add_argument("--preset", default="yaongi-small")
    parser.add_argument("--tokens", type=float, default=20e6, help="of a run")
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time: one starts while another trains")
    known, extra = parser.parse_known_args()
    if known.what == "run" and known.data is None:
        parser.error("run wants --data, a folder of token shards")
    study = Study(known.out, known.data, known.preset, known.tokens, known.batch_tokens, tuple(extra))
    if known.what == "run":
        try:
            train_all(study, known.jobs)
        except (ValueError, subprocess.CalledProcessError) as error:
            sys.exit(str(error))
    draw(study, known.picture)


if __name__ == "__main__":
    main()
