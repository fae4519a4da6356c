"""The model with its codes, as a student of the model without: the two share all weights that are not trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kvslim.loading.architecture import Architecture
from kvslim.transform.copies import sharing_copy
from kvslim.transform.device import where
from kvslim.transform.edits import Array, Codes, LayerEdit
from kvslim.transform.surgery import install, layer_modules
from kvslim.transform.trained import put, trainable


class Student:
    """A model that computes with codes, and its weights that are trained.

    Args:
        model: The teacher, without codes; it stays as it is.
        architecture: Where its parts live.
        codes: One entry per layer.

    Attributes:
        model: The copy.
        layers: Its layers.
        weights: What is trained, by layer and name.
    """

    def __init__(self, model: Any, architecture: Architecture, codes: Codes) -> None:
        self.codes = codes
        self.model = sharing_copy(model, architecture, model.device)
        with where(model):
            install(self.model, architecture, codes)
        self.layers = layer_modules(self.model, architecture)
        self.weights: dict[tuple[int, str], Tensor] = {}
        for index, layer in enumerate(self.layers):
            with_mlp = trains_mlp(codes, index)
            for name, tensor in trainable(layer, architecture, codes[index], with_mlp=with_mlp).items():
                own = tensor.detach().clone().requires_grad_()
                self.weights[index, name] = put(layer, name, own)

    def trained(self) -> Codes:
        """The codes with the weights as they are now."""
        found: list[dict[str, Array]] = [{} for _ in self.codes]
        for (layer, name), weight in self.weights.items():
            found[layer][name] = weight.detach().cpu().numpy().copy()
        return tuple(
            with_weights(code, weights) if weights else code for code, weights in zip(self.codes, found, strict=True)
        )


def with_weights(code: LayerEdit, weights: Mapping[str, Array]) -> LayerEdit:
    """A layer's edit with trained weights, over those of an earlier training."""
    return replace(code, weights={**code.weights, **weights})


def trains_mlp(codes: Codes, layer: int) -> bool:
    """Whether a layer's feed-forward part is trained: it has lost channels, or what stood beside it or behind it."""
    code = codes[layer]
    before_gap = layer + 1 < len(codes) and codes[layer + 1].is_dropped
    return code.mlp_mean is None and (not code.has_attention or before_gap or code.channels is not None)
