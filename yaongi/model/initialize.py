"""The initial weights: each parameter has its own random generator, seeded by (seed, name).

So the weights do not depend on the order of the parameters or the number of devices, and on the dtype only by rounding:
numbers are drawn in float32 on the CPU, in chunks, then converted and moved. Several threads draw, one parameter each.
"""

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import nn

from yaongi.model.config import ModelConfig

Tensor = torch.Tensor
CHUNK = 1 << 24  # numbers drawn at once
RESIDUAL_OUTPUTS = ("out_proj.weight", "o_proj.weight", "experts.down_proj", "shared_experts.down_proj.weight")
A_RANGE = (1.0, 16.0)
DT_RANGE = (1e-3, 1e-1)
DT_FLOOR = 1e-4


class Part(NamedTuple):
    """The rows that are here of a parameter, one after another."""

    tensor: Tensor  # (n, …)
    first: int  # which row of all the first one is
    rows: int  # of the whole parameter


PartOf = Callable[[str, nn.Parameter], Part]  # of a parameter and its name


def all_rows(name: str, parameter: nn.Parameter) -> Part:
    """Return a whole parameter as the part that is here."""
    return Part(parameter.data, 0, len(parameter))


def set_constants(model: nn.Module) -> None:
    """Set what is no parameter and has the same values in every new model, which `to_empty` leaves undefined."""
    for module in model.modules():
        reset = getattr(module, "reset_constants", None)
        if reset is not None:
            reset()


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int, part_of: PartOf = all_rows) -> None:
    """Initialise every parameter that is not on the meta device, by its role.

    - Matrices: normal with std sqrt(0.8/d); those that write to the residual, divided by sqrt(layers).
    - Norms and D: one.
    - A: uniform in 1..16; `A_log` is its logarithm.
    - dt: log-uniform in 1e-3..0.1 (at least 1e-4); `dt_bias` is its inverse softplus.
    - Mamba convolution: uniform within ±1/sqrt(taps), as torch's own.
    - Engram convolution: zero.

    Args:
        part_of: which rows of a parameter are here; they get what they have in a whole one.
    """
    parameters = [(name, part_of(name, p)) for name, p in model.named_parameters() if not p.is_meta]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda item: _fill(item[0], item[1], config, seed), parameters))


def _fill(name: str, part: Part, config: ModelConfig, seed: int) -> None:
    """Draw a parameter up to the last row that is here; in a thread, which has modes of its own."""
    generator = torch.Generator("cpu").manual_seed(_key(seed, name))
    with torch.inference_mode(part.tensor.is_inference()), torch.no_grad():
        width = math.prod(part.tensor.shape[1:])
        first, total = part.first * width, part.rows * width
        here = part.tensor.view(-1)
        for start in range(0, first + len(here) if len(here) else 0, CHUNK):
            numbers = torch.empty(min(CHUNK, total - start), dtype=torch.float32, device="cpu")
            drawn = _draw(name, numbers, generator, config)[max(0, first - start) :]
            place = here[max(0, start - first) :][: len(drawn)]
            place.copy_(drawn[: len(place)])


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)


def _draw(name: str, numbers: Tensor, generator: torch.Generator, config: ModelConfig) -> Tensor:
    """Fill `numbers` with initial values for the parameter `name`, and return them."""
    if name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
        return numbers.fill_(1)
    if name.endswith("engram.conv.weight"):
        return numbers.fill_(0)
    if name.endswith("mixer.A_log"):
        return numbers.uniform_(*A_RANGE, generator=generator).log_()
    if name.endswith("mixer.dt_bias"):
        low, high = map(math.log, DT_RANGE)
        dt = numbers.uniform_(low, high, generator=generator).exp_().clamp_(min=DT_FLOOR)
        return dt + (-torch.expm1(-dt)).log()  # softplus⁻¹
    if ".conv1d." in name:
        bound = config.mamba_conv**-0.5
        return numbers.uniform_(-bound, bound, generator=generator)
    std = math.sqrt(0.8 / config.hidden_size)
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(len(config.pattern))
    return numbers.normal_(0, std, generator=generator)
