"""What `kvslim inspect` reports about a model or an artifact. No weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvslim.contract import ModelSpec, WeightType
from kvslim.devices.demand import training
from kvslim.devices.limits import Limits, limits
from kvslim.devices.profile import Device
from kvslim.devices.room import planned_weights, with_rope
from kvslim.errors import UnsupportedError, UsageError
from kvslim.export.manifest import MANIFEST, read_manifest
from kvslim.recipe import Recipe
from kvslim.report.memory import (
    PLAIN_PRECISION,
    CacheMemory,
    artifact_caches,
    cache_memory,
    model_caches,
    recipe_precisions,
)
from kvslim.weight_format import WeightFormat

if TYPE_CHECKING:
    from kvslim.loading.snapshot import Snapshot

CONTEXTS = (4096, 16384)


def inspect(
    model: str, contexts: Sequence[int] | None, weights: WeightType | None, devices: Sequence[Device]
) -> CacheMemory:
    """The cache of a model from its config, or of an artifact from its manifest.

    Args:
        model: As for `kvslim compress`, or an artifact's folder.
        contexts: Lengths in tokens; None for `CONTEXTS`, at most all positions.
        weights: How a model's weights would be stored; None for what `kvslim compress` does. An artifact allows none.
        devices: Devices to compute limits for.

    Raises:
        KvslimError: The model or artifact cannot be read, or an option does not fit it.
    """
    if not (Path(model) / MANIFEST).exists():
        return _inspect_model(model, contexts, weights or "auto", devices)
    if weights is not None:
        raise UsageError("the weights of an artifact are stored already", where="--weights", fix="drop the option")
    return _inspect_artifact(Path(model), contexts, devices)


def _inspect_model(
    model: str, asked: Sequence[int] | None, kind: WeightType | Literal["auto"], devices: Sequence[Device]
) -> CacheMemory:
    from kvslim.loading.parameters import count_parameters
    from kvslim.loading.source import read_spec, resolve

    snapshot = resolve(model, weights=False)
    spec = read_spec(snapshot)
    _check(spec, devices)
    contexts = asked or _default_contexts(spec)
    parameters = count_parameters(snapshot, spec)
    weights = planned_weights(snapshot, parameters, WeightFormat(type=kind), is_encoder=spec.is_encoder)
    if not parameters.positions:  # learned ones, and no RoPE
        weights = with_rope(weights, Recipe(name="inspect").fitted(spec))
    caches = model_caches(spec)
    recipes = {} if spec.is_encoder else recipe_precisions()
    made = [cache for cache in caches if cache.name in {PLAIN_PRECISION, *recipes.values()}]
    steps = [training(spec, parameters, caches[0], context) for context in contexts]
    found: list[Limits] = []
    for device in devices:
        found += limits(device, weights, made, spec.max_context, contexts, steps)
    memory = cache_memory(spec, caches, weights.name, weights.stored, contexts, recipes, found)
    return memory.model_copy(update={"refusal": _refusal(snapshot)})


def _refusal(snapshot: Snapshot) -> str | None:
    """Why `kvslim compress` cannot read the weights; None where it can, as far as is known without them."""
    try:
        snapshot.check_codes()
    except UnsupportedError as error:
        return f"{error.message}; {error.fix}"
    return None


def _inspect_artifact(folder: Path, asked: Sequence[int] | None, devices: Sequence[Device]) -> CacheMemory:
    from kvslim.devices.stored_weights import artifact_weights
    from kvslim.validation.measure import file_mib

    manifest = read_manifest(folder)
    spec, caches = manifest.spec, artifact_caches(manifest)
    _check(spec, devices)
    contexts = asked or _default_contexts(spec)
    name, stored = str(manifest.weights), int(file_mib(folder) * 2**20)
    found: list[Limits] = []
    if devices:
        weights = artifact_weights(folder, spec, name, stored)
        for device in devices:
            found += limits(device, weights, caches, spec.max_context, contexts)
    memory = cache_memory(spec, caches, name, stored, contexts, devices=found)
    speculation = manifest.report.speculation if manifest.report else None
    made = {"matrices": manifest.matrices or {}, "draft": manifest.draft, "speculation": speculation}
    return memory.model_copy(update=made)


def _default_contexts(spec: ModelSpec) -> tuple[int, ...]:
    return tuple(dict.fromkeys(min(context, spec.max_context) for context in CONTEXTS))


def _check(spec: ModelSpec, devices: Sequence[Device]) -> None:
    if spec.is_encoder and devices:
        raise UnsupportedError(
            f"{spec.model_type} is an encoder: it has no KV cache, so a device does not limit its context",
            where="--device",
            fix="time it with `kvslim bench`",
        )
