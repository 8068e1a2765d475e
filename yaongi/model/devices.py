"""Devices by name, as a command's `--device` takes them."""

import torch


def device_of(name: str, what: str) -> torch.device:
    """Return a device of this machine.

    Args:
        name: auto (a GPU where there is one, else the CPU), cpu, gpu, cuda, or cuda:N.
        what: first word of the error.

    Raises:
        ValueError: the name is none of these, or this machine has no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, number = name.partition(":")
    kind = {"auto": "cuda" if count else "cpu", "gpu": "cuda"}.get(kind, kind)
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and name != "auto" and number.isdecimal())):
        raise ValueError(f"{what}: device must be auto, cpu, gpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and int(number or 0) >= count:
        raise ValueError(f"{what}: device must be one that this machine has, got {name} with {count} GPUs there")
    return torch.device(f"{kind}:{number}" if number else kind)
