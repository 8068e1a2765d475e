"""`python -m yaongi.model count PRESET`: parameters and FLOPs per token, computed from shapes."""

from dataclasses import dataclass

import tyro

from yaongi import cli


@dataclass(frozen=True)
class Count:
    """Print the number of parameters (total, active and by part) and the training FLOPs per token."""

    preset: tyro.conf.Positional[str]  # name of a preset, or path of a TOML file with a [model] table
    engram: bool = True  # count the Engrams too
    sequence_length: int = 4096  # tokens per row, which the FLOPs of attention depend on

    def run(self) -> None:
        from yaongi.model.config import load_preset
        from yaongi.model.count import flops_per_token
        from yaongi.model.model import Yaongi

        config = load_preset(self.preset)
        config = config if self.engram else config.without_engram()
        counts = Yaongi(config, device="meta").count_parameters()
        rows = [("total", counts.total), ("active", counts.active), ("Engram tables", counts.engram_tables)]
        for name, number in [*rows, *((f"  {part}", number) for part, number in counts.parts.items())]:
            print(f"{name:<22}{number:>16,}")
        flops = flops_per_token(config, counts.active, self.sequence_length)
        print(f"{f'FLOPs per token at {self.sequence_length}':<22}{flops / 1e9:>12,.2f} G")


def main() -> None:
    """Run the subcommand; an error is one line."""
    cli.run(tyro.extras.subcommand_cli_from_dict({"count": Count}, prog="python -m yaongi.model").run)


if __name__ == "__main__":
    main()
