"""Bits per byte on fixed held-out rows of each domain, shared among the processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from yaongi.data.row_loader import HeldOut
from yaongi.eval.bits_per_byte import bits_per_byte, nats
from yaongi.model import Yaongi
from yaongi.world import World


class HeldOutBits:
    """The held-out rows of the domains, which are the same at every evaluation and for any number of processes."""

    def __init__(self, rows: dict[str, HeldOut], world: World) -> None:
        self._held_out, self._world = rows, world

    def bits_per_byte(self, model: Yaongi, rows_at_once: int) -> dict[str, float]:
        """Return the bits per byte of each domain."""
        held_out = zip(self._held_out.items(), self.nats(model, rows_at_once), strict=True)
        return {domain: bits_per_byte(total, int(rows.text_bytes.sum())) for (domain, rows), total in held_out}

    def nats(self, model: Yaongi, rows_at_once: int) -> list[float]:
        """Return the nats of all predicted tokens of each domain."""
        device = self._world.device
        with evaluating(model):
            sums = [
                nats(model, self._share(rows), device=device, rows_at_once=rows_at_once)
                for rows in self._held_out.values()
            ]
        return self._world.sum_on_host(torch.tensor(sums, dtype=torch.float64)).tolist()

    def _share(self, rows: HeldOut) -> HeldOut:
        """Return this process's rows. Every process gets the same number; rows added as padding don't count."""
        size, rank = self._world.size, self._world.rank
        count = -(-len(rows.input_ids) // size)
        wanted = torch.arange(count) * size + rank
        real = wanted < len(rows.input_ids)
        wanted[~real] = 0
        parts = {name: getattr(rows, name)[wanted] for name in ("input_ids", "document_ids", "predicted", "text_bytes")}
        parts["predicted"] = parts["predicted"] & real[:, None]
        return replace(rows, **parts)


@contextmanager
def evaluating(model: Yaongi) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, within the block."""
    former = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(former)
