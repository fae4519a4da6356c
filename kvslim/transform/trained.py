"""Weights of a layer that are trained: which they are, by name, and how they are put back.

A name is that of a parameter from the layer (`self_attn.o_proj.weight`), or of the rows and the feature maps that a
slim attention has as its own (`self_attn.kvslim.query_weight`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvslim.loading.architecture import Architecture
from kvslim.transform.attention import FEATURE_SIDES
from kvslim.transform.edits import Array, LayerEdit
from kvslim.transform.projections import SIDES

PARTS = ("weight", "bias")


def linears_of(layer: nn.Module) -> list[nn.Linear]:
    """All linear modules of a layer."""
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def mlp_linears(layer: nn.Module, architecture: Architecture) -> Iterator[tuple[str, nn.Linear]]:
    """The linear modules of a layer's feed-forward part, by their names in the layer."""
    for path in architecture.mlp:
        for name, module in layer.get_submodule(path).named_modules(prefix=path):
            if isinstance(module, nn.Linear):
                yield name, module


def set_weights(layer: nn.Module, weights: Mapping[str, Array]) -> None:
    """Puts trained weights in the place of a layer's own."""
    for name, array in weights.items():
        put(layer, name, torch.as_tensor(array))


def put(layer: nn.Module, name: str, values: Tensor) -> Tensor:
    """Puts a tensor in the place of a layer's own; gives what stands there now, which may be a parameter of it."""
    path, _, part = name.rpartition(".")
    module = layer.get_submodule(path)
    if part in module._buffers:
        module._buffers[part] = values
        return values
    parameter = nn.Parameter(values, requires_grad=values.requires_grad)
    module._parameters[part] = parameter
    return parameter


def trainable(layer: nn.Module, architecture: Architecture, edit: LayerEdit, *, with_mlp: bool) -> dict[str, Tensor]:
    """The weights of a layer that training may change, by name: projections of its attention, and of its MLP.

    Args:
        layer: The layer with its edit.
        architecture: Where its parts live.
        edit: What was done to it.
        with_mlp: Whether the feed-forward part is trained too; one that is gone has nothing to train.
    """
    names = [*_of_attention(layer, architecture, edit)]
    if with_mlp:
        names += [f"{name}.{part}" for name, _ in mlp_linears(layer, architecture) for part in PARTS]
    return {name: tensor for name in names if (tensor := _tensor(layer, name)) is not None}


def _of_attention(layer: nn.Module, architecture: Architecture, edit: LayerEdit) -> Iterator[str]:
    if not edit.has_attention:
        return
    attention: Any = layer.get_submodule(architecture.attention)
    for side in SIDES[:1] if edit.source is not None else SIDES:  # who reads another's cache has queries alone
        own = getattr(attention.kvslim, f"{side}_weight") is not None
        prefix = f"kvslim.{side}_" if own else f"{getattr(architecture, side)}."
        yield from (f"{architecture.attention}.{prefix}{part}" for part in PARTS)
    yield from (f"{architecture.attention}.{architecture.output}.{part}" for part in PARTS)
    if edit.features is not None:
        yield from (
            f"{architecture.attention}.kvslim.{side}_features_{part}" for side in FEATURE_SIDES for part in PARTS
        )


def _tensor(layer: nn.Module, name: str) -> Tensor | None:
    path, _, part = name.rpartition(".")
    found: Tensor | None = getattr(layer.get_submodule(path), part)
    return found
