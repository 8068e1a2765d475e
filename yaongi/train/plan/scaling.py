"""The seconds of a step on any number of GPUs with replicated weights, by part.

A step is ⌈M / N⌉ micro-batches, the update of what a process owns, and the exchange: gradients are reduced and
scattered, weights gathered. Of `owners` GPUs each sends and receives (owners − 1) / owners of both; more GPUs are
replicas of each other, between which the owned gradients are summed. Experts that are spread over a node are exchanged
between nodes alone, but tokens go to them in each micro-batch.
"""

from dataclasses import dataclass

PER_NODE = 8
# Bytes per second through each GPU's links, by NCCL: of 1 GiB on H100s, for two GPUs of 256 MiB on H200s. Our own
# exchange reaches a share of that, the same on two and four (docs/LAB.md).
REACHED = 304 / 355
IN_NODE = {2: 289e9, 4: 355e9, 8: 361e9}
BETWEEN_NODES = {2: 350e9, 8: 345e9, 16: 320e9, 32: 300e9, 64: 280e9, 128: 260e9}  # by number of nodes
_CARD = 45e9  # one network card of 400 Gb/s, for each GPU
COMMON_UPDATE = 0.009  # the part of the update that every process does, and its launches


@dataclass(frozen=True)
class StepCost:
    """What a step takes on one GPU."""

    micro_batches: int  # of the global batch
    micro_seconds: float
    update_seconds: float  # of all that has owners
    zero_seconds: float  # to set gradients to zero
    gradient_bytes: float  # of what every GPU holds
    weight_bytes: float
    degree: int = 1  # GPUs over which experts are spread
    dispatch_bytes: float = 0.0  # that a GPU sends in a micro-batch to the experts of others, and back
    expert_bytes: float = 0.0  # gradients and weights of the experts that a GPU holds, if they are spread


@dataclass(frozen=True)
class StepSeconds:
    """The parts of a step."""

    micro_batches: float
    update: float
    exchange: float
    dispatch: float = 0.0  # of tokens to experts that are spread, and back

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.micro_batches + self.update + self.exchange + self.dispatch


def step_seconds(cost: StepCost, processes: int, owners: int, bandwidth: float | None = None) -> StepSeconds:
    """Return the parts of a step.

    Args:
        owners: the processes among which the parameters are divided; it divides `processes`.
        bandwidth: bytes per second through each GPU's links; None for that of H100s.
    """
    busiest = -(-cost.micro_batches // processes)
    update = cost.zero_seconds + COMMON_UPDATE + cost.update_seconds / owners
    if processes == 1:
        return StepSeconds(busiest * cost.micro_seconds, update, 0.0)
    moved = (owners - 1) / owners * (cost.gradient_bytes + cost.weight_bytes)
    exchange = moved / (bandwidth or bus_bandwidth(owners))
    replicas = processes // owners
    if replicas > 1:
        exchange += 2 * (replicas - 1) / replicas * cost.gradient_bytes / owners / _CARD
    nodes = processes // cost.degree
    exchange += (nodes - 1) / nodes * cost.expert_bytes / _CARD
    dispatch = busiest * cost.dispatch_bytes / (bandwidth or bus_bandwidth(cost.degree))
    return StepSeconds(busiest * cost.micro_seconds, update, exchange, dispatch)


def bus_bandwidth(gpus: int) -> float:
    """Return the bytes per second through each GPU's links in an exchange of `gpus` H100s."""
    if gpus <= PER_NODE:
        return REACHED * IN_NODE[max((n for n in IN_NODE if n <= gpus), default=2)]
    nodes = -(-gpus // PER_NODE)
    return REACHED * BETWEEN_NODES[min((n for n in BETWEEN_NODES if n >= nodes), default=128)]
