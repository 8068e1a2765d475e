"""The peer of the training step benchmark computes the same loss and gradients as the model."""

import pytest
import torch
from composition import Composition
from model_support import ENGRAM, assert_relative, small_model, token_ids

from yaongi.kernels import mamba_scan

SIZES = {"hidden_size": 64, "experts": 8, "expert_size": 32}  # sizes that torch's grouped matmul supports


def test_the_composition_is_the_model() -> None:
    model = small_model("MEM*ME", **SIZES)
    ids = token_ids(model, 2, 40)
    loss = model.loss(ids)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    peer = Composition(model, mamba_scan, compiled=False)
    peer_loss = peer(ids)
    assert_relative(peer_loss, loss, 1e-5)
    peer_gradients = torch.autograd.grad(peer_loss, list(model.parameters()))
    for (name, _), ours, theirs in zip(model.named_parameters(), gradients, peer_gradients, strict=True):
        assert_relative(theirs, ours, 1e-4, name)


def test_engram_is_refused() -> None:
    model = small_model("MEM*ME", engram=[ENGRAM])
    with pytest.raises(ValueError, match="without Engram"):
        Composition(model, mamba_scan)
