"""Launch options by GPU generation.

A table is keyed by the major number of compute capabilities: 8 is Ampere and Ada, which multiply with mma.sync and have
at least 99 KB of shared memory; 9 is Hopper, with wgmma, TMA and 227 KB; 10 is Blackwell in servers, with 227 KB; 12 is
Blackwell in workstations, with mma.sync and 99 KB. Entries other than 9 are chosen to fit and to compile without large
spills. Their results are tested on an H100; their speed is not measured.
"""

import functools
from typing import TypeVar

import torch

Entry = TypeVar("Entry")


def for_gpu(table: dict[int, Entry], t: torch.Tensor) -> Entry:
    """Return the entry for a tensor's GPU: that of its generation, else of the nearest older one."""
    generation = generation_of(t.device)
    return table[generation if generation in table else max(key for key in table if key < generation)]


@functools.cache
def generation_of(device: torch.device) -> int:
    """Return the major number of a GPU's compute capability; Hopper's for tensors that are on no GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
