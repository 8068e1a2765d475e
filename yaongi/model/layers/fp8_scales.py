"""FP8's scales: those of activations and gradients, fixed within an optimizer step, and the weights' casts."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from yaongi.kernels import power_of_two_scale, quantize_weight8

Tensor = torch.Tensor
MULTIPLE = 16  # of 8-bit floats in a row, and of rows
FORWARD = ("x", "y", "sa", "A")  # letters of the sites of the forward pass


class Site(NamedTuple):
    """A tensor that is cast to FP8: its scale, one over it, and the largest magnitude so far; scalars in float32."""

    scale: Tensor
    unit: Tensor
    amax: Tensor


class Fp8Scales(nn.Module):
    """The scales of all sites, on the device; the kernels read them and raise `amax` where they are.

    A scale is a power of two that leaves room for `margin` times the largest value of the last `history` optimizer
    steps. It changes between steps only, so a gradient doesn't depend on how a step is cut into micro-batches.
    """

    def __init__(self, sites: Sequence[str], margin: float, history: int, device: torch.device | None) -> None:
        super().__init__()
        self.sites, self.margin = tuple(sites), margin
        self._places = {name: i for i, name in enumerate(self.sites)}
        self.enabled = True  # False: the layers compute without FP8
        self.calibrating = False  # whether each producer runs twice, first for its scale
        self.known = False  # whether there are scales: from a calibration or a checkpoint
        self.maximum: Callable[[Tensor], object] | None = None  # over all processes, in place; None for one process
        count = len(sites)
        self.scale = nn.Buffer(torch.ones(count, device=device), persistent=False)
        self.unit = nn.Buffer(torch.ones(count, 4, device=device), persistent=False)  # 16 bytes apart, for cuBLASLt
        self.amax = nn.Buffer(torch.zeros(count + 1, device=device), persistent=False)  # the last: of no site
        self.history = nn.Buffer(torch.zeros(count, history, device=device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the scales, but keep them float32; from the meta device they get memory, as `to_empty` asks for."""
        return super()._apply(
            lambda t: torch.empty_like(t, device=fn(t).device) if t.is_meta else t.to(fn(t).device), recurse
        )

    def reset_constants(self) -> None:
        """Set the scales of a new model."""
        for tensor, value in ((self.scale, 1), (self.unit, 1), (self.amax, 0), (self.history, 0)):
            tensor.fill_(value)

    def site(self, name: str, *, seen: bool = True) -> Site:
        """Return a site; unless `seen`, what is cast leaves no trace in its amax."""
        i = self._places[name]
        return Site(self.scale[i], self.unit[i, 0], self.amax[i if seen else -1])

    def cast(
        self,
        name: str,
        produce: Callable[[Site], Any],
        *,
        seen: bool = True,
        rehearse: Callable[[Site], object] | None = None,
    ) -> Any:
        """Return produce(site). While calibrating it runs twice, and its own amax makes the scale in between.

        Args:
            rehearse: runs first instead, where `produce` adds to sums.
        """
        site = self.site(name, seen=seen)
        if self.calibrating and seen:
            (rehearse or produce)(site)
            if self.maximum is not None:
                self.maximum(site.amax)
            self._set(self._places[name], site.amax)
        return produce(site)

    def share(self) -> None:
        """Take the largest magnitudes of all processes, so that all have the same scales; call it once a step."""
        if self.maximum is not None:
            self.amax.nan_to_num_(nan=torch.inf, posinf=torch.inf)  # a maximum may leave out a NaN
            self.maximum(self.amax)

    def _set(self, i: int | slice, largest: Tensor) -> None:
        """Set scales from the largest magnitudes; a site that was all zeros keeps its scale."""
        scale = power_of_two_scale(largest * self.margin)
        known = (largest > 0) & scale.isfinite()
        self.scale[i] = torch.where(known, scale, self.scale[i])
        self.unit[i, 0] = 1 / self.scale[i]

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the layers compute without FP8 within the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextlib.contextmanager
    def first_micro_batch(self) -> Iterator[None]:
        """Calibrate within the block, a forward and backward pass, unless there are scales already."""
        self.calibrating = not self.known
        try:
            yield
        finally:
            self.calibrating, self.known = False, True

    def bad_site(self) -> str | None:
        """Return the name of a site that was not finite since the last step, nearest to the cause; synchronises."""
        bad = [site for site, finite in zip(self.sites, self.amax[:-1].isfinite().tolist(), strict=True) if not finite]
        forward = [site for site in bad if site.split()[-1] in FORWARD]
        return forward[0] if forward else bad[-1] if bad else None

    def measures(self) -> Tensor:
        """Return the share of sites that saturated in this step, and the largest amax / (448 · unit).

        The second is not finite where something was not finite before its cast.
        """
        reach = self.amax[:-1] * self.scale / 448
        return torch.stack([(reach > 1).float().mean(), reach.max()])

    @torch.no_grad()
    def advance(self) -> None:
        """End a step: its amax enters the history, and the next step's scales follow from that."""
        self.history.copy_(torch.cat([self.history[:, 1:], self.amax[:-1, None]], dim=1))
        self.amax.zero_()
        self.restore()

    @torch.no_grad()
    def discard(self) -> None:
        """End a step that is skipped: no scale changes."""
        self.amax.zero_()

    @torch.no_grad()
    def restore(self) -> None:
        """Make the scales from the history, for example after it was loaded."""
        self.known = True
        self._set(slice(None), self.history.amax(1))


class Fp8Weight:
    """Weights with one scale, cast to FP8 in both orders.

    They are matrices side by side as rows, padded to 16, or one batch of matrices.
    """

    def __init__(self) -> None:
        self._made_from: list[tuple[int, int]] = []
        self.w8 = self.w8t = self.unit = torch.empty(0)

    @torch.no_grad()
    def refresh(self, weights: list[Tensor]) -> None:
        """Cast these weights anew if they have changed; the casts keep their memory, for CUDA graphs that read them."""
        state = [(0 if weight.is_meta else weight.data_ptr(), weight._version) for weight in weights]
        if state == self._made_from:
            return
        missing = -sum(len(weight) for weight in weights) % MULTIPLE if weights[0].dim() == 2 else 0
        padding = [weights[0].new_zeros(missing, weights[0].shape[1])] if missing else []
        parts = [*(weight.detach() for weight in weights), *padding]
        made = quantize_weight8(torch.cat(parts) if len(parts) > 1 else parts[0])
        if self.w8.shape == made[0].shape and self.w8.device == made[0].device:
            for kept, new in zip((self.w8, self.w8t, self.unit), made, strict=True):
                kept.copy_(new)
        else:
            self.w8, self.w8t, self.unit = made
        self._made_from = state
