"""One optimizer step: the gradient of the global batch, exact for any micro-batch size; then, if finite, the update."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from yaongi.data.row_loader import Batch
from yaongi.model import Yaongi
from yaongi.model.layers.accumulation import fused_accumulation
from yaongi.model.layers.cuda_graph import GraphedFunction
from yaongi.train.config import Training
from yaongi.train.distributed.sharding import local_part
from yaongi.train.optimizer.role_optimizer import RoleOptimizer
from yaongi.train.step.clock import Clock
from yaongi.train.step.guard import first_nonfinite
from yaongi.train.step.objective import NextToken, Objective
from yaongi.world import World

Named = list[tuple[str, nn.Parameter]]
Micros = list[list[torch.Tensor]]  # of each micro-batch, what the objective reads: ids and document ids first


@dataclass(frozen=True)
class StepResult:
    """Measurements of a step over the global batch."""

    loss: float  # mean of what is minimised: nats per predicted token
    z: float  # mean squared logsumexp of the logits; 0 where the objective doesn't measure it
    balance: float  # the experts' sequence balance loss, mean over rows
    gnorm: float  # norm of the gradient before clipping
    targets: int  # what the mean is over: predicted tokens
    text_bytes: int  # UTF-8 bytes of the predicted tokens; 0 for an objective that is no cross entropy
    loads: torch.Tensor  # (MoE layers, E) int64: tokens each expert got
    bad: str | None  # None, or the non-finite tensor nearest to the loss; then nothing was updated
    fp8_saturated: float | None = None  # share of the FP8 casts that saturated; None without FP8
    fp8_reach: float | None = None  # the largest magnitude before an FP8 cast, as a share of what it can hold
    rank_seconds: tuple[float, ...] = ()  # of each of several processes, its micro-batches in the step before
    more: dict[str, float] = field(default_factory=dict)  # other measures of the objective


class Stepper:
    """An optimizer step as a callable: micro-batches in, updated model out."""

    def __init__(
        self,
        model: Yaongi,
        optimizer: RoleOptimizer,
        train: Training,
        world: World,
        token_bytes: torch.Tensor,
        *,
        cuda_graph: bool = True,
        objective: Objective | None = None,
    ) -> None:
        """Prepare the buffers of a step.

        Args:
            token_bytes: (V,), UTF-8 bytes of each id.
            objective: what is minimised; by default the cross entropy of the next tokens.
            cuda_graph: on a GPU, record a micro-batch as a CUDA graph and replay it.
        """
        self._model, self._optimizer, self._train, self._world = model, optimizer, train, world
        self._engine = optimizer.engine
        self._objective: Objective = objective or NextToken(train.z_loss)
        self._scales = model.fp8_scales
        if self._scales is not None and world.size > 1:
            self._scales.maximum = world.maximum
        self._token_bytes = token_bytes.to(world.device)
        self._named: Named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.micro_batches = 0  # begun so far
        self.doing = "the next step"  # for messages
        self._clock = Clock(world.device)
        self._measures = (*self._objective.names, "balance")
        self._sums = torch.zeros(len(self._measures), dtype=torch.float64, device=world.device)
        self._wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)  # of the model's sums
        layers, experts = model.config.pattern.count("E"), model.config.experts
        self._loads = torch.zeros(layers, experts, dtype=torch.int64, device=world.device)
        in_place = self._engine.in_place
        self._vectors = [p for _, p in self._named if p.ndim == 1 and in_place]
        recorded = cuda_graph and in_place and world.device.type == "cuda"
        self._accumulate: Callable[..., None] = (
            GraphedFunction(self._add_micro_batch, "the micro-batch", "add --no-cuda-graph")
            if recorded
            else self._add_micro_batch
        )

    def __call__(self, batches: Sequence[Batch], lr: dict[str, float], bias_rate: float) -> StepResult:
        """Do one step.

        Args:
            batches: this process's micro-batches of the global batch.
            lr: the learning rate of each kind of parameter group.
            bias_rate: the step size of the router's balancing bias.

        Raises:
            ValueError: the global batch has nothing to learn.
        """
        device = self._world.device
        moved = [[part.to(device, non_blocking=True) for part in self._objective.parts(batch)] for batch in batches]
        self.doing = "the count of targets"
        targets, text_bytes = self._count(moved)
        seconds = self._own_seconds()
        with self._clock:
            self._backward(moved, targets)
        self.doing = "the sum of gradients"
        self._engine.reduce_gradients()
        parts = self._sums, self._engine.sum_of_squares().unsqueeze(0), seconds, self._loads.flatten().double()
        sums = self._world.all_reduce(torch.cat(parts))
        most = len(self._sums)
        ranks = sums[most + 1 : most + 1 + len(seconds)]
        loads = sums[most + 1 + len(seconds) :].long().view_as(self._loads)
        measured: Sequence[torch.Tensor] = []
        if self._scales is not None:
            self._scales.share()
            measured = self._scales.measures().double().unbind()
        values = torch.stack(
            [*sums[:most].unbind(), sums[most].sqrt(), targets.double(), text_bytes.double(), *measured, *ranks]
        ).tolist()
        found = dict(zip(self._measures, values, strict=False))
        norm, count, size, *more = values[most:]
        fp8 = more[: len(measured)]
        bad = None
        if all(map(math.isfinite, (found["loss"], norm, *fp8))):
            self._update(loads, norm, lr, bias_rate)
        else:
            bad = self._name_nonfinite(sums[0])
        if self._scales is not None:
            (self._scales.advance if bad is None else self._scales.discard)()
        self.doing = "the next step"
        saturated, reach = fp8 or (None, None)
        return StepResult(
            loss=found.pop("loss"),
            z=found.pop("z", 0.0),
            balance=found.pop("balance"),
            gnorm=norm,
            targets=int(count),
            text_bytes=int(size),
            loads=loads,
            bad=bad,
            fp8_saturated=saturated,
            fp8_reach=reach,
            rank_seconds=tuple(more[len(measured) :]),
            more=found,
        )

    def _own_seconds(self) -> torch.Tensor:
        """Return the seconds of this process's last micro-batches in its place, (N), to be summed; (0) for one."""
        count = self._world.size if self._world.size > 1 else 0
        seconds = torch.zeros(count, dtype=torch.float64, device=self._world.device)
        if count:
            seconds[self._world.rank].fill_(self._clock.last())
        return seconds

    def _count(self, moved: Micros) -> tuple[torch.Tensor, torch.Tensor]:
        """Count what the global batch's mean is over, and the UTF-8 bytes that are predicted."""
        counts = [torch.stack(self._objective.count(parts, self._token_bytes)) for parts in moved]
        targets, text_bytes = self._world.all_reduce(torch.stack(counts).sum(0)).unbind()
        if len(moved[0]) > 2 and not targets:
            raise ValueError(
                f"step: a batch must have a {self._objective.counted}, got none in its {self._train.batch_rows} rows"
            )
        return targets, text_bytes

    def _backward(self, moved: Micros, targets: torch.Tensor) -> None:
        """Replace the last step's gradients and sums by those of these micro-batches."""
        for sums in (self._sums, self._loads):
            sums.zero_()
        self._engine.zero_gradients()
        self._model.refresh_fp8()
        for number, parts in enumerate(moved, 1):
            self.micro_batches += 1
            self.doing = f"micro-batch {number}"
            with self._scales.first_micro_batch() if self._scales and number == 1 else contextlib.nullcontext():
                self._accumulate(targets, *parts)

    def _add_micro_batch(self, targets: torch.Tensor, *parts: torch.Tensor) -> None:
        """Add a micro-batch's gradients, measures, balance and loads to the sums of the step.

        Args:
            targets: scalar, what the global batch's mean is over.
        """
        train = self._train
        with fused_accumulation(self._engine.in_place):
            scale = self._engine.loss_scale
            unit = torch.full((), scale, dtype=self._wide, device=targets.device) / targets
            losses = self._objective(self._model, parts, unit)
            share = len(parts[0]) / train.batch_rows
            loss = losses.loss + scale * train.balance_loss * share * losses.balance
            with self._foreach_vector_gradients():
                loss.backward()
        measures = *(measure / targets for measure in losses.measures), share * losses.balance
        self._sums += torch.stack([measure.detach().double() for measure in measures])
        self._loads += losses.loads

    @contextlib.contextmanager
    def _foreach_vector_gradients(self) -> Iterator[None]:
        """Add the vectors' gradients of a backward pass in a few launches at the end of the block, not one by one."""
        totals = [vector.grad for vector in self._vectors]
        for vector in self._vectors:
            vector.grad = None
        yield
        found = [(total, v.grad) for total, v in zip(totals, self._vectors, strict=True) if v.grad is not None]
        if found:
            torch._foreach_add_(*zip(*found, strict=True))
        for vector, total in zip(self._vectors, totals, strict=True):
            vector.grad = total

    def _update(self, loads: torch.Tensor, norm: float, lr: dict[str, float], bias_rate: float) -> None:
        clip = self._train.clip
        if clip and norm > clip:
            self._engine.scale_gradients(clip / norm)
        self.doing = "the update"
        self._optimizer.set_lr(lr)
        self._optimizer.step(loads=loads)
        self._model.update_router_bias(loads, rate=bias_rate)

    def _name_nonfinite(self, loss: torch.Tensor) -> str:
        """Name a non-finite weight of any process, the root cause; else the non-finite tensor nearest to the loss.

        The backward pass carries a NaN to all earlier layers, so the last parameter with a bad gradient is the nearest
        to the loss.
        """
        weights = ((f"the weight {name}", local_part(p)) for name, p in self._named)
        gradients = (
            (f"the gradient of {n}", local_part(p.grad)) for n, p in reversed(self._named) if p.grad is not None
        )
        here = first_nonfinite(weights)
        site = None if self._scales is None else self._scales.bad_site()
        if here is None and site is not None:
            here = f"{site}, before its cast to fp8,"
        here = here or first_nonfinite(itertools.chain([("the loss", loss)], gradients))
        return next((name for name in self._world.gather(here) if name is not None), "the gradient's norm")
