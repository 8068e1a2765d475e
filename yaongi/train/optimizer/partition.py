"""A model's parameters grouped for the optimizer, by role and by what is updated together."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from torch import nn

from yaongi.model import Yaongi
from yaongi.train.config import Training
from yaongi.train.distributed.ownership import Group, Ownership, assign_owners, count_owners
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

SPLIT_NUMBERS = 1 << 20  # of a matrix that AdamW updates, from which on its rows have owners


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


def divide_parameters(model: Yaongi, train: Training, processes: int, *, experts_apart: bool = False) -> Ownership:
    """Return which of the processes owns what of a model; this works on the meta device too.

    Args:
        experts_apart: leave out the experts, which are spread: `divide_experts`.
    """
    experts = model.config.experts if "E" in model.config.pattern else 0
    size = count_owners(processes, experts)
    if size == 1:
        return Ownership()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    split, whole = {}, []
    for name, role in parameter_roles(model).items():
        parameter = parameters.get(name)
        if parameter is None or (experts_apart and role.kind == "expert"):
            continue
        large = role.kind == "adamw" and parameter.ndim == 2 and parameter.numel() >= SPLIT_NUMBERS
        if role.kind in ("expert", "table") or large:
            split[name] = -(-len(parameter) // size)
        elif role.kind in ("qkv", "muon"):
            whole.append(name)
    groups = _groups(parameters, whole, partition_parameters(model, train)[0])
    return Ownership(size, split, assign_owners(groups, size))


def divide_experts(model: Yaongi, processes: int, degree: int) -> Ownership:
    """Return who owns what of experts that are spread over `degree` processes: one process of each node, or fewer.

    Args:
        processes: of all nodes.
    """
    held = model.config.experts // degree
    size = count_owners(processes // degree, held)
    names = [name for name, role in parameter_roles(model).items() if role.kind == "expert"]
    return Ownership(size, dict.fromkeys(names, -(-held // size))) if size > 1 else Ownership()


def _groups(parameters: dict[str, nn.Parameter], names: list[str], stacks: list[TeonStack]) -> list[Group]:
    """Return the matrices `names` in groups: those of one stack belong together."""
    name_of = {p: name for name, p in parameters.items()}
    members = {name: [name] for name in names}
    flops = dict.fromkeys(names, 0.0)
    for stack in stacks:
        joined = [name_of[p] for p in stack.parameters]
        if joined[0] not in members:
            continue  # experts
        flops[joined[0]] += _flops(stack)
        for name in joined[1:]:
            if members[name] is not members[joined[0]]:
                members[joined[0]] += members[name]
                members |= dict.fromkeys(members[name], members[joined[0]])
    together = {id(group): group for group in members.values()}
    return [
        Group(tuple(group), sum(parameters[n].numel() for n in group), sum(flops[n] for n in group))
        for group in together.values()
    ]


def newton_schulz_flops(model: Yaongi, train: Training) -> float:
    """Return the FLOPs of a step's Newton-Schulz steps, of all matrices."""
    stacks = partition_parameters(model, train)[0]
    return sum(len(s.parameters[0]) * _flops(s) if s.parameters[0].ndim == 3 else _flops(s) for s in stacks)


def _flops(stack: TeonStack) -> float:
    """Return the FLOPs of five Newton-Schulz steps in the Gram form on one of a stack's joint matrices (m, K · n)."""
    first = stack.parameters[0]
    rows = first.shape[-2] if stack.rows is None else stack.rows.stop - stack.rows.start
    short, long = sorted((rows, len(stack.parameters) * first.shape[-1]))
    return short**3 * (14 + 6 * long / short)
