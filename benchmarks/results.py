"""One page of results from the files of `pytest benchmarks/ --benchmark-only --benchmark-json out.json`.

    python -m benchmarks.results out.json [more.json …]      writes docs/results.md and docs/results.png

If several files have the same case, the last one counts. All cases must come from one kind of GPU. The picture has a
bar per case, the fastest peer's time over ours, and a roofline: each case by FLOPs per byte, under the chip's ceilings.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.measure import COPY_BYTES_PER_S, MATMUL_FLOPS_PER_S

COMMAND = "pytest benchmarks/ --benchmark-only --benchmark-json out.json"


@dataclass(frozen=True)
class Row:
    """A case and its figures."""

    file: str
    name: str
    info: dict[str, Any]
    date: str
    versions: str

    @property
    def peers(self) -> dict[str, float]:
        """Milliseconds by peer; other forms of our own (`our …`) don't count."""
        return {
            key.removesuffix(" ms"): v
            for key, v in self.info.items()
            if key.endswith(" ms") and f"x {key[:-3]}" in self.info and not key.startswith("our ")
        }

    @property
    def speedup(self) -> float | None:
        """Speed-up over the fastest peer; None without peers."""
        return min(self.peers.values()) / self.info["ms"] if self.peers else None


def rows_of(paths: list[Path]) -> list[Row]:
    """Return the cases of all files.

    Raises:
        ValueError: a file isn't JSON of pytest-benchmark, or cases come from different GPUs.
    """
    rows: dict[tuple[str, str], Row] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
            for found in content["benchmarks"]:
                file = Path(found["fullname"].partition("::")[0]).stem.removeprefix("bench_")
                info = found["extra_info"]
                versions = f"torch {info['torch']}" if "torch" in info else ""
                row = Row(file, found["name"].removeprefix("test_"), info, content["datetime"][:10], versions)
                rows[file, row.name] = row
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"results: {path} must be JSON of pytest-benchmark, got {error!r}") from error
    gpus = sorted({str(row.info.get("gpu")) for row in rows.values()})
    if len(gpus) != 1:
        raise ValueError(f"results: cases must be of one GPU, got {', '.join(gpus) or 'no case'}")
    for row in rows.values():
        _compare_speeds(row, rows)
    return list(rows.values())


def _compare_speeds(row: Row, rows: dict[tuple[str, str], Row]) -> None:
    """Add the peers of a training step, which are cases of their own: compare the times per million tokens."""
    kind, _, preset = row.name.partition("[")
    if kind != "ours" or "tokens_per_s" not in row.info:
        return
    row.info["ms"] = 1e9 / row.info["tokens_per_s"]
    for (file, name), other in rows.items():
        peer, _, its_preset = name.partition("[")
        if file == row.file and its_preset == preset and peer != kind:
            row.info[f"{peer} ms"] = 1e9 / other.info["tokens_per_s"]
            row.info[f"x {peer}"] = row.info["tokens_per_s"] / other.info["tokens_per_s"]


def page(rows: list[Row]) -> str:
    """Return the page: a heading and a table per benchmark."""
    dates, versions = (sorted({getattr(row, what) for row in rows} - {""}) for what in ("date", "versions"))
    lines = [
        "# Results",
        "",
        f"{', '.join([rows[0].info['gpu'], *versions, *dates])}, `{COMMAND}`. Medians with cold L2, peers in turn; "
        "of training steps the time of a million tokens.",
        "",
        "![How many times as fast as the fastest peer, and roofline](results.png)",
    ]
    for file in dict.fromkeys(row.file for row in rows):
        lines += [
            "",
            f"## {file}",
            "",
            "| case | ours | of the floor | fastest peer | × | more |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in rows if row.file == file]
    return "\n".join([*lines, ""])


def _line(row: Row) -> str:
    info, peers = row.info, row.peers
    fastest = min(peers, key=lambda name: peers[name]) if peers else None
    known = {"ms", "floor_ms", "of_floor", "gpu", "torch", *(f"{p} ms" for p in peers), *(f"x {p}" for p in peers)}
    more = {k: v for k, v in info.items() if k not in known and not str(v).startswith("absent")}
    cells = (
        row.name,
        f"{info['ms']:.4g} ms" if "ms" in info else "",
        f"{info['of_floor']:.0%}" if "of_floor" in info else "",
        f"{fastest} {peers[fastest]:.4g} ms" if fastest else "",
        f"{row.speedup:.2f}" if row.speedup else "",
        ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items()),
    )
    return "| " + " | ".join(cells) + " |"


def _label(row: Row) -> str:
    return row.name if row.name.startswith(row.file) else f"{row.file} {row.name}"


def picture(rows: list[Row], path: Path) -> None:
    """Draw bars and roofline."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = [row for row in rows if row.speedup]
    measured = [row for row in rows if {"tflops", "gb_per_s"} <= row.info.keys()]
    figure, (bars, roof) = pyplot.subplots(1, 2, figsize=(14, 2 + 0.16 * len(compared)), layout="constrained")
    bars.barh([_label(row) for row in compared], [row.speedup or 0 for row in compared], color="tab:blue")
    bars.axvline(1, color="black", linewidth=0.8)
    bars.invert_yaxis()
    bars.tick_params(axis="y", labelsize=6)
    bars.set(title="times as fast as the fastest peer")
    bars.grid(axis="x", alpha=0.3)
    peak = MATMUL_FLOPS_PER_S["bf16"] / 1e12
    intensities = [10 ** (i / 20) for i in range(0, 81)]
    roof.plot(intensities, [min(peak, x * COPY_BYTES_PER_S / 1e12) for x in intensities], color="black", linewidth=0.8)
    for file in dict.fromkeys(row.file for row in measured):
        infos = [row.info for row in measured if row.file == file]
        x = [1e3 * info["tflops"] / info["gb_per_s"] for info in infos]
        roof.plot(x, [info["tflops"] for info in infos], "o", markersize=4, label=file)
    roof.set(
        xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s", title="under the ceilings of the chip"
    )
    roof.grid(alpha=0.3, which="both")
    if measured:
        roof.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    try:
        rows = rows_of(arguments.files)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    (arguments.out / "results.md").write_text(page(rows))
    picture(rows, arguments.out / "results.png")
    print(arguments.out / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
