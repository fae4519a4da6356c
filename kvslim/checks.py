"""What recipe, plan and model must agree on, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvslim.caches import ClusteredCache
from kvslim.contract import ModelSpec
from kvslim.errors import UnsupportedError, UsageError
from kvslim.methods.base import Method
from kvslim.methods.kv_hdc import KvHdc
from kvslim.methods.kv_window import KvWindow
from kvslim.methods.prune_heads import PruneHeads, check_heads
from kvslim.methods.prune_layers import PruneLayers
from kvslim.methods.share_kv import ShareKv, check_sources
from kvslim.recipe import Recipe
from kvslim.types import LayerPlan, Plan

RECALL_MARGIN = 33  # first token, span and its second copy
LACKING = {
    "cluster_heads": "clusters of heads",
    "kv_quant": "integer cache",
    "kv_hdc": "integer cache",
    "kv_window": "ring",
}  # what layout attention24 does not have
ENCODER_DECISIONS = ("layer", "heads", "refit", "score", "reason")
ENCODER_GATES = {"min_embedding_cosine", "min_retrieval_rank_correlation", "min_masked_top1_agreement"}


def check_task(recipe: Recipe, spec: ModelSpec) -> None:
    """Refuses a decoder's recipe for an encoder, and the reverse.

    Raises:
        UnsupportedError: Naming what does not fit, and the recipe that does.
    """
    gates = {name for name, limit in recipe.gates if limit is not None}
    if spec.is_encoder:
        asked = [method.name for method in recipe.methods if not isinstance(method, PruneHeads | PruneLayers)]
        asked += ["a budget"] * (recipe.budget is not None)
        misfits = asked + sorted(gates - ENCODER_GATES)
        kind, lack, fix = "an encoder", "which has no KV cache", "use `-r encoder`"
    else:
        misfits = sorted(gates & ENCODER_GATES)
        kind, lack, fix = "a decoder", "which has no embeddings", "use `-r balanced`"
    if misfits:
        raise UnsupportedError(
            f"recipe {recipe.name!r} asks for {', '.join(misfits)}; {spec.model_type} is {kind}, {lack}",
            where="--recipe",
            fix=fix,
        )


def check_layout(recipe: Recipe) -> None:
    """Refuses methods that the recipe's attention operators cannot express.

    Raises:
        UsageError: Naming the method.
    """
    names = {method.name for method in recipe.methods}
    if recipe.layout == "attention24" and recipe.budget is not None:
        raise UsageError("the planner plans for layout gqa", where="recipe: budget", fix="use layout gqa")
    for method in recipe.methods:
        if isinstance(method, ShareKv):
            _check_sharing(method, recipe)
    if {"kv_hdc", "kv_quant"} <= names:
        message = "kv_hdc and kv_quant both choose how the cache is stored"
        raise UsageError(message, where="recipe: methods", fix="drop one of them")
    if any(isinstance(method, KvHdc) and method.bits <= 3 for method in recipe.methods) and "kv_window" in names:
        message = "packed codes keep what leaves their window, kv_window drops it"
        raise UsageError(message, where="recipe: methods", fix="drop kv_window, or use kv_hdc with 8 or 4 bits")
    if any(map(_counts_heads, recipe.methods)) and any(map(_takes_attention, recipe.methods)):
        message = "prune_heads cannot count on the heads of layers that prune_layers may take"
        raise UsageError(message, where="recipe: methods", fix="name the heads: prune_heads: {heads: {2: [0, 1]}}")
    for method in recipe.methods:
        if recipe.layout == "attention24" and method.name in LACKING:
            raise UsageError(
                f"layout attention24 has no {LACKING[method.name]}",
                where=f"recipe: methods.{method.name}",
                fix="use layout gqa",
            )
        if recipe.layout == "gqa" and getattr(method, "value_rank", None) is not None:
            raise UsageError(
                "layout gqa gives keys and values one rank",
                where="recipe: methods.kv_pca.value_rank",
                fix="use layout attention24, or rank alone",
            )


def _check_sharing(method: ShareKv, recipe: Recipe) -> None:
    """A source layer keeps every token, and no other method may take a layer away that is counted on."""
    where, named = "recipe: methods", {*(method.sources or {}), *(method.sources or {}).values()}
    for other in recipe.methods:
        if isinstance(other, KvHdc) and other.bits <= 3:
            message = "no layer can read the packed codes of another"
            raise UsageError(message, where=where, fix="drop share_kv, or use kv_hdc with 8 or 4 bits")
        if isinstance(other, KvWindow) and (other.layers is None or method.sources is None):
            message = "share_kv and kv_window may choose the same layers"
            raise UsageError(message, where=where, fix="name layers in both: kv_window.layers and share_kv.sources")
        if isinstance(other, KvWindow) and (both := named.intersection(other.layers or ())):
            message = f"layer {min(both)} cannot have a window and share a cache of all tokens"
            raise UsageError(message, where=where, fix="drop it from kv_window.layers or from share_kv.sources")
        if method.sources is None and (_counts_heads(other) or _takes_attention(other)):
            message = f"share_kv cannot count on layers that {other.name} may take"
            raise UsageError(message, where=where, fix="name the layers: share_kv: {sources: {5: 4}}")


def _counts_heads(method: Method) -> bool:
    """Whether a method takes heads that it must choose among all layers."""
    return isinstance(method, PruneHeads) and not method.heads


def _takes_attention(method: Method) -> bool:
    """Whether a method takes whole attentions."""
    return isinstance(method, PruneLayers) and method.takes_attention


def check_lengths(recipe: Recipe, spec: ModelSpec) -> None:
    """Refuses windows, prompts and contexts beyond the model's positions.

    Raises:
        UsageError: Naming the key and the limit.
    """
    calibration, validation = recipe.calibration, recipe.validation
    for method in recipe.methods:
        if isinstance(method, KvWindow) and method.lazy:
            _check_lazy(method, recipe)
    lengths = {"validation.length": validation.length, "validation.prompts": max(validation.prompts)}
    if not spec.is_encoder:
        lengths |= {
            "calibration.length": calibration.length,
            "validation.recall_distance": validation.recall_distance + RECALL_MARGIN,
            "validation.contexts": max(validation.contexts) + 1,
        }
    for key, length in lengths.items():
        if length > spec.max_context:
            raise UsageError(
                f"{key} needs {length} positions, the model has {spec.max_context}",
                where=f"recipe: {key}",
                fix=f"--set {key}={max(1, spec.max_context // 2)}",
            )


def _check_lazy(method: KvWindow, recipe: Recipe) -> None:
    kept = method.window + method.sinks
    lengths = {
        "calibration.length": recipe.calibration.length,
        "validation.recall_distance": recipe.validation.recall_distance,
    }
    for key, length in lengths.items():
        if length <= kept:
            raise UsageError(
                f"{key} of {length} tokens never leaves a window of {kept}, so no layer can be judged by it",
                where="recipe: methods.kv_window.lazy",
                fix=f"--set {key}={2 * kept}, or name the layers",
            )


def check_encoders(specs: Sequence[ModelSpec], lengths: Sequence[int]) -> None:
    """Refuses to time decoders among encoders, and texts beyond a model's positions.

    Raises:
        UsageError: Naming the option.
    """
    if not all(spec.is_encoder for spec in specs):
        raise UsageError("encoders and decoders share no timings", where="ARTIFACT", fix="bench one kind at a time")
    most = min(spec.max_context for spec in specs)
    if max(lengths) > most:
        raise UsageError(
            f"a text of {max(lengths)} tokens exceeds {most} positions", where="--prompt", fix=f"--prompt {most}"
        )


def check_context(artifacts: Sequence[Path], specs: Sequence[ModelSpec], longest: int) -> None:
    """Refuses a length beyond the positions of an artifact's model.

    Raises:
        UsageError: Naming the artifact and its positions.
    """
    for artifact, spec in zip(artifacts, specs, strict=True):
        if longest > spec.max_context:
            raise UsageError(
                f"{longest} tokens are more than the model's {spec.max_context} positions",
                where=str(artifact),
                fix="give shorter lengths",
            )


def check_plan(plan: Plan, spec: ModelSpec) -> None:
    """Refuses a plan that was made for another model, or that no graph can hold.

    Raises:
        UsageError: Naming the layer.
    """
    if [layer.layer for layer in plan.layers] != list(range(spec.layers)):
        raise UsageError(
            f"the plan has {len(plan.layers)} layers, the model {spec.layers}",
            where="--plan",
            fix="make one for this model with `kvslim plan MODEL -o plan.json`",
        )
    if spec.is_encoder:
        _check_encoder_plan(plan)
    if all(layer.heads == () for layer in plan.layers):
        raise UsageError("no layer keeps a head", where="--plan", fix="leave attention to one layer at least")
    for layer in plan.layers:
        where = f"--plan: layers.{layer.layer}"
        if layer.heads is not None:
            check_heads(layer.heads, spec, where)
        if layer.heads is not None and isinstance(layer.cache, ClusteredCache):
            message = "clusters of heads go without heads"
            raise UsageError(message, where=where, fix="drop heads, or clusters")
        layer.cache.check(spec, layer.layer, plan.layout, where)
    check_sources(plan, spec, lambda layer: f"--plan: layers.{layer}")


def _check_encoder_plan(plan: Plan) -> None:
    """Refuses what an encoder, which has no cache, cannot do."""
    for layer in plan.layers:
        untouched = LayerPlan(**{name: getattr(layer, name) for name in ENCODER_DECISIONS})
        if layer != untouched:
            raise UsageError(
                "an encoder has no cache to code: of its layers heads alone may go",
                where=f"--plan: layers.{layer.layer}",
                fix=f"give {', '.join(ENCODER_DECISIONS)} alone",
            )
