"""What is updated together: the roles of a model's parameters, laid out for the optimizer."""

from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from yaongi.model import Yaongi
from yaongi.model.roles import parameter_roles

MATRIX, VECTOR, TABLE = "matrix", "vector", "table"  # kinds of parameter groups


@dataclass(frozen=True)
class Unit:
    """Matrices that are orthogonalised jointly; more than one is Teon, one is Muon."""

    parameters: tuple[nn.Parameter, ...]  # (m, n), or (E, m, n) with every one of the E on its own
    rows: slice | None = None  # of each; None for all


@dataclass(frozen=True)
class Vector:
    """A parameter, or a range of a matrix's rows, that takes AdamW."""

    parameter: nn.Parameter
    rows: slice | None
    decay: bool


def units_of(model: Yaongi, stack: int) -> tuple[list[Unit], list[Vector], list[nn.Parameter]]:
    """The matrices in units of up to ``stack`` attention layers, what takes AdamW, and Engram's tables.

    Of a pair of which one is frozen the other is a unit of its own.
    """
    units: list[Unit] = []
    vectors: list[Vector] = []
    tables: list[nn.Parameter] = []
    attention: dict[tuple[str, int], list[nn.Parameter]] = defaultdict(list)
    parameters = dict(model.named_parameters())
    for name, role in parameter_roles(model).items():
        parameter = parameters[name]
        if not parameter.requires_grad:
            continue
        if role.kind == "qkv" and role.attention is not None:
            attention[role.part, role.attention // stack].append(parameter)
        elif role.kind == "table":
            tables.append(parameter)
        elif role.kind == "adamw":
            vectors.append(Vector(parameter, None, role.decay))
        elif not role.splits:
            units.append(Unit((parameter,)))
        for split in role.splits:
            rows = slice(split.start, split.stop)
            if split.kind == "muon":
                units.append(Unit((parameter,), rows))
            else:
                vectors.append(Vector(parameter, rows, split.decay))
    units += [Unit(tuple(joint)) for joint in attention.values()]
    return units, vectors, tables
