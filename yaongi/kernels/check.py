"""Checks of an op's arguments. Every message has the form `op: argument must be WANTED, got GOT`.

Each call of an op makes one `Arguments`. Its tensors must agree in the sizes of the same letter, and in their device.
"""

import math
from collections.abc import Collection

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)


class Arguments:
    """The arguments of one call of an op, checked one after another."""

    __slots__ = ("device", "op", "sizes")

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None

    def tensor(
        self,
        name: str,
        value: object,
        dims: tuple[str, ...],
        dtypes: Collection[torch.dtype] = FLOAT_DTYPES,
        *,
        unit_stride: bool = False,
        written: bool = False,
    ) -> None:
        """Check a tensor's rank, sizes, dtype and device, and record the size of each letter.

        Args:
            dims: a letter per dimension, none for a scalar; a leading `"..."` stands for any number of dimensions.
            unit_stride: the last dimension must be contiguous.
            written: no two elements may share memory, because the op writes the tensor.

        Raises:
            TypeError: kind, dtype or device. ValueError: shape or stride.
        """
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{self.op}: {name} must be {wanted}, got {str(value.dtype).removeprefix('torch.')}")
        if self.device is None:
            self.device = value.device
        elif value.device != self.device:
            raise TypeError(f"{self.op}: {name} must be on {self.device} like the first tensor, got {value.device}")
        self._shape(name, value.shape, dims)
        if written and any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
            raise ValueError(f"{self.op}: {name} must not be expanded, for it is written, got strides {value.stride()}")
        if unit_stride and value.stride(-1) != 1 and value.shape[-1] > 1:
            raise ValueError(f"{self.op}: {name} must have stride 1 along {dims[-1]}, got strides {value.stride()}")

    def optional(
        self, name: str, value: object, dims: tuple[str, ...], dtypes: Collection[torch.dtype] = FLOAT_DTYPES
    ) -> None:
        """Check a tensor as `tensor` does, unless it is None."""
        if value is not None:
            self.tensor(name, value, dims, dtypes)

    def _shape(self, name: str, shape: tuple[int, ...], dims: tuple[str, ...]) -> None:
        open_ended = dims[:1] == ("...",)
        named = dims[1:] if open_ended else dims
        tail = shape[-len(named) :] if open_ended else shape
        if len(tail) != len(named):
            raise self._misshapen(name, shape, dims)
        for letter, size in zip(named, tail, strict=True):
            if self.sizes.get(letter, size) != size:
                raise self._misshapen(name, shape, dims)
        self.sizes.update(zip(named, tail, strict=True))

    def _misshapen(self, name: str, shape: tuple[int, ...], dims: tuple[str, ...]) -> ValueError:
        known = [str(self.sizes.get(letter, letter)) for letter in dims]
        bound = f" = ({', '.join(known)})" if known != list(dims) else ""
        return ValueError(f"{self.op}: {name} must be ({', '.join(dims)}){bound}, got {tuple(shape)}")

    def require(self, condition: bool, name: str, wanted: str, got: object) -> None:
        """Raise ValueError `op: name must be wanted, got …` when the condition doesn't hold."""
        if not condition:
            raise ValueError(f"{self.op}: {name} must be {wanted}, got {got}")

    def integer(self, name: str, value: object, low: int, high: int | None = None, meaning: str = "") -> None:
        """Check an int from `low` to `high`; `meaning` explains the upper bound in the message, as in `64 (E)`."""
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{self.op}: {name} must be an int, got {type(value).__name__}")
        if value < low or (high is not None and value > high):
            upper = "or more" if high is None else f"to {high}{meaning}"
            raise ValueError(f"{self.op}: {name} must be {low} {upper}, got {value}")

    def number(self, name: str, value: object) -> None:
        """Check a finite int or float."""
        if isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{self.op}: {name} must be a number, got {type(value).__name__}")
        if not -math.inf < value < math.inf:
            raise ValueError(f"{self.op}: {name} must be finite, got {value}")

    def boolean(self, name: str, value: object) -> None:
        """Check that a value is True or False."""
        if not isinstance(value, bool):
            raise TypeError(f"{self.op}: {name} must be a bool, got {type(value).__name__}")

    def choice(self, name: str, value: object, choices: tuple[object, ...]) -> None:
        """Check that a value is one of `choices`."""
        if value not in choices:
            wanted = " or ".join(repr(c) for c in choices)
            raise ValueError(f"{self.op}: {name} must be {wanted}, got {value!r}")


def finite(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuse non-finite values. For checked mode only, as it synchronises."""
    for name, value in tensors.items():
        if value is None or not value.is_floating_point():
            continue
        finite = (value.half() if value.element_size() == 1 else value).isfinite()  # torch has none for 8-bit floats
        if not bool(finite.all()):
            raise ValueError(f"{op}: {name} must be finite, got {int((~finite).sum())} non-finite values")


def documents(op: str, document_ids: torch.Tensor | None) -> None:
    """Refuse document ids that decrease along the sequence. For checked mode only, as it synchronises."""
    if document_ids is not None and bool((document_ids[:, 1:] < document_ids[:, :-1]).any()):
        raise ValueError(f"{op}: document_ids must be non-decreasing along L, got a decreasing pair")
