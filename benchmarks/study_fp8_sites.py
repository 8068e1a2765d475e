"""What FP8 loses at every site of a model in training: the shares that are cast to zero and that saturate.

    python -m benchmarks.study_fp8_sites --steps 20 --preset yaongi-4b-fp8 --data TOKENS --out RUN [options of train]

After `--steps` optimizer steps the casts of one more step are looked at. A value is lost to zero if the same cast with
256 times the scale isn't zero. The table has a row per kind of site, with the median and the worst of all layers; all
sites are in RUN/fp8_sites.json.
"""

import argparse
import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from yaongi import cli
from yaongi.files import write_json
from yaongi.model.layers.fp8_scales import Fp8Scales, Site
from yaongi.train.command_line import parse
from yaongi.train.session import Session
from yaongi.world import init_world

Tensor = torch.Tensor
FINER = 2.0**8
LARGEST = 448
Sites = dict[str, dict[str, float]]


def codes_of(results: tuple[Tensor, ...]) -> Tensor:
    """Return the cast among a producer's results, in row order."""
    return next(t for t in results if t.dtype == torch.float8_e4m3fn and t.numel()).half()


@contextlib.contextmanager
def watched() -> Iterator[Sites]:
    """Within the block, note the shares of each site's casts; the last cast counts."""
    found: Sites = {}
    plain = Fp8Scales.cast

    def cast(
        self: Fp8Scales,
        name: str,
        produce: Callable[[Site], Any],
        *,
        seen: bool = True,
        rehearse: Callable[[Site], Any] | None = None,
    ) -> Any:
        if seen:
            site, try_cast = self.site(name), rehearse or produce
            codes = codes_of(try_cast(site))
            finer = codes_of(try_cast(Site(site.scale * FINER, site.unit / FINER, site.amax.clone())))
            some = finer != 0
            found[name] = {
                "to_zero": float((some & (codes == 0)).sum() / some.sum().clamp(min=1)),
                "saturated": float((codes.abs() == LARGEST).double().mean()),
                "reach": float(codes.abs().max() / LARGEST),
            }
        return plain(self, name, produce, seen=seen, rehearse=rehearse)

    with mock.patch.object(Fp8Scales, "cast", cast):
        yield found


def table(sites: Sites) -> str:
    """Return the median and the worst of each kind of site, by its letter."""
    kinds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, shares in sites.items():
        kinds[name.split()[-1]].append(shares)
    lines = ["| site | layers | to zero: median | worst | saturated: worst | largest code / 448: median | worst |"]
    lines.append("|---|---|---|---|---|---|---|")
    for letter, rows in kinds.items():
        zero, full, reach = ([row[key] for row in rows] for key in ("to_zero", "saturated", "reach"))
        cells = f"{median(zero):.2%} | {max(zero):.2%} | {max(full):.4%} | {median(reach):.2f} | {max(reach):.2f}"
        lines.append(f"| {letter} | {len(rows)} | {cells} |")
    return "\n".join(lines)


def study(arguments: list[str], steps: int) -> Sites:
    """Train for some steps, and return the shares of one more step's casts.

    Raises:
        ValueError: nothing of the model runs in FP8.
    """
    config = parse([*arguments, "--no-cuda-graph", "--fresh"])
    if not config.model.precision.layers(config.model.pattern):
        raise ValueError("study_fp8_sites: some role must be fp8, got none: --preset yaongi-4b-fp8")
    session = Session(config, init_world(config.run.device))
    session.start()
    with session:
        batches = session.batches()
        for _ in range(steps):
            session.train_step(next(batches))
        with watched() as sites:
            session.train_step(next(batches))
    write_json(Path(config.run.out) / "fp8_sites.json", sites)
    return sites


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    known, rest = parser.parse_known_args(arguments)
    print(table(study(rest, known.steps)))
    return 0


if __name__ == "__main__":
    cli.run(lambda: run(sys.argv[1:]))
