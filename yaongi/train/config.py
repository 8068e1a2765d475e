"""What a run is: the model, what decides its weights (`Training`), and what doesn't (`Running`).

A preset is a TOML file with a `[model]` and a `[train]` table; every field can be overridden on the command line.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from yaongi.data.mix import DEFAULT_MIX_TEXT
from yaongi.model import ModelConfig
from yaongi.presets import read_preset
from yaongi.settings import FieldChecks, from_table
from yaongi.train.recompute import recomputed_layers
from yaongi.train.schedule import Kind


@dataclass(frozen=True)
class Training:
    """Everything that decides the weights: a run resumes only with the same values."""

    seed: int = 0  # of the initial weights and the order of the data
    mix: str = DEFAULT_MIX_TEXT  # shares of the domains
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
        """The words of `stacked`."""
        return set(self.stacked.split(","))

    @property
    def batch_rows(self) -> int:
        """Rows of a global batch."""
        return self.batch_tokens // self.row_tokens

    @property
    def steps(self) -> int:
        """Optimizer steps that `tokens` fill, at least one."""
        return max(1, round(self.tokens / self.batch_tokens))

    def weight_dtype(self, device: torch.device) -> torch.dtype:
        """Of the weights: as configured, or bfloat16 on a GPU and float32 on a CPU."""
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return getattr(torch, self.dtype)

    def matrix_momentum_dtype(self, device: torch.device) -> torch.dtype:
        """Of the matrices' momentum: as configured, or that of the weights."""
        return self.weight_dtype(device) if self.momentum_dtype == "auto" else getattr(torch, self.momentum_dtype)

    def __post_init__(self) -> None:
        """ValueError for values that don't fit."""
        FieldChecks("config").types(self)
        if self.row_tokens < 2 or self.batch_tokens < self.row_tokens or self.batch_tokens % self.row_tokens:
            got = f"{self.batch_tokens}, {self.row_tokens}"
            raise ValueError(f"config: batch_tokens must be a multiple of row_tokens >= 2, got {got}")
        for name in ("tokens", "matrix_lr", "adam_lr", "table_lr_scale", "stack"):
            if not getattr(self, name) > 0:
                raise ValueError(f"config: {name} must be above 0, got {getattr(self, name)}")
        if unknown := sorted(self.stacked_kinds - {"qkv", "mamba", "shared"}):
            raise ValueError(f"config: stacked must be of qkv, mamba and shared, by commas, got {unknown[0]!r}")
        for name in ("weight_decay", "clip", "z_loss", "balance_loss", "bias_rate", "bad_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"config: {name} must be 0 or more, got {getattr(self, name)}")


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
    recompute: str = "none"  # layers computed again in the backward pass: all, or mamba, experts, 7, 0-25 with commas
    deterministic: bool = True  # the same bits every time, also on a GPU
    cuda_graph: bool = True  # micro-batches recorded once as a CUDA graph and replayed, on one GPU
    log_every: int = 10  # steps between lines; every step goes to metrics.jsonl
    evaluate_every: int = 500  # steps between evaluations; also before the first and after the last step
    evaluate_rows: int = 32  # held-out rows per domain
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
        FieldChecks("config").types(self)
        least = {"log_every": 1, "evaluate_every": 1, "evaluate_rows": 1, "keep_last": 1}
        for name in ("micro_rows", "stop_after", "sample_tokens", "checkpoint_every", "keep_every", "dollars_per_hour"):
            least[name] = 0
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"config: {name} must be {low} or more, got {getattr(self, name)}")


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
    """The preset `name`, or the TOML file at the path `name`.

    Raises:
        FileNotFoundError: there is no such preset or file.
        ValueError: it can't be read, or an unknown field or a wrong value stands in it.
    """
    tables, preset = read_preset(name), Path(name).name.removesuffix(".toml")
    train = tables.get("train", {})
    known = {field.name: kind for kind in (Training, Running) for field in dataclasses.fields(kind)}
    unknown = next((key for key in train if key not in known), None)
    if unknown is not None:
        raise ValueError(f"config: keys of [train] in {preset} must be among {', '.join(known)}, got {unknown!r}")
    parts = {kind: {key: train[key] for key in train if known[key] is kind} for kind in (Training, Running)}
    return Config(
        preset,
        ModelConfig.from_dict(tables["model"]),
        from_table(Training, parts[Training], "config"),
        from_table(Running, {"out": Path("runs") / preset} | parts[Running], "config"),
    )


def as_dict(config: Config) -> dict[str, Any]:
    """The whole of `config` as plain values that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
