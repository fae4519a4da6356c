"""Recipes: types, overrides, the shipped ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_artifact import SPEC

from kvslim.errors import KvslimError, NotFoundError, UsageError
from kvslim.methods import KvPca, KvQuant
from kvslim.recipe import Recipe, load_recipe, parse_recipe, shipped_recipes
from kvslim.settings import Heal
from kvslim.weight_format import WeightFormat


@pytest.mark.parametrize("name", ["lossless", "balanced", "small", "encoder"])
def test_shipped_recipe_survives_a_round_trip(name: str) -> None:
    assert set(shipped_recipes()) == {"lossless", "balanced", "small", "encoder"}
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert parse_recipe(recipe.model_dump(mode="json"), "test") == recipe


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "'1e-3'"])
def test_number_is_read_when_yaml_takes_it_for_a_string(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"gates: {{max_kl: {text}}}")
    assert load_recipe(str(path)).gates.max_kl == 1e-3


def test_overrides_reach_every_depth() -> None:
    recipe = load_recipe(
        "lossless",
        ["weights=int4", "calibration.samples=7", "methods.kv_quant.granularity=per_tensor", "gates.max_kl=null"],
    )
    assert recipe.weights == WeightFormat(type="int4")
    assert recipe.calibration.samples == 7
    assert recipe.gates.max_kl is None
    assert KvQuant(granularity="per_tensor") in recipe.methods


def test_override_goes_on_from_a_time_or_a_number_of_steps() -> None:
    found = load_recipe("balanced", ["heal=90s", "heal.rate=2e-3"]).heal
    assert found == Heal(minutes=1.5, rate=2e-3)
    assert load_recipe("balanced", ["heal=20", "heal.samples=9"]).heal == Heal(steps=20, samples=9)
    assert load_recipe("balanced", ["heal.steps=20"]).heal == Heal(steps=20)
    for wrong in (["heal=10x", "heal.rate=1"], ["heal=1.5"], ["heal=true"], ["heal.rate=1"]):
        with pytest.raises(UsageError, match="heal"):
            load_recipe("balanced", wrong)


def test_override_of_a_method_without_options_adds_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("methods: [kv_quant, {kv_pca: {rank: 8}}]")
    recipe = load_recipe(str(path), ["methods.kv_quant.granularity=per_tensor", "methods.kv_pca.rank=16"])
    assert recipe.methods == (KvQuant(granularity="per_tensor"), KvPca(rank=16))


@pytest.mark.parametrize("override", ["weights", "=1", "a..b=1", "methods.kv_pca=1", "methods.nope.x=1"])
def test_override_is_refused_when_it_leads_nowhere(override: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe("balanced", [override])
    assert error.value.where == f"--set {override}"


@pytest.mark.parametrize(
    ("name", "override", "description"),
    [
        ("small", "budget.kv_ratio=200", "Chosen by the planner: a cache 200 times smaller than plain fp32."),
        (
            "balanced",
            "budget.max_kl=1",
            "Chosen by the planner: a mean KL of at most 1, at most 1 points of recall lost.",
        ),
        ("lossless", "methods.kv_quant.bits=4", "By kv_quant."),
        ("encoder", "weights=int4", "Weights in int4 (k_quant), and no other change."),
        ("lossless", "weights=int4", None),
        ("small", "gates.max_kl=1", None),
        ("small", "description=mine", "mine"),
    ],
)
def test_description_is_not_that_of_something_else(name: str, override: str, description: str | None) -> None:
    assert load_recipe(name, [override]).description == (description or load_recipe(name).description)


def test_every_fault_is_named_when_there_are_several() -> None:
    with pytest.raises(UsageError) as error:
        parse_recipe({"name": "x", "weight": "int4", "calibration": {"samples": 0}}, "mine.yaml")
    assert "weight:" in error.value.message
    assert "calibration.samples:" in error.value.message
    assert error.value.where == "mine.yaml"


def test_unknown_recipe_suggests_the_closest() -> None:
    with pytest.raises(NotFoundError) as error:
        load_recipe("lossles")
    assert "'lossless'" in error.value.fix


@pytest.mark.parametrize(
    ("most", "settings", "expected"),
    [
        (8192, {}, (128, 1024, 4096)),
        (2048, {}, (128, 1024, 2047)),
        (512, {}, (128, 511)),
        (8192, {"calibration": {"context": 8192}}, (128, 1024, 8191)),
        (8192, {"validation": {"contexts": [300, 64]}}, (300, 64)),
        (8192, {"validation": {"contexts": [300, 8192]}}, (300, 8191)),
    ],
)
def test_tokens_are_timed_up_to_the_target_context(most: int, settings: dict, expected: tuple[int, ...]) -> None:
    spec = SPEC.model_copy(update={"max_context": most})
    assert Recipe.model_validate({"name": "test", **settings}).timed_contexts(spec) == expected


@pytest.mark.parametrize(
    ("most", "settings", "expected"),
    [
        (8192, {}, (128, 512, 4096)),
        (512, {}, (128, 512)),
        (100, {}, (100,)),
        (8192, {"calibration": {"context": 8192}}, (128, 512, 8192)),
        (8192, {"validation": {"prompts": [300, 64]}}, (300, 64)),
    ],
)
def test_prompts_are_timed_up_to_the_target_context(most: int, settings: dict, expected: tuple[int, ...]) -> None:
    spec = SPEC.model_copy(update={"max_context": most})
    recipe = Recipe.model_validate({"name": "test", **settings})
    assert recipe.timed_prompts(spec) == expected
    encoder = spec.model_copy(update={"task": "embedding"})
    if not settings:
        assert recipe.timed_prompts(encoder) == (expected if most < 512 else (128, 512))


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe(name="x").weights = "int4"  # type: ignore[misc]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", ".inf"])
def test_gate_is_refused_when_not_finite(value: object) -> None:
    with pytest.raises(KvslimError):
        parse_recipe({"name": "x", "gates": {"max_kl": value}}, "test")


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ("prune_heads: {heads: {99: [0]}}", "prune_heads.heads"),
        ("prune_layers: {layers: {99: mlp}}", "prune_layers.layers"),
        ("prune_mlp: {widths: {99: 32}}", "prune_mlp.widths"),
        ("cluster_heads: {clusters: {99: 1}}", "cluster_heads.clusters"),
        ("cluster_heads: {layers: [99]}", "cluster_heads.layers"),
        ("kv_window: {layers: [99]}", "kv_window.layers"),
        ("linear_attention: {layers: [99]}", "linear_attention.layers"),
        ("share_kv: {sources: {99: 0}}", "share_kv.sources"),
    ],
)
def test_layer_beyond_the_last_is_refused_alike_by_all_methods(tmp_path: Path, options: str, where: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"methods: [{options}]")
    (method,) = load_recipe(str(path)).methods
    with pytest.raises(UsageError) as caught:
        method.check(SPEC)
    assert caught.value.message == f"the model has {SPEC.layers} layers, not a layer 99"
    assert (caught.value.where, caught.value.fix) == (f"recipe: methods.{where}", f"use 0 to {SPEC.layers - 1}")
