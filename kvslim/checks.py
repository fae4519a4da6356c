"""What recipe, plan and model must agree on, checked before any weight is read."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from kvslim.caches import ClusteredCache
from kvslim.calibrate.text_source import check_source
from kvslim.contract import ModelSpec
from kvslim.errors import UnsupportedError, UsageError
from kvslim.export.space import check_space
from kvslim.loading.model import check_room
from kvslim.loading.snapshot import Snapshot
from kvslim.methods.prune_heads import check_heads
from kvslim.methods.sources import check_sources
from kvslim.recipe import Recipe
from kvslim.runtime.opening import check_threads
from kvslim.runtime.text import used_draft
from kvslim.settings import Budget
from kvslim.types import LayerPlan, Manifest, Plan
from kvslim.validation.bench import Grid
from kvslim.validation.drafts import SHORTEST
from kvslim.validation.spans import LEAST_DISTANCE, longest_distance, positions_of

LEAST_TEXT, LEAST_RECALL = 32, positions_of(LEAST_DISTANCE)  # positions, to measure an encoder or a decoder
ENCODER_DECISIONS = ("layer", "heads", "refit", "score", "reason")
ENCODER_GATES = {"min_embedding_cosine", "min_retrieval_rank_correlation", "min_masked_top1_agreement"}
SIZE_GATES = {"max_file_mib", "max_memory_mib"}  # of every kind of model


def check_recipe(recipe: Recipe, spec: ModelSpec) -> None:
    """Refuses a recipe whose parts do not fit each other or the model.

    Raises:
        UnsupportedError: The recipe is for the other kind of model.
        UsageError: Naming the method or key.
    """
    check_task(recipe, spec)
    for method in recipe.methods:
        method.check(spec)
    check_methods(recipe)
    check_lengths(recipe, spec)
    if recipe.splits_memory and not recipe.weights.is_open:
        other = "leave the limit of the file out" if recipe.weights.picks else "give --weights int4 and no more of them"
        raise UsageError(
            f"weights as {recipe.weights} leave nothing to choose between them and the cache",
            where=Budget.place("memory_mib"),
            fix=f"{other}, or limit the cache alone with --kv-mib-at",
        )


def check_task(recipe: Recipe, spec: ModelSpec) -> None:
    """Refuses a decoder's recipe for an encoder, and the reverse.

    Raises:
        UnsupportedError: Naming what does not fit, and the recipe that does.
    """
    gates = {name for name, limit in recipe.gates if limit is not None}
    if spec.is_encoder:
        asked = [method.name for method in recipe.methods if not method.supports_encoders]
        asked += ["a budget"] * (recipe.budget is not None)
        asked += ["a draft"] * (recipe.draft != "none")
        asked += [f"weights in {recipe.weights}"] * recipe.weights.needs_text
        asked += ["healing"] * (recipe.heal is not None)
        misfits = asked + sorted(gates - ENCODER_GATES - SIZE_GATES)
        fix = "leave that out" if recipe.name == "encoder" else "use `-r encoder`"
        kind, lack = "an encoder", "which has no KV cache"
    else:
        misfits = sorted(gates & ENCODER_GATES)
        kind, lack, fix = "a decoder", "which has no embeddings", "use `-r balanced`"
    if misfits:
        raise UnsupportedError(
            f"recipe {recipe.name!r} asks for {', '.join(misfits)}; {spec.model_type} is {kind}, {lack}",
            where="--recipe",
            fix=fix,
        )


def check_files(
    snapshot: Snapshot, spec: ModelSpec, recipe: Recipe, graphs: Mapping[Path, int] = MappingProxyType({})
) -> None:
    """Refuses files that cannot be read, or do not hold what the recipe asks for, and disks that are too small.

    Args:
        snapshot: The model's files.
        spec: Its shape.
        recipe: What is to be made.
        graphs: How many graphs in float32, at most, are to be written into each folder. While weights are quantised or
            the model writes its own text, one more lies with the temporary files; and the weights, where they are
            larger than memory.

    Raises:
        KvslimError: Naming the file or the folder.
    """
    snapshot.check()
    if recipe.weights.type == "stored" and not snapshot.has_blocks:
        raise UsageError(
            "weights: stored keeps the blocks of a GGUF file, and this model has none",
            where=str(snapshot.path),
            fix="give a GGUF file that is quantised, or write --set weights=int4",
        )
    counts, temporary = Counter(graphs), Path(tempfile.gettempdir())
    sources = {recipe.calibration.source, recipe.validation.source}
    writes_text = "self" in sources and not spec.is_encoder and not snapshot.is_demo
    counts[temporary] += int(recipe.weights.is_quantised or writes_text)
    graph_bytes = 2 * snapshot.stored_bytes + spec.rope_bytes
    needed = {folder: count * graph_bytes for folder, count in counts.items()}
    needed[temporary] += 0 if spec.is_encoder else check_room(snapshot)
    check_space(needed)


def check_methods(recipe: Recipe) -> None:
    """Refuses methods that cannot stand beside each other, or that the recipe's attention operators cannot express.

    Raises:
        UsageError: Naming the methods.
    """
    if recipe.layout == "attention24" and recipe.budget is not None:
        raise UsageError("the planner plans for layout gqa", where="recipe: budget", fix="use layout gqa")
    for method in recipe.ordered_methods:
        others = [other for other in recipe.methods if other is not method]
        for conflict in method.conflicts(others, recipe):
            raise UsageError(conflict.message, where=conflict.where, fix=conflict.fix)


def check_lengths(recipe: Recipe, spec: ModelSpec) -> None:
    """Refuses windows, prompts and contexts beyond the model's positions.

    Raises:
        UnsupportedError: The model has too few positions to measure anything.
        UsageError: Naming the keys and the limit.
    """
    least = LEAST_TEXT if spec.is_encoder else LEAST_RECALL
    most, is_limited = spec.max_context, not spec.is_encoder and recipe.positions == spec.max_context
    if most < least and is_limited:
        message = f"an artifact of {most} positions cannot be measured, which takes {least}"
        raise UsageError(message, where="recipe: positions", fix=f"--set positions={least}")
    if most < least:
        message = f"the model has {most} positions, and measuring one takes {least}"
        raise UnsupportedError(message, where="MODEL", fix="give a model for longer texts")
    budget = recipe.budget
    if budget is not None and budget.size is not None and (budget.context or 0) > most:
        raise UsageError(
            f"{budget.context:,} tokens are more than the {most:,} positions of the model",
            where=Budget.place(budget.size),
            fix=f"give the limit at {most} tokens or fewer",
        )
    too_long = {key: length for key, length in _lengths(recipe, spec).items() if length.positions > most}
    if too_long:
        needs = ", ".join(f"{key} needs {length.positions} positions" for key, length in too_long.items())
        raise UsageError(
            needs + (f"; positions leaves {most}" if is_limited else f"; the model has {most}"),
            where=f"recipe: {', '.join(too_long)}",
            fix=" ".join(f"--set {key}={length.most}" for key, length in too_long.items()),
        )


class _Length(NamedTuple):
    """The positions that a length of a recipe takes, and the most that the model has room for, as a recipe says it."""

    positions: int
    most: int | list[int]


def _lengths(recipe: Recipe, spec: ModelSpec) -> dict[str, _Length]:
    """What must fit into a model's positions, by key."""
    calibration, validation, most = recipe.calibration, recipe.validation, spec.max_context
    lengths = {
        "validation.length": _Length(validation.length, most),
        "validation.prompts": _Length(max(recipe.timed_prompts(spec)), [most]),
    }
    if spec.is_encoder:
        return lengths
    return lengths | {
        "calibration.length": _Length(calibration.length, most),
        "calibration.context": _Length(calibration.context or 0, most),
        "validation.recall_distance": _Length(positions_of(validation.recall_distance), longest_distance(most)),
        "validation.contexts": _Length(max(recipe.timed_contexts(spec)) + 1, [most - 1]),
    }


