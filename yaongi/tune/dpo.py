"""Direct preference optimisation: the chosen answer becomes likelier than the rejected one, against a reference.

Of a pair the loss is −ln σ(β · ((π_c − π_r) − (ref_c − ref_r))), with the log-probabilities π of the model and ref of
the reference, summed over the answer. See Rafailov et al., "Direct Preference Optimization", NeurIPS 2023.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import logsigmoid

from yaongi.data.row_loader import Batch
from yaongi.model import Yaongi
from yaongi.train.step.objective import MicroLoss
from yaongi.tune.preferences import PairBatch

Tensor = torch.Tensor


class PreferenceLoss:
    """The mean of the loss over the global batch's pairs."""

    names = ("loss", "accuracy", "margin", "chosen", "rejected")
    counted = "pair"

    def __init__(self, beta: float, *, length_normalised: bool) -> None:
        """Choose the loss.

        Args:
            beta: weight of the log-probabilities.
            length_normalised: whether they are per token of their answer.
        """
        self._beta, self._length_normalised = beta, length_normalised

    def parts(self, batch: Batch) -> list[Tensor]:
        """Return ids, document ids, targets, the pairs of each row and their reference."""
        assert isinstance(batch, PairBatch)
        assert batch.targets is not None
        assert batch.pairs is not None
        assert batch.reference is not None
        return [batch.input_ids, batch.document_ids, batch.targets, batch.pairs, batch.reference]

    def count(self, parts: Sequence[Tensor], token_bytes: Tensor) -> tuple[Tensor, Tensor]:
        """Count the pairs; no text is predicted."""
        pairs = parts[3].sum()
        return pairs, torch.zeros_like(pairs)

    def __call__(self, model: Yaongi, parts: Sequence[Tensor], unit: Tensor) -> MicroLoss:
        """Return the loss of the pairs in some rows."""
        ids, documents, targets, pairs, reference = parts
        found = model.token_losses(ids, documents, targets=targets)
        policy, tokens = sums_by_document(found.cross_entropy, documents, targets, reference.shape[1])
        losses, margins = preference_losses(policy, reference, tokens, self._beta, self._length_normalised)
        there = torch.arange(reference.shape[1], device=pairs.device) < pairs[:, None]
        rows = (losses, (margins > 0).double(), margins, policy[..., 0], policy[..., 1])
        measures = [torch.where(there, row, 0).sum() for row in rows]
        return MicroLoss(measures[0] * unit, measures, found.balance, found.loads)


def sums_by_document(losses: Tensor, documents: Tensor, targets: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each answer and its number of targets, both (B, P, 2) float64.

    Args:
        losses: (B, L), nats per target, 0 elsewhere.
        documents: (B, L), answer 2p + s of a row is document 2p + s.
        targets: (B, L), negative where there is none.
        pairs: P, of a row at most.
    """
    number = torch.arange(2 * pairs, device=documents.device, dtype=documents.dtype)
    mine = ((documents[:, None] == number[:, None]) & (targets >= 0)[:, None]).double()  # (B, 2P, L)
    sums = -(mine @ losses.double()[..., None]).squeeze(-1)
    return sums.unflatten(1, (pairs, 2)), mine.sum(-1).unflatten(1, (pairs, 2))


def preference_losses(
    policy: Tensor, reference: Tensor, tokens: Tensor, beta: float, length_normalised: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss and the margin of each pair, (…).

    Args:
        policy: (…, 2), log-probabilities of the chosen and the rejected answer.
        reference: (…, 2), those of the reference.
        tokens: (…, 2), the answers' lengths.
        length_normalised: whether log-probabilities are per token.
    """
    gains = policy - reference
    if length_normalised:
        gains = gains / tokens.clamp(min=1)
    margins = beta * (gains[..., 0] - gains[..., 1])
    return -logsigmoid(margins), margins
