"""Configs, presets, counts and the count command."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from model_support import ENGRAM, small_config

from yaongi import presets
from yaongi.model import EngramConfig, ModelConfig, Yaongi, flops_per_token, load_preset
from yaongi.model.config import PrecisionConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted(Path(presets.__file__).parent.glob("*.toml")), ids=lambda path: path.stem)
def test_presets_load_and_round_trip(path: Path) -> None:
    config = load_preset(path.stem)
    assert config == load_preset(str(path))
    saved = dataclasses.replace(config, precision=PrecisionConfig())  # a saved model has none
    assert saved == ModelConfig.from_dict(config.to_dict())
    assert Yaongi(config, device="meta").count_parameters().total == sum(
        Yaongi(config, device="meta").count_parameters().parts.values()
    )


def test_the_flagship_counts_to_the_parameter() -> None:
    config = load_preset("yaongi-4b")
    assert config.pattern == "".join("*" if i % 6 == 5 else "ME"[(i - i // 6) % 2] for i in range(52))
    assert [len(config.layers_of(letter)) for letter in "ME*"] == [22, 22, 8]
    plain = Yaongi(config.without_engram(), device="meta").count_parameters()
    assert (plain.total, plain.active, plain.engram_tables) == (3_915_737_216, 1_172_662_400, 0)
    assert plain.parts["experts"] == 22 * 64 * 2 * 2048 * 512
    assert plain.parts["embedding"] + plain.parts["head"] == 134_217_728
    assert flops_per_token(config.without_engram(), plain.active, 4096) == pytest.approx(7.62e9, rel=1e-3)
    assert Yaongi(config, device="meta").count_parameters().total == pytest.approx(4.28e9, rel=1e-3)


def test_engram_tables_have_a_prime_of_their_own_for_every_head() -> None:
    config = load_preset("yaongi-4b")
    counts = Yaongi(config, device="meta").count_parameters()
    first, second = (
        engram for engram in (layer.engram for layer in Yaongi(config, device="meta").backbone.layers) if engram
    )
    assert first.plan.primes[0][0] == 200_003
    assert second.plan.primes[0][0] == 500_009
    primes = [p for plan in (first.plan, second.plan) for order in plan.primes for p in order]
    assert len(set(primes)) == len(primes) == 2 * 2 * 8
    assert counts.engram_tables == 32 * sum(primes)


def test_the_other_presets_have_the_specified_shape() -> None:
    pairs = load_preset("yaongi-4b-pairs")
    assert len(pairs.pattern) == 92
    assert pairs.pattern.count("*") == 8
    assert load_preset("yaongi-small").pattern == "MEMEM*EMEME*"
    assert Yaongi(
        load_preset("yaongi-small").without_engram(), device="meta"
    ).count_parameters().active == pytest.approx(0.07e9, rel=0.05)
    nano = Yaongi(load_preset("nemotron-3-nano"), device="meta").count_parameters()
    assert nano.total == 31_577_937_344
    assert load_preset("yaongi-tiny", vocab_size=1000).vocab_size == 1000


def test_count_command_needs_no_memory() -> None:
    """Run `count nemotron-3-nano` in less than 1 GB."""
    probe = (
        "import runpy, sys; sys.argv = ['count', 'count', 'nemotron-3-nano']\n"
        "try: runpy.run_module('yaongi.model', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "31,577,937,344" in done.stdout
    assert "FLOPs per token" in done.stdout
    assert int(done.stdout.split()[-2]) < 1_000_000  # kB, of the process itself


BAD = [
    ({"colour": 1}, "config: keys must be among pattern, "),
    ({"pattern": "MX*"}, "config: pattern must be letters of M, E and *, got 'X'"),
    ({"pattern": ""}, "config: pattern must be letters of M, E and *, got ''"),
    ({"mamba_groups": 3}, "config: mamba_groups must be a divisor of mamba_heads = 4, got 3"),
    ({"attention_kv_heads": 3}, "config: attention_kv_heads must be a divisor of attention_heads = 4, got 3"),
    ({"experts_per_token": 7}, "config: experts_per_token must be 1 to experts = 6, got 7"),
    ({"hidden_size": 0}, "config: hidden_size must be 1 or more, got 0"),
    ({"hidden_size": 24.0}, "config: hidden_size must be of type int, got 24.0"),
    ({"hidden_size": True}, "config: hidden_size must be of type int, got True"),
    ({"eos_token_id": 61}, "config: eos_token_id must be 0 to 60 (vocab_size - 1), got 61"),
    (
        {"attention_backend": "magic"},
        "config: attention_backend must be one of auto, sdpa, varlen, flex, flash, got 'magic'",
    ),
    ({"engram": {}}, "config: engram must be a list of tables, got {}"),
    ({"engram": [{"layer": 0}]}, "engram: 'heads' must be given, got layer"),
    ({"compressed_vocab_size": 62}, "config: compressed_vocab_size must be 1 to vocab_size = 61, got 62"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(BAD)])
def test_a_bad_config_is_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        small_config(**changes)
    assert "\n" not in str(caught.value)


def test_a_bad_engram_is_one_line() -> None:
    for changes, message in (
        ({"orders": (3, 2)}, "engram: orders must be ascending and 2 or more, got (3, 2)"),
        ({"orders": (1, 2)}, "engram: orders must be ascending and 2 or more, got (1, 2)"),
        ({"gate": "none"}, "engram: gate must be one of paper, demo, got 'none'"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            dataclasses.replace(ENGRAM, **changes)
    far = EngramConfig(layer=9, heads=1, head_dim=4, rows=50)
    with pytest.raises(ValueError, match="config: engram must be ascending layers of 0 to 5, got"):
        small_config(engram=[far])


def test_a_missing_key_and_a_missing_preset_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config: 'hidden_size' must be given, got pattern"):
        ModelConfig.from_dict({"pattern": "M"})
    with pytest.raises(
        FileNotFoundError, match=r"preset: name must be one of nemotron-3-nano, yaongi-4b.*got 'yaongi-9b'"
    ):
        load_preset("yaongi-9b")
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nlr = 1\n")
    with pytest.raises(
        ValueError, match=r"preset: mine.toml must have a \[model\] table with a pattern, or go with --init, got train"
    ):
        load_preset(file)
    file.write_text("[model\n")
    with pytest.raises(ValueError, match=r"preset: mine.toml must be TOML, got"):
        load_preset(file)