def check_cache(spec: ModelSpec, lack: str) -> None:
    """Refuses a model without a KV cache.

    Args:
        spec: The model's shape.
        lack: What there is then not, such as "nothing to plan".

    Raises:
        UnsupportedError: The model is an encoder.
    """
    if spec.is_encoder:
        raise UnsupportedError(
            f"{spec.model_type} is an encoder: without a KV cache there is {lack}",
            where="MODEL",
            fix="make an artifact with `kvslim compress MODEL -r encoder -o OUT`",
        )


def check_grid(artifacts: Sequence[Path], manifests: Sequence[Manifest], grid: Grid) -> None:
    """Refuses to time decoders among encoders, lengths beyond positions, threads beyond reason, and texts of no use.

    Raises:
        UsageError: Naming the option or the artifact.
    """
    for threads in grid.threads:
        if threads is not None:
            check_threads(threads)
    _check_text(grid, manifests)
    specs = [manifest.spec for manifest in manifests]
    if any(spec.is_encoder for spec in specs):
        _check_encoders(specs, grid.prompts)
    else:
        _check_positions(artifacts, specs, "--prompt", max(grid.prompts))
        _check_positions(artifacts, specs, "--context", max(grid.contexts))


def _check_text(grid: Grid, manifests: Sequence[Manifest]) -> None:
    """Refuses a text for drafts that cannot be read, or that no draft would use.

    Raises:
        KvslimError: As `check_source`, or naming the option.
    """
    check_source(grid.text, "--text")
    if grid.text == "self":
        return
    if max(grid.contexts) < SHORTEST:
        message = f"drafts, which would use --text, are timed from {SHORTEST} tokens on"
        raise UsageError(message, where="--context", fix=f"--context {SHORTEST}, or leave out --text")
    if any(used_draft(manifest, grid.speculative) for manifest in manifests):
        return
    if any(manifest.draft for manifest in manifests):
        fix = "leave out --text, or --speculative none"
    else:
        fix = "leave out --text, or make the artifact with --draft"
    raise UsageError("no artifact has a draft that would use the text", where="--text", fix=fix)


def _check_encoders(specs: Sequence[ModelSpec], lengths: Sequence[int]) -> None:
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


def _check_positions(artifacts: Sequence[Path], specs: Sequence[ModelSpec], option: str, longest: int) -> None:
    """Refuses a length of an option beyond the positions of an artifact's model.

    Raises:
        UsageError: Naming the option, the artifact and its positions.
    """
    artifact, most = min(zip(artifacts, (spec.max_context for spec in specs), strict=True), key=lambda found: found[1])
    if longest > most:
        raise UsageError(
            f"{longest} tokens are more than the {most} positions of {artifact}", where=option, fix=f"{option} {most}"
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
