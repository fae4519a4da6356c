"""Shape-checked weight edits: puts a layer's edit into a model, folding all that folds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvslim.caches import ClusteredCache, CodedCache
from kvslim.caches.attention.shared import SharedAttention
from kvslim.contract import ModelSpec
from kvslim.loading.architecture import Architecture
from kvslim.transform.attention import FEATURE_SIDES, NAME, SlimAttention, register
from kvslim.transform.device import where
from kvslim.transform.edits import RESIDUAL_STEPS, Array, Codes, Features, KeptHeads, LayerEdit, LinearCode
from kvslim.transform.narrowing import narrow
from kvslim.transform.normal import normalise
from kvslim.transform.projections import SIDES, as_tensor, fold, linear_of, projection, set_output, set_rows, shifted
from kvslim.transform.removal import remove_parts
from kvslim.transform.rotary import take_over
from kvslim.transform.trained import PARTS, linears_of, set_weights


def layer_modules(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """The layers, in order."""
    return list(model.get_submodule(architecture.layers).children())


def attention_modules(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """The attention module of each layer, in order."""
    return [layer.get_submodule(architecture.attention) for layer in layer_modules(model, architecture)]


def slim_modules(model: nn.Module, architecture: Architecture) -> list[SlimAttention]:
    """The slim attention of each layer of a prepared model, in order."""
    return [attention.kvslim for attention in attention_modules(model, architecture)]  # type: ignore[misc]


def prepare(model: Any, architecture: Architecture, spec: ModelSpec) -> None:
    """Gives every layer of a model the slim attention, which until codes come computes what the original does.

    Args:
        model: The model; edited.
        architecture: Where its parts live.
        spec: Its shape.
    """
    register()
    model.set_attn_implementation(NAME)
    normalise(model)
    rotaries = take_over(model, architecture, spec.max_context)
    attentions = attention_modules(model, architecture)
    for attention, rotary, window in zip(attentions, rotaries, spec.windows, strict=True):
        attention.kvslim = SlimAttention(rotary, window)
        attention.kvslim.is_normed = architecture.norms_query(model.config)
        attention.get_submodule(architecture.value).register_forward_pre_hook(catch_hidden(attention.kvslim))
        project_directly(attention, architecture, spec)


def project_directly(attention: nn.Module, architecture: Architecture, spec: ModelSpec) -> None:
    """Where the family allows it, gives a slim attention the rows of query, key and value as its own."""
    slim: Any = attention.kvslim
    if not architecture.direct or slim.is_normed:
        return
    for side in SIDES:
        module = attention.get_submodule(getattr(architecture, side))
        for part in ("weight", "bias"):
            rows = getattr(module, part)
            if rows is not None:
                own = _rows(rows.detach(), architecture, spec, side)
                setattr(slim, f"{side}_{part}", own)


def _rows(rows: Tensor, architecture: Architecture, spec: ModelSpec, side: str) -> Tensor:
    """The rows of one side in a weight [rows, in] or bias [rows], packed or not."""
    index, q_rows, kv_rows = SIDES.index(side), spec.q_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if architecture.packing == "blocks":
        return rows.split([q_rows, kv_rows, kv_rows])[index]
    if architecture.packing == "heads":
        return rows.unflatten(0, (spec.q_heads, 3, spec.head_dim))[:, index].flatten(0, 1)
    return rows


def catch_hidden(slim: SlimAttention) -> Any:
    """A hook that tells a layer's slim attention what the projections read; a copy of the layer tells its own."""
    return partial(_catch, slim)


