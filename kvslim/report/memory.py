"""The memory that a KV cache needs, computed from a config or a manifest alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from kvslim.contract import Frozen, ModelSpec
from kvslim.devices.demand import Cache, query_heads
from kvslim.devices.limits import Limits
from kvslim.measures import Speculation
from kvslim.recipe import load_recipe, shipped_recipes
from kvslim.types import Draft, Manifest, Plan

PRECISIONS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
PLAIN_PRECISION = "fp32"
PLAIN, AS_IS = "plain", "as it is"


class LayerMemory(Frozen):
    """The cache of one layer.

    `key_dim` and `value_dim` are cached numbers per head and token; `bytes_per_token` is keyed by precision; for
    packed codes it counts the codes. `window` and `sinks` are the tokens kept, or with packed codes or a state the
    tokens kept exact; `features` are the rows of a state. A layer without attention has no heads; keys have fewer
    `heads` than `value_heads` if heads share attention.
    """

    layer: int
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    window: int | None
    sinks: int | None
    features: int | None
    bytes_per_token: dict[str, int]


class CacheMemory(Frozen):
    """The cache of a whole model or artifact, and its limits on devices.

    `kv_bytes_per_token` is the cache at the longest of the contexts over that context, as in a report; windows make it
    less than the sum of the layers. `mib` and `share`, of cache and weights together, are keyed by context length in
    tokens, then by precision.
    """

    model_type: str
    max_context: int
    layers: tuple[LayerMemory, ...]
    kv_bytes_per_token: dict[str, float]
    mib: dict[str, dict[str, float]]
    weights: str
    weights_mib: float
    matrices: dict[str, str] = Field({}, description="of an artifact: how each matrix in blocks is stored")
    draft: Draft | None = Field(None, description="of an artifact: what proposes tokens, if it has one")
    speculation: Speculation | None = Field(None, description="what that draft gains, if it was measured")
    share: dict[str, dict[str, float]]
    recipes: dict[str, str] = Field(
        description="the precision whose bytes a recipe takes at most; none for an artifact"
    )
    devices: tuple[Limits, ...] = ()
    refusal: str | None = Field(None, description="of a model: why its weights cannot be read, and what helps")

    def label(self, cache: str) -> str:
        """What users call a cache: the recipes that give it, plain, or its own name."""
        if cache == PLAIN_PRECISION:
            return PLAIN
        return " and ".join(recipe for recipe, stored in self.recipes.items() if stored == cache) or cache


def model_caches(spec: ModelSpec) -> tuple[Cache, ...]:
    """A model's own cache in each precision."""
    return tuple(Cache.of(name, spec, Plan.identity(spec), bits) for name, bits in PRECISIONS.items())


def recipe_precisions() -> dict[str, str]:
    """The precision whose bytes each shipped recipe takes at most: its gate on bytes refuses more."""
    found: dict[str, str] = {}
    for name in shipped_recipes():
        bits = PRECISIONS[PLAIN_PRECISION] * (load_recipe(name).gates.max_kv_ratio or 0)
        if fitting := [kind for kind, size in PRECISIONS.items() if size <= bits]:
            found[name] = fitting[0]
    return found


def artifact_caches(manifest: Manifest) -> tuple[Cache, ...]:
    """The float32 cache of the original model, and the artifact's own."""
    spec = manifest.spec
    own = Cache(AS_IS, manifest.kv_layout, query_heads(spec, manifest.plan))
    return Cache.of(PLAIN, spec, Plan.identity(spec)), own


def cache_memory(
    spec: ModelSpec,
    caches: Sequence[Cache],
    weights: str,
    weight_bytes: int,
    contexts: Sequence[int],
    recipes: Mapping[str, str] | None = None,
    devices: Sequence[Limits] = (),
) -> CacheMemory:
    """The size of each cache, by itself and together with the weights.

    Args:
        spec: The model's shape.
        caches: Caches to compare; the layers are those of the last.
        weights: How the weights are stored.
        weight_bytes: Bytes of the weights.
        contexts: Lengths in tokens.
        recipes: The cache whose bytes a recipe takes at most, by recipe.
        devices: Limits computed for the same caches, or some of them.
    """
    layers = tuple(_layer(caches, index) for index in range(0 if spec.is_encoder else spec.layers))
    sizes = {str(tokens): {cache.name: cache.bytes_at(tokens) for cache in caches} for tokens in contexts}
    return CacheMemory(
        model_type=spec.model_type,
        max_context=spec.max_context,
        layers=layers,
        kv_bytes_per_token={cache.name: cache.bytes_at(max(contexts)) / max(contexts) for cache in caches},
        mib={tokens: {name: size / 2**20 for name, size in row.items()} for tokens, row in sizes.items()},
        weights=weights,
        weights_mib=weight_bytes / 2**20,
        share={
            tokens: {name: size / max(1, size + weight_bytes) for name, size in row.items()}
            for tokens, row in sizes.items()
        },
        recipes=dict(recipes or {}),
        devices=tuple(devices),
    )


def _layer(caches: Sequence[Cache], index: int) -> LayerMemory:
    tensors = {cache.name: cache.layout.sides(index) for cache in caches}
    sizes = {cache.name: sum(cache.row_bytes(tensor) for tensor in tensors[cache.name]) for cache in caches}
    shown = tensors[caches[-1].name]
    if not shown:
        numbers = dict.fromkeys(("heads", "value_heads", "key_dim", "value_dim"), 0)
        kept: dict[str, None] = dict.fromkeys(("window", "sinks", "features"))
        return LayerMemory(layer=index, bytes_per_token=sizes, dtype="none", **kept, **numbers)
    (key, value), held = shown, caches[-1].layout.tensors
    return LayerMemory(
        layer=index,
        heads=key.heads,
        value_heads=value.heads,
        key_dim=key.dim,
        value_dim=value.dim,
        dtype=key.dtype,
        window=key.window,
        sinks=key.sinks,
        features=next((each.kept for each in held if each.layer == index and each.kind == "state"), None),
        bytes_per_token=sizes,
    )
