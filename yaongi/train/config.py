"""The configuration of a run: the model, the settings that decide its weights (`Training`), and the rest (`Running`).

A preset is a TOML file with a `[model]` and a `[train]` table; every field can be overridden on the command line.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from yaongi.model.config import ModelConfig
from yaongi.model.hub.checkpoint_folders import find_weights, is_checkpoint, run_config
from yaongi.model.hub.config_json import read_config_json
from yaongi.presets import has_model, read_preset
from yaongi.settings import FieldChecks, from_table
from yaongi.train.recompute import recomputed_layers
from yaongi.train.schedule import Kind, bias_rate


@dataclass(frozen=True)
class Training:
    """Settings that decide the weights: a run resumes only with the same values, but for `resume.TRAIN_CHANGES`."""

    seed: int = 0  # seed of the initial weights and of the data order
    mix: str = ""  # shares of domains, such as ko=40,law=20; none: of those with text the public mix's, or their sizes
    tokens: float = 15e9  # tokens to train on; the number of steps is tokens / batch_tokens
    batch_tokens: int = 1 << 20  # tokens per global batch, that is per optimizer step
    row_tokens: int = 4096  # tokens per packed row, the sequence length of training
    schedule: Kind = "wsd"  # learning rate after the warm-up: wsd (stable, then linear decay) or cosine
    warmup: float = 0.01  # share of the steps spent on the linear warm-up
    decay: float = 0.2  # share of the steps spent on the final decay (wsd only)
    final_lr: float = 1e-5  # learning rate of the last step
    matrix_lr: float = 0.02  # peak learning rate of the matrices (Teon and Muon)
    adam_lr: float = 3e-3  # peak learning rate of AdamW: embedding, head, router, norms, vectors
    table_lr_scale: float = 5.0  # Engram tables learn at adam_lr times this
    weight_decay: float = 0.1  # decoupled weight decay
    momentum: float = 0.95  # Nesterov momentum of the matrices
    beta1: float = 0.9  # AdamW: decay of the first moment
    beta2: float = 0.95  # AdamW: decay of the second moment
    matrix_optimizer: Literal["teon", "adamw"] = "teon"  # adamw: a baseline, AdamW at matrix_lr for the matrices
    stack: int = 2  # consecutive layers whose matrices are orthogonalised jointly (Teon); 1: each alone (Muon)
    stacked: str = "qkv"  # what stack applies to, comma-separated: qkv, mamba (in_proj, out_proj), shared (experts)
    clip: float = 1.0  # clip the gradient to this norm; 0: no clipping
    z_loss: float = 0.0  # weight of the z loss, the squared logsumexp of the logits; 0: none
    balance_loss: float = 1e-4  # weight of the experts' sequence balance loss; 0: none
    bias_travel: float = 4.0  # total of the router's balancing bias's steps in a run; they decay to its end
    bias_rate: float = 1e-3  # constant size of those steps where bias_travel is 0
    bad_steps: int = 3  # consecutive steps with a non-finite loss or gradient to skip before the run stops
    engram_compression: Literal["paper", "korean", "none"] = "paper"  # which token ids Engram takes for the same
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # weights; auto: bfloat16 on a GPU, else float32
    momentum_dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # matrices' momentum buffer; auto: dtype

    @property
    def stacked_kinds(self) -> set[str]:
        """The words of `stacked`."""
        return set(self.stacked.split(","))

    @property
    def batch_rows(self) -> int:
        """Rows per global batch."""
        return self.batch_tokens // self.row_tokens

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: `tokens / batch_tokens`, rounded, at least one."""
        return max(1, round(self.tokens / self.batch_tokens))

    def bias_rate_at(self, step: int, before: int = 0) -> float:
        """Return the step size of the router's balancing bias at `step`, counted from 0.

        Args:
            before: steps of the runs that this one goes on from: it is the end of a run that is as much longer.
        """
        return bias_rate(before + step, before + self.steps, self.bias_travel) if self.bias_travel else self.bias_rate

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError for one that doesn't fit."""
        FieldChecks("config").types(self)
        if self.row_tokens < 2 or self.batch_tokens < self.row_tokens or self.batch_tokens % self.row_tokens:
            got = f"{self.batch_tokens}, {self.row_tokens}"
            raise ValueError(f"config: batch_tokens must be a multiple of row_tokens >= 2, got {got}")
        for name in ("tokens", "matrix_lr", "adam_lr", "table_lr_scale", "stack"):
            if not getattr(self, name) > 0:
                raise ValueError(f"config: {name} must be above 0, got {getattr(self, name)}")
        if unknown := sorted(self.stacked_kinds - {"qkv", "mamba", "shared"}):
            raise ValueError(f"config: stacked must be of qkv, mamba and shared, by commas, got {unknown[0]!r}")
        for name in ("weight_decay", "clip", "z_loss", "balance_loss", "bias_travel", "bias_rate", "bad_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"config: {name} must be 0 or more, got {getattr(self, name)}")


Parallel = Literal["auto", "replicate", "experts", "fsdp"]
PlanFor = Literal["none", "h100", "h200", "a100", "l40s", "rtx4090"]


@dataclass(frozen=True)
class Running:
    """Settings of where and how a run happens; they may change when it is resumed."""

    data: Path = Path("data/tokens")  # folder of the token shards
    out: Path = Path("runs/train")  # folder of the run: checkpoints, metrics, report, model
    fresh: bool = False  # remove the run in the output folder and start from scratch
    init: Path | None = None  # start from the weights of a model folder, or of a run's checkpoint with its momenta
    init_step: int = 0  # the checkpoint of the run of --init; 0: its newest
    from_step: int = 0  # go on from this step's checkpoint, later ones go at the next save; 0: from the newest
    skip_batches: int = 0  # leave out this many batches of the data, such as those after which a run stopped
    dry_run: bool = False  # print the plan and stop
    processes: int = 0  # with --dry-run: plan for so many GPUs; 0: for those that torchrun started
    max_epochs: float = 0.0  # train on fewer tokens where more would read a source more often than this; 0: on all
    allow_epochs: bool = False  # train even if a source is read more than 16 times
    stop_after: int = 0  # save a checkpoint after this step and stop; 0: run to the end
    device: Literal["auto", "cpu", "gpu", "cuda"] = "auto"  # auto: the GPU where there is one, else the CPU
    micro_rows: int = 0  # rows per micro-batch; 0: as many as fit into memory
    parallel: Parallel = "auto"  # of several processes: whole weights on each, experts spread over a host's, or sharded
    expert_parallel_degree: int = 0  # processes over which --parallel experts spreads a layer; 0: those of a host
    recompute: str = "none"  # layers recomputed in the backward pass: none, all, or a list like mamba,experts,7,0-25
    deterministic: bool = True  # give bit-identical results every time, also on a GPU
    cuda_graph: bool = True  # on a GPU, record a micro-batch as a CUDA graph and replay it
    log_every: int = 10  # steps between printed lines; metrics.jsonl records every step
    evaluate_every: int = 500  # steps between evaluations; also before the first and after the last step
    evaluate_rows: int = 32  # held-out rows per domain and evaluation
    evaluate_tasks: Literal["none", "basics", "quick"] = "none"  # score multiple-choice tasks too: ours, or lm-eval's
    evaluate_tasks_every: int = 1  # evaluations from one with tasks to the next
    sample_tokens: int = 64  # tokens in each of the three samples of an evaluation; 0: no samples
    checkpoint_every: int = 500  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # how many of the newest checkpoints to keep
    keep_every: int = 0  # also keep every checkpoint whose step is a multiple of this; 0: none
    plan_for: PlanFor = "none"  # print the plan for a GPU that needn't be here, without data, and stop
    dollars_per_hour: float = 0.0  # price of a GPU, or of a machine without one, for the plan's cost; 0: no cost
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online where there is a key, else off
    project: str = "open-yaongi"  # name of the wandb project
    wandb_name: str = ""  # name of the run in wandb; none: that of the output folder
    wandb_group: str = ""  # group of runs in wandb, such as the seeds of an experiment; none: no group
    wandb_tags: tuple[str, ...] = ()  # tags of the run in wandb
    push_to: str = ""  # OWNER/NAME on the Hugging Face hub for the model at the end; none: nowhere
    tensorboard: bool = True  # write TensorBoard event files to OUT/tensorboard
    benchmarks: Path | None = None  # JSON file of pytest-benchmark to show in the report

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError for a number out of range."""
        FieldChecks("config").types(self)
        least = {"log_every": 1, "evaluate_every": 1, "evaluate_rows": 1, "evaluate_tasks_every": 1, "keep_last": 1}
        for name in (
            "micro_rows",
            "stop_after",
            "init_step",
            "from_step",
            "skip_batches",
            "sample_tokens",
            "checkpoint_every",
            "keep_every",
            "dollars_per_hour",
            "max_epochs",
            "processes",
            "expert_parallel_degree",
        ):
            least[name] = 0
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"config: {name} must be {low} or more, got {getattr(self, name)}")
        for name, other, wrong in (
            ("from_step", "fresh", self.fresh),
            ("skip_batches", "fresh", self.fresh and self.init is None),
        ):
            if wrong and getattr(self, name):
                raise ValueError(f"config: {name} must be 0 with {other}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    preset: str
    model: ModelConfig
    train: Training = field(default_factory=Training)
    run: Running = field(default_factory=Running)

    def __post_init__(self) -> None:
        """Check what model and training must agree on. Raises ValueError for the first that doesn't fit."""
        recomputed_layers(self.run.recompute, self.model.pattern)
        tokens, most = self.train.row_tokens, self.model.max_sequence_length
        if tokens > most:
            raise ValueError(
                f"config: row_tokens must be at most the model's max_sequence_length, {most}, got {tokens}"
            )
        if tokens % 16 and self.model.precision.layers(self.model.pattern):
            rows = self.run.micro_rows or 1
            raise ValueError(f"train: a micro-batch must be a multiple of 16 tokens for fp8, got {rows} x {tokens}")


def load_config(name: str, init: Path | None = None) -> Config:
    """Load the preset `name`, or the TOML file at the path `name`.

    Args:
        init: weights to go on from. Of a preset without a model, they give it, and their run the other settings.

    Raises:
        FileNotFoundError: there is no such preset or file, or nothing at `init`.
        ValueError: it can't be read, or it has an unknown field or a wrong value.
    """
    tables, preset = read_preset(name, whole=init is None), Path(name).name.removesuffix(".toml")
    train = tables.get("train", {})
    if init is not None and not has_model(tables):
        model, former = read_init(init)
        former = {"row_tokens": min(Training.row_tokens, model.max_sequence_length)} | former | {"mix": ""}
        tables, train = {"model": model.to_dict() | tables.get("model", {})}, former | train
        rows = max(1, round(train.get("batch_tokens", Training.batch_tokens) / train["row_tokens"]))
        train["batch_tokens"] = rows * train["row_tokens"]  # whole rows, which may be longer than before
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


def read_init(init: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the model of a folder or run, and the settings with which it was trained, if they are there.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: it can't be read.
    """
    folder = find_weights(init)
    if is_checkpoint(folder):
        from yaongi.model.hub.run_weights import read_run_config  # its tensors are read, and torch is imported

        model, _ = read_run_config(folder)
    else:
        model, _ = read_config_json(folder)
    known = {field.name for field in dataclasses.fields(Training)}
    return model, {key: value for key, value in run_config(folder).get("train", {}).items() if key in known}


def as_dict(config: Config) -> dict[str, Any]:
    """Return all of `config` as plain values that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
