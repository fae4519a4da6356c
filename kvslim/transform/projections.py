"""The projections of a layer's attention, read in float64 and written in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvslim.loading.architecture import Architecture
from kvslim.transform.attention import SlimAttention
from kvslim.transform.edits import Array

SIDES = ("query", "key", "value")


def projection(attention: nn.Module, architecture: Architecture, side: str) -> tuple[Array, Array | None]:
    """Weight [out, in] and bias [out] in float64 of one projection: "query", "key", "value" or "output"."""
    module: Any = attention.get_submodule(getattr(architecture, side))
    if side in SIDES and (own := getattr(attention.kvslim, f"{side}_weight")) is not None:
        bias = getattr(attention.kvslim, f"{side}_bias")
        return _double(own), None if bias is None else _double(bias)
    return parameters(module)


def parameters(linear: Any) -> tuple[Array, Array | None]:
    """Weight [out, in] and bias [out] in float64 of a linear module."""
    return _double(linear.weight), None if linear.bias is None else _double(linear.bias)


def set_rows(slim: SlimAttention, side: str, values: Array, part: str = "weight") -> None:
    """Gives a slim attention a weight [out, in] or a bias [out] of one projection as its own."""
    setattr(slim, f"{side}_{part}", as_tensor(values))


def set_output(attention: nn.Module, architecture: Architecture, weight: Array, bias: Array) -> None:
    """Replaces the output projection by one with this weight [out, in] and bias [out]."""
    attention.set_submodule(architecture.output, linear_of(weight, bias))


def fold(attention: nn.Module, slim: SlimAttention, architecture: Architecture, side: str, encoder: Array) -> None:
    """Folds an encoder [heads, head_dim, rank] into a projection."""
    weight, bias = projection(attention, architecture, side)
    heads, head_dim, rank = encoder.shape
    if len(weight) != heads * head_dim:
        raise ValueError(f"{side} projection gives {len(weight)} values, the code reads {heads} x {head_dim}")
    folded = np.einsum("hdi,hdr->hri", weight.reshape(heads, head_dim, -1), encoder)
    set_rows(slim, side, folded.reshape(heads * rank, -1))
    if bias is not None:
        set_rows(slim, side, np.einsum("hd,hdr->hr", bias.reshape(heads, head_dim), encoder).ravel(), "bias")


def shifted(bias: Array | None, shift: Array) -> Array:
    """A bias, if there is one, with a shift added."""
    return shift if bias is None else bias + shift


def linear_of(weight: Array, bias: Array) -> nn.Linear:
    """A linear module with a weight [out, in] and a bias [out]."""
    linear = nn.Linear(weight.shape[1], len(weight), device="meta")
    linear.weight = nn.Parameter(as_tensor(weight), requires_grad=False)
    linear.bias = nn.Parameter(as_tensor(bias), requires_grad=False)
    return linear


def as_tensor(array: Array) -> Tensor:
    """Numbers in float32, on the device that is torch's default then."""
    return torch.as_tensor(np.ascontiguousarray(array, dtype=np.float32))


def _double(tensor: Any) -> Array:
    array: Array = tensor.detach().cpu().to(torch.float64).numpy()
    return array
