"""The division of a model's parameters among the processes: an owner keeps optimizer state of its part and updates it.

Each parameter is of one of three classes, the same on every process:

- split: each process owns some rows, ⌈rows / size⌉ from rank · ⌈rows / size⌉ on.
- whole: one process owns all of it. Newton-Schulz needs whole matrices, and those of one stack side by side.
- shared: all processes keep the state and do the same update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MOST_OWNERS = 64  # with more, a process would own less than the largest matrix


@dataclass(frozen=True)
class Group:
    """Matrices that one process must own together."""

    names: tuple[str, ...]
    numbers: int
    flops: float  # of their Newton-Schulz steps


@dataclass(frozen=True)
class Ownership:
    """Who owns what, by parameter name. A parameter that is in neither field is shared."""

    size: int = 1  # processes among which the parameters are divided
    split: Mapping[str, int] = field(default_factory=dict)  # the rows of a part
    owners: Mapping[str, int] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        """Return whether a parameter has owners."""
        return name in self.split or name in self.owners

    def rows(self, name: str, rank: int) -> slice | None:
        """Return the rows of a parameter that a process owns; None for all, an empty slice for none."""
        if self.size == 1:
            return None
        if name in self.split:
            return slice(rank * self.split[name], (rank + 1) * self.split[name])
        return None if self.owners.get(name, rank) == rank else slice(0, 0)


def count_owners(processes: int, experts: int) -> int:
    """Return among how many of the processes the parameters are divided; groups of so many hold the same parts.

    Args:
        experts: experts per layer, 0 without expert layers.
    """
    most = min(MOST_OWNERS, experts or MOST_OWNERS)
    return max(n for n in range(1, processes + 1) if processes % n == 0 and n <= most)


def assign_owners(groups: Sequence[Group], size: int) -> dict[str, int]:
    """Give each group, the heaviest first, to the process with the least so far; return the owners by name.

    A group weighs its share of the FLOPs or of the numbers, whichever is larger.
    """
    numbers, flops = sum(g.numbers for g in groups), sum(g.flops for g in groups)
    weighed = [(max(g.numbers / numbers, g.flops / flops if flops else 0.0), g.names) for g in groups]
    loads = [0.0] * size
    owners: dict[str, int] = {}
    for weight, names in sorted(weighed, key=lambda item: (-item[0], item[1])):
        owner = loads.index(min(loads))
        loads[owner] += weight
        owners |= dict.fromkeys(names, owner)
    return owners
