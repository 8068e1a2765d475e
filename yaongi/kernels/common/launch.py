"""Launches of Triton kernels that cost the host a few microseconds.

At each launch Triton makes strings of all types and options to find the compiled kernel, and encodes the TMA
descriptors. Here a launch that is like an earlier one goes straight to the compiled kernel, with descriptors encoded
once. Launches are alike if their kernel, device, integers, constants and options are equal, and their tensors have the
same dtypes and alignments.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

REMEMBERED = 4096  # most launches that are kept; then all are forgotten
DIRECT = triton.__version__.startswith("3.6.")  # the launchers in C of other versions may take other arguments
_remembered: dict[tuple[object, ...], "_Launcher"] = {}


@dataclass(frozen=True, slots=True)
class _Launcher:
    """A compiled kernel's launcher in C, and what it takes besides grid, stream and arguments."""

    call: Callable[..., None]
    before: tuple[object, ...]  # the arguments
    after: tuple[object, ...]
    formats: tuple[tuple[str, Any], ...]  # of the descriptors, from the last one on


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Return what launches a kernel as `kernel[grid]` does; constants and options are given by name, and only they."""
    if DIRECT and isinstance(kernel, JITFunction):
        return functools.partial(_launch, kernel, grid)
    return kernel[grid]  # type: ignore[no-any-return]


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    device = driver.active.get_current_device()
    # Triton's hash of a kernel takes a microsecond, that of its function none.
    mode = knobs.runtime.debug, knobs.compilation.instrumentation_mode
    key: list[object] = [kernel.fn, device, mode, len(args), *constants, *constants.values()]
    values: list[object] = []
    descriptors: list[int] = []  # their places
    for arg in args:
        kind = type(arg)
        if kind is int or arg is None:
            key.append(arg)
        elif isinstance(arg, torch.Tensor):
            key.append(arg.dtype)
            arg = arg.data_ptr()
            if arg % 16:
                key.append("anywhere")
        elif kind is TensorDescriptor:
            key.append(arg.base.kind)
            descriptors.append(len(values))
        elif kind is float:
            key.append(float)
        else:
            key += kind, arg
        values.append(arg)
    known = _remembered.get(tuple(key))
    hooks = knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls or kernel.pre_run_hooks
    if known is None or hooks:
        _remember(tuple(key), kernel, kernel[grid](*args, **constants), len(descriptors), len(args), constants)
        return
    for place, (name, layout) in zip(reversed(descriptors), known.formats, strict=True):
        descriptor: Any = values[place]
        values[place : place + 1] = descriptor.base.encoded.get(name) or _encode(descriptor, name, layout)
    stream = driver.active.get_current_stream(device)
    known.call(*grid, *(1,) * (3 - len(grid)), stream, *known.before, *values, *known.after)


def _remember(
    key: tuple[object, ...], kernel: Any, compiled: Any, descriptors: int, given: int, constants: dict[str, Any]
) -> None:
    """Keep the launcher of a kernel that has been launched, unless it needs scratch memory."""
    check_arguments(kernel, given)
    if compiled is None:  # a hook has taken the launch
        return
    run, metadata = compiled.run, compiled.metadata
    if run.global_scratch_size or run.profile_scratch_size:
        return
    call = inspect.getclosurevars(run.launch).nonlocals["launcher"] if descriptors else run.launch
    layouts = metadata.tensordesc_meta or [None] * descriptors
    before = (run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata, None, None, None)
    after = (constants.get(parameter.name, parameter.default) for parameter in kernel.params[given:])
    if len(_remembered) >= REMEMBERED:
        _remembered.clear()
    _remembered[key] = _Launcher(
        call, (compiled.function, *before), tuple(after), tuple((repr(layout), layout) for layout in reversed(layouts))
    )


def check_arguments(kernel: Any, given: int) -> None:
    """Refuse arguments given by name, which would be kept, and constants by place, which would not be compared."""
    for place, parameter in enumerate(kernel.params):
        if parameter.is_constexpr != (place >= given):
            way = "by name" if parameter.is_constexpr else "by place"
            raise TypeError(f"launcher: {parameter.name} of {kernel.__name__} must be given {way}")


def _encode(descriptor: TensorDescriptor, name: str, layout: dict[str, Any] | None) -> list[object]:
    """Return what a launcher takes for a descriptor: its map in the layout that the kernel reads, or without a map."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    encoded: list[object] = make_tensordesc_arg(descriptor, layout)
    descriptor.base.encoded[name] = encoded
    return encoded
