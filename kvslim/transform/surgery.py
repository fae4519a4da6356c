"""Shape-checked weight edits: puts a layer's codes into a model, folding all that folds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvslim.load.architecture import Architecture
from kvslim.transform.attention import NAME, SlimAttention, register
from kvslim.transform.codes import Array, LayerCodes


def attention_modules(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """The attention module of each layer, in order."""
    layers = model.get_submodule(architecture.layers).children()
    return [layer.get_submodule(architecture.attention) for layer in layers]


def slim_modules(model: nn.Module, architecture: Architecture) -> list[SlimAttention]:
    """The slim attention of each layer of a prepared model, in order."""
    return [attention.kvslim for attention in attention_modules(model, architecture)]  # type: ignore[misc]


def prepare(model: Any, architecture: Architecture) -> None:
    """Gives every layer of a model the slim attention, which until codes come computes what the original does."""
    register()
    model.set_attn_implementation(NAME)
    for attention in attention_modules(model, architecture):
        attention.kvslim = SlimAttention()
        attention.get_submodule(architecture.value).register_forward_pre_hook(_catch_hidden(attention.kvslim))


def _catch_hidden(slim: SlimAttention) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        slim.hidden = inputs[0]

    return hook


def install(model: nn.Module, architecture: Architecture, codes: tuple[LayerCodes, ...]) -> None:
    """Edits a prepared model in place so that it computes with `codes`, one entry per layer.

    Keys and queries are coded after RoPE; without RoPE their codes fold into the projections too.
    """
    for attention, code in zip(attention_modules(model, architecture), codes, strict=True):
        slim: SlimAttention = attention.kvslim  # type: ignore[assignment]
        if code.key_encoder is not None and code.query_encoder is not None:
            _install_key_code(attention, slim, architecture, code.query_encoder, code.key_encoder)
        if code.value_encoder is not None:
            _install_value_code(attention, slim, architecture, code)
        if code.key_scale is not None and code.value_scale is not None:
            slim.key_scale, slim.value_scale = _tensor(code.key_scale), _tensor(code.value_scale)
            slim.per_tensor = code.per_tensor


def projection(attention: nn.Module, architecture: Architecture, side: str) -> tuple[Array, Array | None]:
    """Weight [out, in] and bias [out] in float64 of one projection: "query", "key", "value" or "output"."""
    module: Any = attention.get_submodule(getattr(architecture, side))
    weight: Array = _double(module.weight)
    bias: Array | None = None if module.bias is None else _double(module.bias)
    if not isinstance(module, nn.Linear):  # transformers' Conv1D keeps its weight transposed
        weight = weight.T
    if architecture.packed and side != "output":
        third = {"query": 0, "key": 1, "value": 2}[side]
        weight = np.split(weight, 3)[third]
        bias = None if bias is None else np.split(bias, 3)[third]
    return weight, bias


def _install_key_code(
    attention: nn.Module, slim: SlimAttention, architecture: Architecture, query_encoder: Array, key_encoder: Array
) -> None:
    if architecture.rotary is not None:
        slim.query_encoder, slim.key_encoder = _tensor(query_encoder), _tensor(key_encoder)
        return
    _fold(attention, slim, architecture, "query", query_encoder)
    _fold(attention, slim, architecture, "key", key_encoder)


def _install_value_code(
    attention: nn.Module, slim: SlimAttention, architecture: Architecture, code: LayerCodes
) -> None:
    encoder, decoder, offset = code.value_encoder, code.value_decoder, code.value_offset
    if encoder is None or decoder is None or offset is None:
        raise ValueError("a value code needs encoder, decoder and offset")
    _fold(attention, slim, architecture, "value", encoder)
    if architecture.packed and slim.query_weight is None:
        for side in ("query", "key"):
            _keep(attention, slim, architecture, side)
    weight, bias = projection(attention, architecture, "output")
    heads, rank, head_dim = decoder.shape
    if weight.shape[1] != heads * head_dim:
        raise ValueError(f"output projection reads {weight.shape[1]} values, the code gives {heads} x {head_dim}")
    by_head = weight.reshape(-1, heads, head_dim)
    folded = np.einsum("ohd,hrd->ohr", by_head, decoder).reshape(-1, heads * rank)
    shift = np.einsum("ohd,hd->o", by_head, offset)
    output = nn.Linear(heads * rank, len(folded))
    output.weight = nn.Parameter(_tensor(folded), requires_grad=False)
    output.bias = nn.Parameter(_tensor(shift if bias is None else bias + shift), requires_grad=False)
    attention.set_submodule(architecture.output, output)


def _fold(attention: nn.Module, slim: SlimAttention, architecture: Architecture, side: str, encoder: Array) -> None:
    """Folds an encoder [heads, head_dim, rank] into a projection."""
    weight, bias = projection(attention, architecture, side)
    heads, head_dim, rank = encoder.shape
    if len(weight) != heads * head_dim:
        raise ValueError(f"{side} projection gives {len(weight)} values, the code reads {heads} x {head_dim}")
    folded = np.einsum("hdi,hdr->hri", weight.reshape(heads, head_dim, -1), encoder)
    _set(slim, side, folded.reshape(heads * rank, -1))
    if bias is not None:
        _set(slim, side, np.einsum("hd,hdr->hr", bias.reshape(heads, head_dim), encoder).ravel(), "bias")


def _keep(attention: nn.Module, slim: SlimAttention, architecture: Architecture, side: str) -> None:
    """Unpacks a projection unchanged, so that the packed one is not computed for a third of its outputs."""
    weight, bias = projection(attention, architecture, side)
    _set(slim, side, weight)
    if bias is not None:
        _set(slim, side, bias, "bias")


def _set(slim: SlimAttention, side: str, values: Array, part: str = "weight") -> None:
    setattr(slim, f"{side}_{part}", _tensor(values))


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _double(tensor: Any) -> Array:
    array: Array = tensor.detach().to(torch.float64).numpy()
    return array
