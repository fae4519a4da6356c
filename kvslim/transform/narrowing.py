"""Feed-forward parts with fewer channels: rows of what makes a channel, columns of what reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from kvslim.loading.architecture import Architecture
from kvslim.transform.edits import Array, Channels
from kvslim.transform.projections import as_tensor, parameters, shifted
from kvslim.transform.trained import mlp_linears, put


def narrow(layer: nn.Module, architecture: Architecture, channels: Channels) -> None:
    """Takes channels out of a layer's feed-forward part; their mean stays, as a bias of its last projection.

    Args:
        layer: The layer; edited.
        architecture: Where its parts live.
        channels: Those that stay.
    """
    down: Any = layer.get_submodule(architecture.down)
    weight, bias = parameters(down)
    width, kept = weight.shape[1], channels.kept
    gone = np.setdiff1d(np.arange(width), kept)
    _put(layer, architecture.down, weight[:, kept], shifted(bias, weight[:, gone] @ channels.mean[gone]))
    for name, module in mlp_linears(layer, architecture):
        if name != architecture.down:
            weight, bias = parameters(module)  # one row for each channel, or first all gates and then all others
            rows = (np.arange(len(weight)).reshape(-1, width)[:, kept]).ravel()
            _put(layer, name, weight[rows], None if bias is None else bias[rows])


def _put(layer: nn.Module, name: str, weight: Array, bias: Array | None) -> None:
    put(layer, f"{name}.weight", as_tensor(weight))
    if bias is not None:
        put(layer, f"{name}.bias", as_tensor(bias))
