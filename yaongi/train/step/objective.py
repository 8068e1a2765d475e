"""What a step minimises: the loss of a micro-batch, and what a whole step measures of it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from yaongi.data.row_loader import Batch
from yaongi.model import Yaongi

Tensor = torch.Tensor


class MicroLoss(NamedTuple):
    """The loss of a micro-batch."""

    loss: Tensor  # scalar, times the scale of `unit`, without the balance loss
    measures: Sequence[Tensor]  # scalars, those of `Objective.names`, summed over what is counted
    balance: Tensor  # scalar, the experts' sequence balance loss, mean over rows
    loads: Tensor  # (MoE layers, E) int32, tokens that each expert got


class Objective(Protocol):
    """What is minimised: a mean over what is counted in the global batch, the same for any micro-batches."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the measures, the loss first."""

    @property
    def counted(self) -> str:
        """What a batch must have, for the message that it has none."""

    def parts(self, batch: Batch) -> list[Tensor]:
        """Return what a step reads of a micro-batch: ids and document ids first."""

    def count(self, parts: Sequence[Tensor], token_bytes: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much there is to average over, and the UTF-8 bytes that are predicted; int64 scalars.

        Args:
            token_bytes: (V,), UTF-8 bytes of each id.
        """

    def __call__(self, model: Yaongi, parts: Sequence[Tensor], unit: Tensor) -> MicroLoss:
        """Return the loss of a micro-batch.

        Args:
            unit: scalar, by which what is counted is weighted: a scale over the global batch's count.
        """


class NextToken:
    """The cross entropy of the next tokens, or of a batch's own targets, and the z loss."""

    names = ("loss", "z")
    counted = "target"

    def __init__(self, z_loss: float) -> None:
        self._z_loss = z_loss

    def parts(self, batch: Batch) -> list[Tensor]:
        """Return ids, document ids and, if the batch has its own, targets."""
        return [batch.input_ids, batch.document_ids, *([] if batch.targets is None else [batch.targets])]

    def count(self, parts: Sequence[Tensor], token_bytes: Tensor) -> tuple[Tensor, Tensor]:
        """Count the predicted tokens and their UTF-8 bytes."""
        ids, documents, *given = parts
        if given:
            predicted, following = given[0] >= 0, given[0].clamp(min=0)
        else:
            predicted, following = documents[:, 1:] == documents[:, :-1], ids[:, 1:]
        return predicted.sum(), (token_bytes[following] * predicted).sum()

    def __call__(self, model: Yaongi, parts: Sequence[Tensor], unit: Tensor) -> MicroLoss:
        """Return the loss; its gradient is formed along with it."""
        ids, documents, *given = parts
        z_unit = self._z_loss * unit
        losses = model.losses(ids, documents, targets=given[0] if given else None, upstream=(unit, z_unit))
        loss = losses.cross_entropy_sum * unit
        if self._z_loss:
            loss = loss + losses.z_sum * z_unit
        return MicroLoss(loss, (losses.cross_entropy_sum, losses.z_sum), losses.balance, losses.loads)
