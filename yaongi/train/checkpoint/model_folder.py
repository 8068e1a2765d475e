"""The trained model in a folder that `Yaongi.from_pretrained` and `python -m yaongi.generate` read."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi
from yaongi.model.hub.run_card import add_run
from yaongi.model.hub.weights import staged
from yaongi.train.distributed.sharding import is_sharded
from yaongi.world import World


def save_model(model: Yaongi, tokenizer: Tokenizer, folder: Path, world: World, *, chat: bool = False) -> None:
    """Write weights, configuration, tokenizer and a card that tells of the run. All processes must call it.

    An error leaves `folder` as it was. Files that an earlier save did not write stay.

    Args:
        chat: whether the model was tuned on chats: the tokenizer's files say then how its turns end.

    Raises:
        OSError: it can't be written.
    """
    sharded = any(map(is_sharded, model.state_dict().values()))
    whole = _gathered(model, world) if sharded else model
    if whole is not None and world.is_main:
        try:
            with staged(folder) as building:
                whole.save_pretrained(building)
                tokenizer.save(building, chat=chat)
                add_run(building, folder.parent)
        except OSError as error:
            rest = "the last checkpoint is whole, and the same command writes the model again"
            why = " ".join((error.strerror or str(error)).split())
            raise OSError(error.errno, f"train: the model can't be written to {folder}: {why}; {rest}") from error
    world.barrier()


def saved_bytes(model: Yaongi) -> int:
    """Return the bytes of the tensors that `save_model` writes."""
    size = model.lm_head.weight.element_size()  # of projections too, which FP8 training keeps in float32
    tensors = model.state_dict().items()
    return sum(t.numel() * (size if n.endswith("_proj.weight") else t.element_size()) for n, t in tensors)


def _gathered(model: Yaongi, world: World) -> Yaongi | None:
    """Return an unsharded copy on the CPU of the first process; None on the others."""
    whole = Yaongi(model.config, device="meta")
    for name, tensor in model.state_dict().items():
        everything = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            _put(whole, name, everything.cpu())
    return whole if world.is_main else None


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer `name` by `tensor`."""
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    if leaf in parent._parameters:
        setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(parent, leaf, tensor)
