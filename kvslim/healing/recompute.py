"""What a step leaves in the layers until its gradients are known, and how to do with less of it.

A layer that keeps its input alone computes the rest once more when the gradients reach it (Chen et al., "Training Deep
Nets with Sublinear Memory Cost", 2016, section 4). The numbers are the same; a step takes about a quarter longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kvslim.transform.hooks import hooked


def left_bytes(model: Any, layers: Sequence[Any], tokens: Tensor) -> int:
    """Bytes that a pass leaves in the layers for the gradients; measured one layer after another.

    Args:
        model: A decoder.
        layers: Its layers.
        tokens: [n, length] token ids of a step.
    """
    calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any]]] = []
    with torch.no_grad(), hooked(layers, lambda *call: calls.append(call)):
        model.base_model(input_ids=tokens, use_cache=False)
    return sum(_left_by(*call) for call in calls)


def _left_by(layer: Any, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> int:
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), tensor), tensor, key=lambda each: each.nbytes)
        return tensor

    hidden, *others = inputs
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden.detach().requires_grad_(), *others, **options)
    for own in (*layer.parameters(), *layer.buffers()):
        kept.pop(own.data_ptr(), None)
    # One that is expanded is smaller than its shape says.
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in kept.values())


def recompute(layers: Sequence[Any]) -> None:
    """Lets layers keep their inputs alone, from now on."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
