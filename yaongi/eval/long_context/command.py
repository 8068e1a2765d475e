"""`python -m yaongi.eval passkey`: whether a model finds a number again, by length of the text and depth in it."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Passkey:
    """Hide numbers in long Korean texts and ask for them: a table, JSON and a heat map. Works under torchrun too."""

    folder: tyro.conf.Positional[Path]  # model folder, run (its newest checkpoint) or checkpoint
    out: Path = Path("passkey")  # folder to write: passkey.json and passkey.png
    lengths: tuple[int, ...] = ()  # tokens of the texts; none: 1024, 2048 and so on up to the longest the model reads
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the number stands: 0 the beginning, 1 the end
    tries: int = 10  # texts for each length and depth
    seed: int = 0  # of texts and numbers
    device: str = "auto"  # auto (a GPU where there is one), cpu, gpu or cuda

    def run(self) -> None:
        """Score, print the table, and write the files."""
        from yaongi.eval.evaluate import Settings, load
        from yaongi.eval.long_context.heat_map import heat_map, table
        from yaongi.eval.long_context.passkey import retrieved, trials
        from yaongi.eval.processes import in_world
        from yaongi.files import write_json
        from yaongi.world import World

        self._check()

        def score(world: World) -> None:
            say = print if world.is_main else (lambda _: None)
            loaded = load(self.folder, Settings(self.out), world, say)
            longest = loaded.scorer.max_length
            lengths = self.lengths or tuple(1 << n for n in range(10, longest.bit_length()) if 1 << n <= longest)
            if not lengths or max(lengths) > longest:
                wanted = f"at most the model's max_sequence_length, {longest}"
                raise ValueError(f"passkey: --lengths must be {wanted}, got {max(lengths, default=1024)}")
            found = list(trials(loaded.answerer.tokenizer, lengths, self.depths, self.tries, self.seed))
            cells = retrieved(loaded.scorer, found)
            say(table(cells))
            if world.is_main:
                self.out.mkdir(parents=True, exist_ok=True)
                rows = [
                    {"length": length, "depth": depth, "retrieved": share} for (length, depth), share in cells.items()
                ]
                write_json(
                    self.out / "passkey.json",
                    {"model": loaded.description, "tries": self.tries, "seed": self.seed, "cells": rows},
                )
                (self.out / "passkey.png").write_bytes(heat_map(cells))
                say(f"heat map: {self.out / 'passkey.png'}")

        in_world(self.device, score)

    def _check(self) -> None:
        if self.tries < 1 or not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            got = f"{self.tries} and {', '.join(map(str, self.depths))}"
            raise ValueError(f"passkey: --tries must be 1 or more, and --depths within 0 to 1, got {got}")
