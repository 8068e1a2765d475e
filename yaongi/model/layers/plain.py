"""Whether a module is still the one that the model made. Only then may a kernel read its weights directly.

A user may put something else in a layer's place (an adapter, a quantised projection) or hook it. Such a module is
called, as any module is; where no call exists, it is refused.
"""

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether the module is exactly of this class, with no hooks and with its class's own `forward`."""
    return type(module) is kind and not _is_hooked(module)


def require_plain(module: Any, kind: type[nn.Module], name: str) -> None:
    """Raise ValueError unless the module is plain: its weights go into a larger kernel, so it is never called."""
    if not is_plain(module, kind):
        got = f"a hooked {kind.__name__}" if type(module) is kind else type(module).__name__
        raise ValueError(f"model: {name} must be the model's own {kind.__name__} without hooks, got {got}")


def any_hooks(model: nn.Module) -> bool:
    """Return whether some module of the model has hooks, or a `forward` of its own."""
    return any(_is_hooked(module) for module in model.modules())


def _is_hooked(module: nn.Module) -> bool:
    """Return whether calling the module does more than its class's `forward`."""
    own = any(getattr(module, name) for name in HOOKS) or "forward" in module.__dict__
    return own or torch_module._has_any_global_hook()
