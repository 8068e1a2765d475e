"""Teon, Muon and AdamW by role, as one `torch.optim.Optimizer`.

Each parameter has a role (`roles.py`):

- Matrices take Teon (Q, K and V of consecutive attention layers jointly) or Muon; in the baseline, AdamW with a
  learning rate of their own. A projection that holds several matrices is updated by ranges of rows.
- Vectors, embedding, head and router take AdamW.
- Engram tables take Adam on the rows that have a gradient.

A parameter narrower than float32 has a float32 master copy: the update changes the master copy, and the parameter is
its cast. Beside such parameters a float32 one, whose casts are FP8, is its own master. With several processes each
keeps the state of what it owns and updates that (`replicas.py`); under FSDP the state is sharded like the parameters.
Frozen parameters, which require no gradient, are left out, and so are in each step the experts without tokens. A step
doesn't synchronise with the GPU, except to find the tables' rows.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from yaongi.kernels import teon_update
from yaongi.model import Yaongi
from yaongi.train.config import Training
from yaongi.train.distributed.replicas import Replicas
from yaongi.train.distributed.sharding import Shards, is_sharded, local_part, local_rows
from yaongi.train.optimizer.idle_experts import Active, expert_layers, left_alone, local_mask
from yaongi.train.optimizer.partition import MATRIX, TABLE, VECTOR, AdamwPart, TeonStack, partition_parameters
from yaongi.train.optimizer.sharded import step_sharded
from yaongi.train.optimizer.sparse_adam import adam_rows
from yaongi.train.optimizer.state_dict import load_state
from yaongi.world import World

EPS = 1e-8
WIDE = (torch.float32, torch.float64)
State = dict[str, torch.Tensor]


class RoleOptimizer(torch.optim.Optimizer):
    """The optimizer of a `Yaongi` model. Each group has a `kind`: matrix, vector or table."""

    def __init__(
        self, model: Yaongi, train: Training, momentum_dtype: torch.dtype, engine: Replicas | Shards | None = None
    ) -> None:
        """Make the groups and the state.

        Args:
            momentum_dtype: dtype of the matrices' momentum buffers.
            engine: what several processes do together; None for one process.
        """
        self._train = train
        self.engine = engine or Replicas(model, World(0, 1, model.lm_head.weight.device))
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._own_masters = set(model.fp8_weights()) if model.lm_head.weight.dtype not in WIDE else set()
        self._expert_layers = expert_layers(model)
        self._units, self._vectors, self._tables = partition_parameters(model, train)
        self._matrices = list(dict.fromkeys(p for unit in self._units for p in unit.parameters))
        in_groups: dict[str, list[nn.Parameter]] = {
            MATRIX: self._matrices + [v.parameter for v in self._vectors if v.kind == MATRIX],
            VECTOR: [v.parameter for v in self._vectors if v.rows is None and v.kind == VECTOR],
            TABLE: self._tables,
        }
        self.peak_lr: dict[str, float] = {
            MATRIX: train.matrix_lr,
            VECTOR: train.adam_lr,
            TABLE: train.adam_lr * train.table_lr_scale,
        }
        groups = [{"params": p, "kind": kind, "lr": self.peak_lr[kind]} for kind, p in in_groups.items()]
        super().__init__(groups, {"stack": train.stack, "stacked": train.stacked})
        self._make_state(momentum_dtype)

    def set_lr(self, lr: dict[str, float]) -> None:
        """Set the learning rate of each kind of group for the next step."""
        for group in self.param_groups:
            group["lr"] = lr[group["kind"]]

    def _lr(self, kind: str) -> float:
        """Return the learning rate of a kind, as it stands in the groups: a torch scheduler may have changed it."""
        return next(g["lr"] for g in self.param_groups if g["kind"] == kind)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, loads: torch.Tensor | None = None
    ) -> None:
        """Apply the gradients, and give every process the new weights.

        Args:
            loads: (expert layers, E), the tokens that each expert got in the global batch. The weights and the state of
                experts that got none stay as they are: a step with a stale momentum is as large as any. None: all
                experts are updated.

        Raises:
            ValueError: a closure was given.
            RuntimeError: a parameter has no gradient; nothing has changed then.
        """
        if closure is not None:
            raise ValueError("optimizer: closure must be None, got one")
        missing = [name for p, name in self._names.items() if p.grad is None]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise RuntimeError(f"optimizer: every parameter must have a gradient, got none of {missing[0]}{more}")
        for parameter in filter(self.engine.owns, self._tables):  # first: it waits for the GPU, which has little to do
            self._step_table(parameter)
        sharded: list[TeonStack] = []
        whole: list[TeonStack] = []
        for unit in self._units:
            if self.engine.owns(unit.parameters[0]):
                (sharded if is_sharded(unit.parameters[0]) else whole).append(unit)
        used = None if loads is None else loads != 0
        active: Active = {}
        if used is not None:
            active = {p: self.engine.own_experts(used[layer], p) for p, layer in self._expert_layers.items()}
        self._step_whole(whole, active)
        split_gradients = step_sharded(sharded, self.state, self._split_rows(), self._train, self._lr(MATRIX), active)
        self._step_vectors(split_gradients, active)
        self.engine.gather_weights()

    def tensors(self) -> dict[str, State]:
        """Return the state by parameter name: the tensors that `step` changes in place, not copies.

        With several processes each has what it owns; of a parameter divided by rows, that is a part of a `DTensor`.
        """
        found = {
            name: {key: self.engine.saved(value, p) for key, value in self.state[p].items()}
            for p, name in self._names.items()
            if self.engine.owns(p)
        }
        for parameter in self.engine.masters:
            found[self._names[parameter]]["master"] = parameter.detach()
        return found

    def master_names(self) -> set[str]:
        """Return the names of the parameters that have a master copy, on this process or another."""
        own = self._own_masters | self.engine.masters
        return {name for p, name in self._names.items() if p.dtype not in WIDE or p in own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the values of a `state_dict` into the state, which keeps its dtypes and devices, and the learning rates.

        Raises:
            ValueError: it is the state of another model or of other stacks; nothing has changed then.
        """
        load_state(self.param_groups, self.state, state_dict)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast every master copy into its parameter, on every process; call it after the master copies were loaded."""
        self._cast((parameter, None) for parameter in self._names if self.engine.owns(parameter))
        self.engine.gather_weights()

    def _cast(self, parts: Iterable[tuple[nn.Parameter, slice | None]]) -> None:
        """Cast the master copies into their parameters, or into some rows of them."""
        casts, masters = [], []
        for parameter, rows in parts:
            if "master" in self.state[parameter]:
                if parameter in self._own_masters:
                    continue
                casts.append(rows_of(local_part(self._own(parameter)), rows))
                masters.append(rows_of(local_part(self.state[parameter]["master"]), rows))
        if casts:
            torch._foreach_copy_(casts, masters)

    def _make_state(self, momentum_dtype: torch.dtype) -> None:
        for parameter in self._names:
            if parameter.dtype not in WIDE:
                parameter.grad_dtype = torch.float32  # for gradient accumulation
        for parameter in filter(self.engine.owns, self._names):
            if parameter.dtype not in WIDE:
                self.state[parameter]["master"] = self._own(parameter).float()
            elif parameter in self._own_masters:
                self.state[parameter]["master"] = self._own(parameter)
        for parameter in filter(self.engine.owns, self._matrices):
            self.state[parameter]["momentum"] = torch.zeros_like(self._own(parameter), dtype=momentum_dtype)
        for vector in self._owned_vectors():
            like = self._weight(vector.parameter)
            if vector.rows is not None:  # a few rows, so under FSDP every process holds their moments unsharded
                shape = vector.rows.stop - vector.rows.start, *like.shape[1:]
                like = torch.empty(shape, dtype=like.dtype, device=like.device)
            self._make_moments(vector.parameter, like, like.device)
        for table in filter(self.engine.owns, self._tables):
            self._make_moments(table, self._weight(table), torch.device("cpu"))

    def _make_moments(self, parameter: nn.Parameter, like: torch.Tensor, counter: torch.device) -> None:
        """Make Adam's state; its step counter lies on the device `counter`, where it is read."""
        self.state[parameter] |= {
            "exp_avg": torch.zeros_like(like),
            "exp_avg_sq": torch.zeros_like(like),
            "step": torch.zeros((), dtype=torch.float32, device=counter),
        }

    def _weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the tensor to update: the master copy, or own rows of the parameter itself if it has none."""
        return self.state[parameter].get("master", self._own(parameter))

    def _own(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the rows of a parameter that this process updates."""
        return self.engine.own(parameter.detach(), parameter)

    def _own_gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        return self.engine.own(gradient_of(parameter), parameter)

    def _owned_vectors(self) -> list[AdamwPart]:
        return [vector for vector in self._vectors if self.engine.owns(vector.parameter)]

    def _split_rows(self) -> dict[nn.Parameter, slice]:
        """Return the rows of each matrix that AdamW updates."""
        return {v.parameter: v.rows for v in self._vectors if v.rows is not None}

    def _step_whole(self, units: list[TeonStack], active: Active) -> None:
        """Apply Teon and Muon to unsharded matrices, those of one shape together."""
        batches: dict[tuple[Any, ...], list[tuple[nn.Parameter, slice | None]]] = defaultdict(list)
        for unit in units:
            entries = [(p, unit.rows) for p in unit.parameters]
            shape = rows_of(self._own(entries[0][0]), unit.rows).shape
            batches[(shape, entries[0][0].dtype, len(entries))] += entries
        for (_, dtype, stack), entries in batches.items():
            masters = None if dtype in WIDE else [rows_of(self.state[p]["master"], rows) for p, rows in entries]
            masks = [active[p] for p, _ in entries if p in active]
            teon_update(
                [rows_of(self._own(p), rows) for p, rows in entries],
                [rows_of(self._own_gradient(p), rows) for p, rows in entries],
                [rows_of(self.state[p]["momentum"], rows) for p, rows in entries],
                masters,
                stack=stack,
                lr=self._lr(MATRIX),
                momentum=self._train.momentum,
                weight_decay=self._train.weight_decay,
                active=torch.stack(masks) if masks else None,
            )

    def _step_vectors(self, split_gradients: dict[nn.Parameter, torch.Tensor], active: Active) -> None:
        """Apply AdamW.

        Args:
            split_gradients: the unsharded gradients of those rows of sharded matrices that AdamW updates.
            active: the experts to update.
        """
        for kind, decay in ((VECTOR, True), (VECTOR, False), (MATRIX, True)):
            vectors = [v for v in self._owned_vectors() if (v.kind, v.decay) == (kind, decay)]
            weights, gradients = [], []
            for vector in vectors:
                # For a sharded matrix update zeros: that gives the change, which each process adds to its rows below.
                if vector.parameter in split_gradients:
                    gradients.append(split_gradients[vector.parameter])
                    weights.append(torch.zeros_like(gradients[-1]))
                else:
                    gradients.append(rows_of(local_part(self._own_gradient(vector.parameter)), vector.rows))
                    weights.append(rows_of(local_part(self._weight(vector.parameter)), vector.rows))
            with contextlib.ExitStack() as stack:
                for vector, weight in zip(vectors, weights, strict=True):
                    moments = (local_part(self.state[vector.parameter][key]) for key in ("exp_avg", "exp_avg_sq"))
                    stack.enter_context(left_alone((weight, *moments), local_mask(vector.parameter, active)))
                self._adamw(vectors, weights, gradients, self._lr(kind), self._train.weight_decay if decay else 0.0)
            for vector, weight in zip(vectors, weights, strict=True):
                if vector.parameter in split_gradients and vector.rows is not None:
                    here = local_rows(vector.parameter, vector.rows)
                    local_part(self._weight(vector.parameter))[here.of_local] += weight[here.of_rows]
        self._cast((v.parameter, None if is_sharded(v.parameter) else v.rows) for v in self._owned_vectors())

    def _adamw(
        self,
        vectors: list[AdamwPart],
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        lr: float,
        decay: float,
    ) -> None:
        """Update all of them, on a GPU in one launch. The step counters lie there too, so nothing waits."""
        states = [self.state[v.parameter] for v in vectors]
        adamw(
            weights,
            gradients,
            [local_part(s["exp_avg"]) for s in states],
            [local_part(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=bool(weights),
            amsgrad=False,
            beta1=self._train.beta1,
            beta2=self._train.beta2,
            lr=lr,
            weight_decay=decay,
            eps=EPS,
            maximize=False,
        )

    def _step_table(self, parameter: nn.Parameter) -> None:
        """Apply Adam to the rows of a table that have a gradient."""
        state = self.state[parameter]
        state["step"] += 1
        adam_rows(
            self._weight(parameter),
            self._own_gradient(parameter),
            state["exp_avg"],
            state["exp_avg_sq"],
            step=int(state["step"]),
            lr=self._lr(TABLE),
            betas=(self._train.beta1, self._train.beta2),
            eps=EPS,
            parameter=self._own(parameter),
        )


def rows_of(tensor: torch.Tensor, rows: slice | None) -> torch.Tensor:
    """Return some rows of a tensor, or all of it for None."""
    return tensor if rows is None else tensor[rows]


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """Return the gradient. Raises RuntimeError if there is none."""
    if parameter.grad is None:
        raise RuntimeError(f"optimizer: a parameter of shape {tuple(parameter.shape)} has no gradient")
    return parameter.grad
