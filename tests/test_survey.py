"""What other sizes and other tools' cache types cost on a model, as reports show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import open_prepared, recipe_of

from kvslim.methods.kv_quant import KvQuant
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.types import KVLayout, Plan, PlanPoint, Survey

PLAIN = 2 * 2 * 2 * 16 * 4  # bytes of a token: sides, layers, heads, dimensions, float32


@pytest.fixture(scope="module")
def survey(prepared: PreparedDecoder) -> Survey:
    return prepared.trials().survey()


def test_sizes_are_those_of_all_layers_alike(survey: Survey) -> None:
    assert [(point.cache, point.kv_bytes_per_token) for point in survey.alike] == [
        ("int8", PLAIN / 4),
        ("int4", PLAIN / 8),
        ("int4", PLAIN / 16),  # three quarters of 16 dimensions are rounded down to 8, as one half is
    ]
    assert [point.kv_ratio for point in survey.alike] == [4, 8, 16]
    assert 0 < survey.alike[0].kl < survey.alike[1].kl < survey.alike[-1].kl


def test_price_is_the_divergence_of_the_method(prepared: PreparedDecoder, survey: Survey) -> None:
    assert survey.alike[0].kl == pytest.approx(prepared.trials().divergence(KvQuant(bits=8)), rel=1e-6)


def test_genai_sets_its_steps_by_the_largest_value(prepared: PreparedDecoder, survey: Survey) -> None:
    genai = {point.name: point for point in survey.peers}
    method = KvQuant(bits=4, clip="minmax", centre=False)
    assert genai["genai int4"].kl == pytest.approx(prepared.trials().divergence(method), rel=1e-6)
    assert genai["genai int4"].kv_bytes_per_token == PLAIN / 8
    assert genai["genai int4"].kl > genai["genai int8"].kl > 0


def test_llama_cpp_takes_heads_of_whole_blocks(tiny_model: Callable[[str], Path], survey: Survey) -> None:
    """It stores 32 numbers in 34 bytes, or in 18."""
    assert not any("llama.cpp" in point.name for point in survey.peers)
    prepared = open_prepared(tiny_model("mistral"), recipe_of())
    found = {point.name: point for point in prepared.trials().survey().peers}
    context = prepared.recipe.calibration.target(prepared.spec)
    plain = KVLayout.of(prepared.spec, Plan.identity(prepared.spec)).bytes_per_token(context)
    sizes = {name: found[f"llama.cpp {name}"].kv_bytes_per_token / plain for name in ("q8_0", "q4_0")}
    assert sizes == {"q8_0": pytest.approx(34 / 128), "q4_0": pytest.approx(18 / 128)}
    assert 0 < found["llama.cpp q8_0"].kl < found["llama.cpp q4_0"].kl


def test_planner_has_priced_sizes_already(prepared: PreparedDecoder, survey: Survey) -> None:
    points = (PlanPoint(cache="int8", kv_bytes_per_token=128, kv_ratio=4, time_ratio=0.8, kl=0.1),)
    found = prepared.trials().survey(points)
    assert (found.frontier, found.alike) == (points, ())
    assert found.peers == survey.peers


def test_standard_operators_have_no_integer_cache_to_price(tiny_llama: Path) -> None:
    recipe = recipe_of().model_copy(update={"layout": "attention24"})
    assert open_prepared(tiny_llama, recipe).trials().survey() == Survey()
