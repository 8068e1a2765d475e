"""What is updated together: the roles of a model's parameters, laid out for the optimizer."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from torch import nn

from yaongi.model import Yaongi
from yaongi.train.config import Training
from yaongi.train.optimizer.roles import Role, parameter_roles

MATRIX, VECTOR, TABLE = "matrix", "vector", "table"  # kinds of parameter groups
STACKS = {  # the stacks of the config by the matrices' part
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "mixer.in_proj.weight": "mamba",
    "mixer.out_proj.weight": "mamba",
    "mixer.shared_experts.up_proj.weight": "shared",
    "mixer.shared_experts.down_proj.weight": "shared",
}


@dataclass(frozen=True)
class TeonStack:
    """Matrices that are orthogonalised jointly; more than one is Teon, one is Muon."""

    parameters: tuple[nn.Parameter, ...]  # (m, n), or (E, m, n) with every one of the E on its own
    rows: slice | None = None  # of each; None for all


@dataclass(frozen=True)
class AdamwPart:
    """A parameter, or a range of a matrix's rows, that takes AdamW."""

    parameter: nn.Parameter
    rows: slice | None
    decay: bool
    kind: str = VECTOR  # whose learning rate: that of the vectors, or for a whole matrix that of the matrices


def partition_parameters(model: Yaongi, train: Training) -> tuple[list[TeonStack], list[AdamwPart], list[nn.Parameter]]:
    """The matrices in units of up to `train.stack` consecutive layers, what takes AdamW, and Engram's tables.

    Of a pair of which one is frozen the other is a unit of its own.
    """
    joint: dict[tuple[str, int, int], list[nn.Parameter]] = defaultdict(list)
    rows_of: dict[tuple[str, int, int], slice | None] = {}
    vectors: list[AdamwPart] = []
    tables: list[nn.Parameter] = []
    parameters, layers = dict(model.named_parameters()), Counter[str]()
    for name, role in parameter_roles(model).items():
        parameter, layer = parameters[name], layers[role.part]
        layers[role.part] += 1
        if not parameter.requires_grad:
            continue
        if role.kind == "table":
            tables.append(parameter)
        elif role.kind == "adamw":
            vectors.append(AdamwPart(parameter, None, role.decay))
        elif train.matrix_optimizer == "adamw":
            vectors.append(AdamwPart(parameter, None, role.decay, MATRIX))
        else:
            stack = train.stack if STACKS.get(role.part) in train.stacked_kinds else 1
            for number, (rows, decay, by_adamw) in enumerate(_parts(role)):
                if by_adamw:
                    vectors.append(AdamwPart(parameter, rows, decay))
                    continue
                key = role.part, number, layer // stack
                joint[key].append(parameter)
                rows_of[key] = rows
    return [TeonStack(tuple(members), rows_of[key]) for key, members in joint.items()], vectors, tables


def _parts(role: Role) -> list[tuple[slice | None, bool, bool]]:
    """The rows of a matrix that are matrices of their own, whether they decay, and whether they take AdamW."""
    if not role.splits:
        return [(None, role.decay, False)]
    return [(slice(s.start, s.stop), s.decay, s.kind == "adamw") for s in role.splits]
