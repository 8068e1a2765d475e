"""A model's parameters grouped for the optimizer, by role and by what is updated together."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from torch import nn

from yaongi.model import Yaongi
from yaongi.train.config import Training
from yaongi.train.optimizer.roles import Role, parameter_roles

MATRIX, VECTOR, TABLE = "matrix", "vector", "table"  # kinds of parameter groups
STACKS = {  # a matrix's part: the word of the config's `stacked` that includes it
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
    """Matrices that are orthogonalised jointly: Teon for more than one, Muon for one."""

    parameters: tuple[nn.Parameter, ...]  # each (m, n), or (E, m, n): E matrices, each orthogonalised alone
    rows: slice | None = None  # the rows of each parameter that belong to the stack; None for all


@dataclass(frozen=True)
class AdamwPart:
    """A parameter, or a range of a matrix's rows, that AdamW updates."""

    parameter: nn.Parameter
    rows: slice | None
    decay: bool
    kind: str = VECTOR  # the group whose learning rate it takes; MATRIX for the matrices of the AdamW baseline


def partition_parameters(model: Yaongi, train: Training) -> tuple[list[TeonStack], list[AdamwPart], list[nn.Parameter]]:
    """Return the stacks of matrices, the parts that AdamW updates, and the Engram tables.

    A stack holds a part's matrices in up to `train.stack` consecutive layers that have it. Frozen matrices are left
    out, so the partner of a frozen one may be alone in its stack.
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
    """Return a matrix's row ranges that are updated separately: (rows, weight decay or not, AdamW or not) of each."""
    if not role.splits:
        return [(None, role.decay, False)]
    return [(slice(s.start, s.stop), s.decay, s.kind == "adamw") for s in role.splits]
