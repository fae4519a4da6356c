"""Parts of a layer that go: attention, the feed-forward part, or the whole block; a constant stands for each."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvslim.loading.architecture import Architecture
from kvslim.transform.edits import Array, LayerEdit


class Constant(nn.Module):
    """Gives the same [hidden] vector for every token; the addition to the hidden states broadcasts it."""

    value: Tensor

    def __init__(self, value: Array) -> None:
        super().__init__()
        self.register_buffer("value", torch.as_tensor(value).float())

    def forward(self, _: Tensor) -> Tensor:
        """The vector, whatever comes in."""
        return self.value


def remove_parts(layer: Any, architecture: Architecture, edit: LayerEdit, multiplier: float) -> None:
    """Edits a layer in place so that what its edit says is gone is a constant.

    Args:
        layer: The layer.
        architecture: Where its parts live.
        edit: What is gone of it.
        multiplier: What the family multiplies by before it adds.
    """
    attention, mlp = edit.attention_mean, edit.mlp_mean
    if not edit.has_attention and attention is None:
        raise ValueError("an attention that goes needs its mean")
    if attention is not None and mlp is not None:
        layer.forward = partial(_skipped, torch.as_tensor(multiplier * (attention + mlp)).float())
    elif attention is not None:
        output = f"{architecture.attention}.{architecture.output}"
        _replace(layer, (output,), architecture.added[0], attention)
    elif mlp is not None:
        _replace(layer, architecture.mlp, architecture.added[1], mlp)


def _skipped(value: Tensor, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states + value


def _replace(layer: nn.Module, modules: tuple[str, ...], last: str, value: Array) -> None:
    """Makes the modules of a part do nothing, and what they end in a constant."""
    for name in modules:
        layer.set_submodule(name, nn.Identity())
    layer.set_submodule(last, Constant(value))
