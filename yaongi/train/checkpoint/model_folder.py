"""The trained model in a folder that `Yaongi.from_pretrained` and `python -m yaongi.generate` read."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from yaongi.data.tokenizer import Tokenizer
from yaongi.model import Yaongi
from yaongi.model.hub.weights import staged
from yaongi.train.distributed.sharding import is_sharded
from yaongi.world import World


def save_model(model: Yaongi, tokenizer: Tokenizer, folder: Path, world: World) -> None:
    """Write weights, configuration and tokenizer. All processes must call it.

    An error leaves `folder` as it was. Files that an earlier save did not write stay.
    """
    sharded = any(map(is_sharded, model.parameters()))
    whole = _gathered(model, world) if sharded else model
    if whole is not None and world.is_main:
        with staged(folder) as building:
            whole.save_pretrained(building)
            tokenizer.save(building)
    world.barrier()


def _gathered(model: Yaongi, world: World) -> Yaongi | None:
    """Return an unsharded copy on the CPU of the first process; None on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if not world.is_main:
        return None
    whole = Yaongi(model.config, device="meta")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"model_folder: {name} must be a tensor, got {type(tensor).__name__}")
        _put(whole, name, tensor)
    return whole


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer `name` by `tensor`."""
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    if leaf in parent._parameters:
        setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(parent, leaf, tensor)
