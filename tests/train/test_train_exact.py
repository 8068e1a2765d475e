"""An interrupted and resumed run equals an uninterrupted one, bit for bit: kernels, micro-batches, checkpoint."""

import sys
from pathlib import Path

import pytest
import torch
from small_run import FOR_KERNELS, arguments, final_tensors, losses

from yaongi.train.__main__ import main


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_pieces_are_one(device: str, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(name: str, *more: str) -> None:
        monkeypatch.setattr(
            sys, "argv", ["train", *arguments(tokens, tmp_path / name, "--device", device), *FOR_KERNELS, *more]
        )
        main()

    train("whole")  # on a GPU this run and the resumed part use CUDA graphs, the first part does not: the same bits
    train("pieces", "--stop-after", "3", "--no-cuda-graph")
    assert [step for step, _, _ in losses(tmp_path / "pieces")] == [1, 2, 3]
    train("pieces")
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    whole, pieces = (final_tensors(tmp_path / name) for name in ("whole", "pieces"))
    assert whole.keys() == pieces.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, pieces[name]), name
