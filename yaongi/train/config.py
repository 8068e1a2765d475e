"""What a run is: the model, what decides its weights (``Training``), and what doesn't (``Running``).

A preset is a TOML file with a ``[model]`` and a ``[train]`` table; every field can be overridden on the command line.
"""

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from yaongi.data.mix import DEFAULT_MIX
from yaongi.model import ModelConfig, load_preset
from yaongi.train.recompute import recomputed_layers
from yaongi.train.schedule import Kind

_MIX = ",".join(f"{domain}={share:g}" for domain, share in DEFAULT_MIX.items())
_CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


@dataclass(frozen=True)
class Training:
    """Everything that decides the weights: a run resumes only with the same values."""

    seed: int = 0  # of the initial weights and the order of the data
    mix: str = _MIX  # shares of the domains
    tokens: float = 15e9  # to train on; the steps follow
    batch_tokens: int = 1 << 20  # a global batch: one optimizer step
    row_tokens: int = 4096  # a row, the sequence the model sees
    schedule: Kind = "wsd"  # warm-up, then stable and decay, or cosine
    warmup: float = 0.01  # share of the steps
    decay: float = 0.2  # share of the steps (wsd)
    final_lr: float = 1e-5  # learning rate of the last step
    matrix_lr: float = 0.02  # Teon and Muon
    adam_lr: float = 3e-3  # AdamW: embedding, head, router, norms, vectors
    table_lr_scale: float = 5.0  # Engram tables: this times adam_lr
    weight_decay: float = 0.1  # decoupled
    momentum: float = 0.95  # of the matrices, Nesterov
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    matrix_optimizer: Literal["teon", "adamw"] = "teon"  # adamw, with matrix_lr: the baseline; the rest stays as it is
    stack: int = 2  # consecutive layers whose matrices are orthogonalised jointly; 1 is Muon
    stacked: str = "qkv"  # which, by commas: qkv (attention), mamba (in_proj's parts, out_proj), shared (experts)
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    z_loss: float = 0.0  # weight of the squared log of the softmax's normaliser
    balance_loss: float = 1e-4  # weight of the experts' sequence balance loss
    bias_rate: float = 1e-3  # step of the router's balancing bias
    bad_steps: int = 3  # non-finite steps skipped in a row before the run stops
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # of the weights; auto: bfloat16 on a GPU
    momentum_dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # of the matrices' momentum; auto: dtype

    @property
    def stacked_kinds(self) -> set[str]:
        """The words of ``stacked``."""
        return set(self.stacked.split(","))

    @property
    def batch_rows(self) -> int:
        """Rows of a global batch."""
        return self.batch_tokens // self.row_tokens

    @property
    def steps(self) -> int:
        """Optimizer steps that ``tokens`` fill, at least one."""
        return max(1, round(self.tokens / self.batch_tokens))

    def __post_init__(self) -> None:
        """ValueError for sizes that don't fit."""
        if self.row_tokens < 2 or self.batch_tokens < self.row_tokens or self.batch_tokens % self.row_tokens:
            got = f"{self.batch_tokens}, {self.row_tokens}"
            raise ValueError(f"config: wanted batch_tokens as a multiple of row_tokens >= 2, got {got}")
        for name in ("tokens", "matrix_lr", "adam_lr", "table_lr_scale", "stack"):
            if not getattr(self, name) > 0:
                raise ValueError(f"config: wanted {name} above 0, got {getattr(self, name)}")
        if unknown := sorted(self.stacked_kinds - {"qkv", "mamba", "shared"}):
            raise ValueError(f"config: wanted stacked from qkv, mamba and shared, by commas, got {unknown[0]!r}")
        for name in ("weight_decay", "clip", "z_loss", "balance_loss", "bias_rate", "bad_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"config: wanted {name} of 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Running:
    """Where and how a run happens; free to change when it is resumed."""

    data: Path = Path("data/tokens")  # folder of token shards
    out: Path = Path("runs/train")  # folder of the run: checkpoints, metrics, report, model
    fresh: bool = False  # start anew, and remove the run that the folder holds
    dry_run: bool = False  # print the plan and stop
    stop_after: int = 0  # save and stop after this step, to go on another time; 0: at the end
    device: Literal["auto", "cpu", "cuda"] = "auto"
    micro_rows: int = 0  # rows a forward pass; 0: what fits
    recompute: str = "none"  # layers computed again in the backward pass: all, or by commas mamba, experts, 7, 0-25
    deterministic: bool = True  # the same bits every time, also on a GPU
    cuda_graph: bool = True  # on one GPU: micro-batches are recorded once and replayed, without waiting for Python
    log_every: int = 10  # steps between lines; every step goes to metrics.jsonl
    evaluate_every: int = 500  # steps between evaluations; also before the first and after the last step
    evaluate_rows: int = 32  # held-out rows a domain
    sample_tokens: int = 64  # length of the three samples; 0: none
    checkpoint_every: int = 500  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # newest checkpoints kept
    keep_every: int = 0  # and every checkpoint whose step is a multiple of this; 0: none
    dollars_per_hour: float = 0.0  # price of the machine
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online with WANDB_API_KEY, else offline
    project: str = "open-yaongi"  # of wandb
    tensorboard: bool = True
    benchmarks: Path | None = None  # JSON of pytest-benchmark to show in the report

    def __post_init__(self) -> None:
        """ValueError for numbers out of range."""
        least = {"log_every": 1, "evaluate_every": 1, "evaluate_rows": 1, "keep_last": 1}
        for name in ("micro_rows", "stop_after", "sample_tokens", "checkpoint_every", "keep_every", "dollars_per_hour"):
            least[name] = 0
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"config: wanted {name} of {low} or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Config:
    """A run."""

    preset: str
    model: ModelConfig
    train: Training = field(default_factory=Training)
    run: Running = field(default_factory=Running)

    def __post_init__(self) -> None:
        """ValueError for layers to recompute that the model doesn't have."""
        recomputed_layers(self.run.recompute, self.model.pattern)


def load_config(name: str) -> Config:
    """The preset ``configs/<name>.toml``, or the TOML file at the path ``name``.

    Raises:
        FileNotFoundError: there is no such preset or file.
        ValueError: it can't be read, or an unknown field or a wrong value stands in it.
    """
    path = Path(name) if name.endswith(".toml") else _CONFIGS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _CONFIGS.glob("*.toml")))
        raise FileNotFoundError(f"config: no {path}; presets: {known}")
    try:
        table = tomllib.loads(path.read_text()).get("train", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not readable as TOML: {error}") from error
    default_out = {"out": Path("runs") / path.stem}
    return Config(
        preset=path.stem,
        model=load_preset(name),
        train=_table(Training, {k: v for k, v in table.items() if k not in _names(Running)}, path),
        run=_table(Running, default_out | {k: v for k, v in table.items() if k in _names(Running)}, path),
    )


def as_dict(config: Config) -> dict[str, Any]:
    """The whole of ``config`` as plain values that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """What differs in ``model`` and ``train`` of two ``as_dict``s, a line each."""
    lines = []
    for part in ("model", "train"):
        old, new = saved.get(part, {}), asked.get(part, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                lines.append(f"{part}.{key}: the run has {old.get(key)}, got {new.get(key)}")
    return lines


def _names(kind: type) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def _table(kind: type, values: dict[str, Any], path: Path) -> Any:
    """``kind`` from a table of a TOML file; numbers may be written as whole numbers."""
    types = {f.name: f.type for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"config: unknown field {key!r} in [train] of {path}")
        default = getattr(kind, key, None)
        if isinstance(default, bool) != isinstance(value, bool) or (
            isinstance(default, (int, float)) != isinstance(value, (int, float)) and default is not None
        ):
            raise ValueError(f"config: wanted {key} in {path} like {default!r}, got {value!r}")
    paths = {k: Path(v) for k, v in values.items() if types[k] in (Path, Path | None)}
    floats = {k: float(v) for k, v in values.items() if types[k] is float}
    return kind(**{**values, **paths, **floats})
