"""Copies of a prepared model that share its numbers where they can."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from kvslim.loading.architecture import Architecture
from kvslim.transform.device import computing_device, free_bytes
from kvslim.transform.surgery import slim_modules

ROOM = 2  # times what the weights take: what passes leave behind, and what is kept to compare with, comes on top


def on_gpu(model: Any, architecture: Architecture) -> Any:
    """A copy of a prepared model on a GPU that has room for it; the model itself where there is none."""
    device = computing_device()
    if device.type == "cpu" or free_bytes(device) < ROOM * sum(each.nbytes for each in model.parameters()):
        return model
    return sharing_copy(model, architecture, device)


def sharing_copy(model: Any, architecture: Architecture, device: torch.device) -> Any:
    """A copy of a model, not for training, on a device; where the model is there too, all numbers are its own.

    Args:
        model: A prepared model.
        architecture: Where its parts live.
        device: Where the copy is to be.
    """
    slims = slim_modules(model, architecture)
    rotaries = {id(slim.rotary): slim.rotary for slim in slims if slim.rotary is not None}
    shared: dict[int, Any] = {place: rotary.to(device) for place, rotary in rotaries.items()}
    shared |= {id(each): nn.Parameter(each.detach().to(device), requires_grad=False) for each in model.parameters()}
    shared |= {id(each): each.to(device) for each in model.buffers()}
    return copy.deepcopy(model, shared)