def _catch(slim: SlimAttention, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    slim.hidden = inputs[0]


def install(model: nn.Module, architecture: Architecture, edits: Codes) -> None:
    """Edits a prepared model in place so that it computes with `edits`, one entry per layer.

    Keys and queries are coded after RoPE; without RoPE their codes fold into the projections too.
    """
    config: Any = model.config
    multiplier, slims = architecture.multiplier(config), slim_modules(model, architecture)
    for layer, slim, whole in zip(layer_modules(model, architecture), slims, edits, strict=True):
        remove_parts(layer, architecture, whole, multiplier)
        if whole.channels is not None:
            narrow(layer, architecture, whole.channels)
        if whole.down is not None:
            layer.set_submodule(architecture.down, linear_of(whole.down.weight, whole.down.bias))
        if whole.heads is not None:
            slim.heads = {"query": whole.heads.query}
            slim.heads |= {} if whole.source is not None else dict.fromkeys(("key", "value"), whole.heads.kv)
        if not slim.is_dropped:
            _install_attention(layer.get_submodule(architecture.attention), slim, architecture, whole)
        if isinstance(slim.cache, SharedAttention):
            source = slims[slim.cache.read.source]
            slim.cache.read = source.shared = source.shared or slim.cache.read
        set_weights(layer, whole.weights)


def _install_attention(attention: nn.Module, slim: SlimAttention, architecture: Architecture, whole: LayerEdit) -> None:
    if whole.heads is not None:
        _prune_heads(attention, slim, architecture, whole.heads)
    if isinstance(whole.cache, ClusteredCache) and whole.cache.clusters is not None:
        _cluster_heads(attention, slim, architecture, whole.cache.clusters)
    edit = whole.of_kept_heads()
    _install_code(attention, slim, architecture, edit)
    _install_storage(slim, edit)
    if edit.features is not None:
        _install_features(slim, edit.features)
    slim.cache = edit.cache.attention(edit)


def _install_code(attention: nn.Module, slim: SlimAttention, architecture: Architecture, edit: LayerEdit) -> None:
    code = edit.code
    if code.query_encoder is not None:
        query_encoder = _with_copies(code.query_encoder, _residuals(edit)[0], axis=2)
        _install_query_code(attention, slim, architecture, query_encoder)
    if code.key_encoder is not None:
        _install_key_code(attention, slim, architecture, code.key_encoder)
    if code.value_encoder is not None:
        if code.value_decoder is None or code.value_offset is None:
            raise ValueError("a value code needs a decoder and an offset")
        fold(attention, slim, architecture, "value", code.value_encoder)
    if code.value_centre is not None:
        _centre_values(attention, slim, architecture, code)
    if code.value_decoder is not None and code.value_offset is not None:
        _install_value_decoder(attention, architecture, code.value_decoder, code.value_offset)
    if edit.output is not None:
        set_output(attention, architecture, edit.output.weight, edit.output.bias)


def _residuals(edit: LayerEdit) -> tuple[int, int]:
    """Coordinates of keys and of values that what the layer reads holds twice, once they are rounded."""
    stored, rounding = edit.stored, edit.rounding
    if not isinstance(stored, CodedCache):
        return 0, 0
    key, value = stored.residuals
    return (0 if rounding.key_scale is None else key), (0 if rounding.value_scale is None else value)


def _install_storage(slim: SlimAttention, edit: LayerEdit) -> None:
    rounding = edit.rounding
    slim.residuals = _residuals(edit)
    if edit.code.key_offset is not None:
        slim.key_offset = as_tensor(edit.code.key_offset[:, None])
    if rounding.key_scale is not None:
        slim.key_scale = as_tensor(_with_finer(rounding.key_scale, slim.residuals[0]))
    if rounding.value_scale is not None:
        slim.value_scale = as_tensor(_with_finer(rounding.value_scale, slim.residuals[1]))
    if slim.residuals[1] and edit.code.value_decoder is not None:
        rank = edit.code.value_decoder.shape[1]
        slim.value_sum = as_tensor(_with_copies(np.eye(rank), slim.residuals[1], axis=0))
    for name in ("key_feedback", "value_feedback"):
        if (feedback := getattr(rounding, name)) is not None:
            setattr(slim, name, as_tensor(feedback))
    slim.stored = edit.stored.dtype
    slim.per_tensor = isinstance(edit.stored, CodedCache) and edit.stored.granularity == "per_tensor"
    if rounding.key_levels is not None and rounding.value_levels is not None:
        slim.key_levels, slim.value_levels = as_tensor(rounding.key_levels), as_tensor(rounding.value_levels)


def _install_features(slim: SlimAttention, features: Features) -> None:
    for side in FEATURE_SIDES:
        for part in PARTS:
            rows = getattr(features, f"{side}_{part}")
            setattr(slim, f"{side}_features_{part}", as_tensor(rows.reshape(-1, *rows.shape[2:])))


@contextlib.contextmanager
def trial(model: Any, architecture: Architecture, edits: Codes) -> Iterator[None]:
    """Within the block a prepared model computes with `edits`; after it, as before."""
    layers, slims = layer_modules(model, architecture), slim_modules(model, architecture)
    modules = [{name: layer.get_submodule(name) for name in architecture.edited} for layer in layers]
    linears = [(linear, dict(linear._parameters)) for layer in layers for linear in linears_of(layer)]
    before = [{**vars(slim), "_buffers": dict(slim._buffers)} for slim in slims]
    try:
        with where(model):
            install(model, architecture, edits)
            yield
    finally:
        for layer, slim, edited, state in zip(layers, slims, modules, before, strict=True):
            vars(layer).pop("forward", None)
            for name, module in edited.items():
                layer.set_submodule(name, module)
            vars(slim).update(state)
        for linear, own in linears:
            linear._parameters.update(own)


def _prune_heads(attention: nn.Module, slim: SlimAttention, architecture: Architecture, kept: KeptHeads) -> None:
    """Takes heads out of all projections; their mean output stays, as a bias."""
    if kept.mean_output is None or slim.heads is None:
        raise ValueError("pruned heads need the mean output of all heads")
    q_heads, head_dim = kept.mean_output.shape
    weight, bias = projection(attention, architecture, "output")
    by_head = weight.reshape(-1, q_heads, head_dim)
    gone = [head for head in range(q_heads) if head not in kept.query]
    shift = np.einsum("ohd,hd->o", by_head[:, gone], kept.mean_output[gone])
    bias = shifted(bias, shift)
    set_output(attention, architecture, by_head[:, kept.query].reshape(len(weight), -1), bias)
    for side in slim.heads:
        _keep_rows(attention, slim, architecture, side, head_dim)


def _keep_rows(attention: nn.Module, slim: SlimAttention, architecture: Architecture, side: str, head_dim: int) -> None:
    """Takes the heads that `slim.heads` lacks out of the projection of one side."""
    if slim.heads is not None and (side == "value" or not _is_changed_later(slim, architecture, side)):
        rows, bias = projection(attention, architecture, side)
        heads = list(slim.heads[side])
        set_rows(slim, side, rows.reshape(-1, head_dim, rows.shape[1])[heads].reshape(-1, rows.shape[1]))
        if bias is not None:
            set_rows(slim, side, bias.reshape(-1, head_dim)[heads].ravel(), "bias")


def _cluster_heads(
    attention: nn.Module, slim: SlimAttention, architecture: Architecture, clusters: tuple[int, ...]
) -> None:
    """Leaves the queries of representatives, and their keys where no other query head reads these."""
    representatives = sorted(set(clusters))
    head_dim = len(projection(attention, architecture, "query")[0]) // len(clusters)
    kv_heads = len(projection(attention, architecture, "value")[0]) // head_dim
    keys = representatives if kv_heads == len(clusters) else range(kv_heads)
    slim.heads = {"query": tuple(representatives), "key": tuple(keys), "value": tuple(range(kv_heads))}
    slim.membership = torch.tensor([representatives.index(head) for head in clusters])
    _keep_rows(attention, slim, architecture, "query", head_dim)
    if kv_heads == len(clusters):
        _keep_rows(attention, slim, architecture, "key", head_dim)


def _is_changed_later(slim: SlimAttention, architecture: Architecture, side: str) -> bool:
    """Whether the model norms or scales what the projection of queries or keys gives."""
    return slim.is_normed or (side == "query" and architecture.scaled_query)


def _install_query_code(attention: nn.Module, slim: SlimAttention, architecture: Architecture, encoder: Array) -> None:
    if slim.rotary is not None or architecture.scaled_query:
        slim.query_encoder = as_tensor(encoder)
    else:
        fold(attention, slim, architecture, "query", encoder)


def _install_key_code(attention: nn.Module, slim: SlimAttention, architecture: Architecture, encoder: Array) -> None:
    if slim.rotary is not None:
        slim.key_encoder = as_tensor(encoder)
    else:
        fold(attention, slim, architecture, "key", encoder)


def _centre_values(attention: nn.Module, slim: SlimAttention, architecture: Architecture, code: LinearCode) -> None:
    """Takes the centre from each value in its projection's bias; the output projection's bias gives it back."""
    centre = np.asarray(code.value_centre)
    rows, bias = projection(attention, architecture, "value")
    set_rows(slim, "value", rows)
    set_rows(slim, "value", shifted(bias, -centre.ravel()), "bias")
    weight, output_bias = projection(attention, architecture, "output")
    if code.value_decoder is None:
        decoded = np.repeat(centre, weight.shape[1] // centre.size, axis=0)
    else:
        read = np.repeat(centre, len(code.value_decoder) // len(centre), axis=0)
        decoded = np.einsum("hr,hrd->hd", read, code.value_decoder)
    set_output(attention, architecture, weight, shifted(output_bias, weight @ decoded.ravel()))


def _install_value_decoder(attention: nn.Module, architecture: Architecture, decoder: Array, offset: Array) -> None:
    weight, bias = projection(attention, architecture, "output")
    heads, rank, head_dim = decoder.shape
    if weight.shape[1] != heads * head_dim:
        raise ValueError(f"output projection reads {weight.shape[1]} values, the code gives {heads} x {head_dim}")
    by_head = weight.reshape(-1, heads, head_dim)
    folded = np.einsum("ohd,hrd->ohr", by_head, decoder).reshape(-1, heads * rank)
    shift = np.einsum("ohd,hd->o", by_head, offset)
    set_output(attention, architecture, folded, shifted(bias, shift))


def _with_copies(array: Array, count: int, axis: int) -> Array:
    """An array whose first `count` entries along an axis stand behind it once more."""
    return np.concatenate([array, np.take(array, range(count), axis)], axis)


def _with_finer(scale: Array, count: int) -> Array:
    """Steps [heads, rank] with those of the residuals of the first `count`."""
    return np.concatenate([scale, scale[:, :count] / RESIDUAL_STEPS], axis=1)
