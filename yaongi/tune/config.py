"""The configuration of a tuning: the trainer's, with other defaults and a few fields more."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from yaongi.model.config import ModelConfig
from yaongi.settings import FieldChecks
from yaongi.train.config import Config, Parallel, Running, Training


@dataclass(frozen=True)
class TuneSettings:
    """Settings of a tuning that decide the weights, beside those of `Training`."""

    objective: Literal["sft", "dpo"] = "sft"  # sft: learn the answers of conversations; dpo: prefer one of two
    epochs: float = 2.0  # how often the conversations or pairs are read; 1 for dpo
    lr_scale: float = 0.1  # factor on --matrix-lr and --adam-lr, which are the peaks of pretraining; 0.01 for dpo
    beta: float = 0.0  # dpo: weight of the log-probabilities; 0: 0.1, or 5 with --length-normalised
    length_normalised: bool = False  # dpo: log-probabilities per token of their answer

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError for one that doesn't fit."""
        FieldChecks("config").types(self)
        for name in ("epochs", "lr_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"config: {name} must be above 0, got {getattr(self, name)}")
        if not self.beta >= 0:
            raise ValueError(f"config: beta must be 0 or more, got {self.beta}")
        if self.objective == "sft" and (self.beta or self.length_normalised):
            raise ValueError("tune: --beta and --length-normalised must go with --objective dpo, got sft")

    @property
    def weight(self) -> float:
        """The β of dpo."""
        return self.beta or (5.0 if self.length_normalised else 0.1)


@dataclass(frozen=True)
class TuneRunning(Running):
    """Settings of where and how a tuning happens; they may change when it is resumed."""

    data: Path = Path("data/chat")  # folder of conversations or preferences, from python -m yaongi.data chat
    out: Path = Path("runs/tune")  # folder of the run: checkpoints, metrics, report, model
    parallel: Parallel = "replicate"  # whole weights on each of several processes
    evaluate_every: int = 100  # steps between evaluations; also before the first and after the last step
    checkpoint_every: int = 100  # steps between checkpoints; 0: only at the end
    sample_tokens: int = 64  # tokens in the answer to each of three fixed questions; 0: none
    base_data: Path | None = None  # token shards of pretraining, to read again and to measure what is forgotten
    stop_prompts: int = 32  # held-out prompts of an evaluation, to see which answers end by themselves; 0: none
    answer_tokens: int = 256  # tokens within which these answers have to end

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError for one that doesn't fit."""
        super().__post_init__()
        if self.parallel != "replicate":
            got = f"{self.parallel}: divided weights don't answer prompts"
            raise ValueError(f"tune: --parallel must be replicate, got {got}")
        for name, low in (("stop_prompts", 0), ("answer_tokens", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"config: {name} must be {low} or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class TuneConfig(Config):
    """The configuration of a tuning."""

    run: TuneRunning = field(default_factory=TuneRunning)
    tune: TuneSettings = field(default_factory=TuneSettings)


def tuning_defaults(model: ModelConfig, warmup: float, **others: Any) -> Training:
    """Return the trainer's settings as tuning has them: a short warm-up, then linearly to 0, without weight decay.

    The router's balancing bias is frozen: a step of 1e-3 is large beside scores within 0 to 1.

    Args:
        warmup: share of the steps.
        others: further fields.
    """
    rows = min(4096, model.max_sequence_length)
    return Training(
        **{
            "tokens": 16 * rows,  # until the data is opened: the epochs decide
            "batch_tokens": 16 * rows,
            "row_tokens": rows,
            "warmup": warmup,
            "decay": 1 - warmup,
            "final_lr": 0.0,
            "weight_decay": 0.0,
            "bias_travel": 0.0,
            "bias_rate": 0.0,
            **others,
        }
    )
