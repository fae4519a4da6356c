"""Hooks of torch that are gone again after a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack

from torch import nn
from torch.utils.hooks import RemovableHandle


def hooked(modules: Iterable[nn.Module], hook: Callable[..., None]) -> AbstractContextManager[object]:
    """Within the block a hook is called before each of the modules, with the module and what it is called with."""
    return attached(module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules)


def attached(hooks: Iterable[RemovableHandle]) -> AbstractContextManager[object]:
    """Takes hooks off at the end of the block."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        return stack.pop_all()
