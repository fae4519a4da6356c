"""Recipes and plans of any shape: read back as written, refused by name, or consistent."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_artifact import SPEC

from kvslim.caches import ClusteredCache, FullCache, PackedCache, SharedCache, WindowCache
from kvslim.checks import check_plan
from kvslim.contract import BITS, ModelSpec
from kvslim.errors import KvslimError, UsageError
from kvslim.methods import KvHdc, KvPca, KvQuant, KvWindow
from kvslim.recipe import Recipe, parse_recipe
from kvslim.settings import Budget, Calibration, Gates, Validation
from kvslim.types import KVLayout, LayerPlan, Plan
from kvslim.weight_format import WeightFormat

QUICK = settings(max_examples=100, deadline=None, derandomize=True, database=None)
SHARES = st.none() | st.floats(0, 1, exclude_min=True)
COUNTS = st.integers(1, 2**40)

METHODS = st.one_of(
    st.builds(KvQuant, bits=st.sampled_from([8, 4]), granularity=st.sampled_from(["per_channel", "per_tensor"])),
    st.builds(KvPca, rank=st.none() | st.integers(1, 64).map(lambda blocks: 8 * blocks)),
    st.builds(KvHdc, bits=st.sampled_from([8, 4])),
    st.builds(KvWindow, window=COUNTS, sinks=st.integers(0, 64)),
)
CALIBRATIONS = st.builds(
    Calibration, source=st.text(), samples=COUNTS, length=st.integers(8, 2**40), seed=st.integers(0, 2**63)
)
VALIDATIONS = st.builds(
    Validation,
    source=st.text(),
    samples=st.integers(2, 2**40),
    prompts=st.lists(COUNTS, min_size=1).map(tuple),
    contexts=st.lists(COUNTS, min_size=1).map(tuple),
)
GATES = st.builds(Gates, max_kl=st.none() | st.floats(0, 1e300), max_recall_drop=SHARES, max_kv_ratio=SHARES)
BUDGETS = st.builds(Budget, max_kl=st.floats(1e-300, 1e300), max_recall_drop=SHARES)
WEIGHTS = st.one_of(
    st.builds(WeightFormat, type=st.sampled_from(["int8", "int4"]), method=st.sampled_from(["k_quant", "rtn"])),
    st.builds(WeightFormat, type=st.just("int4"), mixed=st.booleans()),
)
COMMON = {
    "name": st.text(),
    "description": st.text(),
    "compensate": st.booleans(),
    "weights": WEIGHTS,
    "layout": st.sampled_from(["gqa", "attention24"]),
    "calibration": CALIBRATIONS,
    "validation": VALIDATIONS,
    "gates": GATES,
}
RECIPES = st.builds(Recipe, methods=st.lists(METHODS, max_size=3).map(tuple), **COMMON) | st.builds(
    Recipe, budget=BUDGETS, **COMMON
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from([*Recipe.model_fields]) | st.text()
NAMES = st.sampled_from(["kv_pca", "kv_quant", "kv_hdc", "kv_window", "prune_heads", "prune_layers"])
ENTRIES = NAMES | JSON | st.dictionaries(NAMES, JSON, min_size=1, max_size=2)
ANY_RECIPES = st.fixed_dictionaries({"name": st.just("any")}, optional={"methods": st.lists(ENTRIES, max_size=2)})

# Mostly what a plan may say, so that many of them are laid out, and some of what none may.
SIZES = st.sampled_from([None, None, None, 16, 16, 8, 0, 4, -8, 24])
COORDINATES = {
    "rank": SIZES,
    "value_rank": st.none() | SIZES,
    "rotation": st.sampled_from([None, None, 0, 3]),
    "granularity": st.sampled_from(["per_channel", "per_tensor"]),
}
ROUNDED = {"stored": st.sampled_from(["float32", "int8", "int4"]), "residual": st.sampled_from([0, 0, 0, 8, 4, -8])}
KEPT = {"window": st.sampled_from([1, 16, 64, 0, -1]), "sinks": st.sampled_from([0, 0, 4, -1])}
HEADS = st.sampled_from([(0, 1), (2, 3), (1, 2, 3), ()]) | st.lists(st.integers(-1, 4), max_size=4).map(tuple)
CLUSTERS = st.sampled_from([(0, 0, 2, 2), (0, 1, 2, 3), (0, 0, 0, 3)]) | HEADS
CACHES = st.one_of(
    st.builds(FullCache, **COORDINATES, **ROUNDED),
    st.builds(WindowCache, **COORDINATES, **ROUNDED, **KEPT),
    st.builds(PackedCache, **COORDINATES, **KEPT, bits=st.sampled_from([3, 2, 1])),
    st.builds(ClusteredCache, clusters=CLUSTERS) | st.builds(ClusteredCache, count=st.integers(-1, 5)),
    st.builds(SharedCache, source=st.sampled_from([0, 0, 0, 1, -1, 2])),
)
LAYERS = st.builds(
    LayerPlan, layer=st.integers(-1, 2), heads=st.one_of(st.none(), st.none(), st.none(), HEADS), cache=CACHES
)
ORDERED = st.tuples(LAYERS, LAYERS).map(
    lambda pair: tuple(layer.model_copy(update={"layer": index}) for index, layer in enumerate(pair))
)
PLANS = st.builds(
    Plan,
    layout=st.sampled_from(["gqa", "gqa", "gqa", "attention24"]),
    window_cache=st.booleans(),
    layers=st.one_of(ORDERED, ORDERED, ORDERED, st.lists(LAYERS, max_size=3).map(tuple)),
)
SPECS = st.sampled_from(
    [SPEC, *(SPEC.model_copy(update=update) for update in ({"windows": (32, None), "head_dim": 32}, {"kv_heads": 4}))]
)


@QUICK
@given(RECIPES)
def test_recipe_is_read_back_as_it_was_written(recipe: Recipe) -> None:
    assert parse_recipe(recipe.model_dump(mode="json"), "test") == recipe


@QUICK
@given(ANY_RECIPES, st.dictionaries(KEYS, JSON, max_size=3))
def test_recipe_of_anything_is_read_or_refused(methods: dict[str, Any], more: dict[str, Any]) -> None:
    recipe = None
    with contextlib.suppress(UsageError):
        recipe = parse_recipe({**more, **methods}, "test")
    if recipe is not None:
        assert parse_recipe(recipe.model_dump(mode="json"), "test") == recipe


@QUICK
@given(PLANS, SPECS)
def test_plan_is_refused_or_gives_a_consistent_layout(plan: Plan, spec: ModelSpec) -> None:
    with contextlib.suppress(KvslimError):
        check_plan(plan, spec)
        layout = KVLayout.of(spec, plan)
        names = [tensor.past for tensor in layout.tensors]
        assert len(set(names)) == len(names) > 0
        for tensor in layout.tensors:
            assert tensor.heads in range(1, spec.kv_heads + 1)
            assert tensor.dim > 0
            assert tensor.columns * (8 if tensor.dtype not in {"float32", "int8"} else BITS[tensor.dtype]) == (
                tensor.dim * BITS[tensor.dtype]
            )
            assert tensor.bytes_per_token * 8 == tensor.heads * tensor.dim * BITS[tensor.dtype]
        sizes = [layout.bytes_at(context) for context in (1, 64, 4096)]
        assert 0 < sizes[0] <= sizes[1] <= sizes[2]


@QUICK
@given(PLANS)
def test_plan_is_read_back_as_it_was_written(plan: Plan) -> None:
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
