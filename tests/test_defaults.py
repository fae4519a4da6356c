"""Default lengths fit every model that can be measured; lengths that are set are kept, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny_artifact import SPEC

from kvslim.checks import check_lengths
from kvslim.errors import UnsupportedError, UsageError
from kvslim.recipe import Recipe, load_recipe
from kvslim.transform.recall_trials import chained
from kvslim.validation.bench import Grid
from kvslim.validation.recall import capacity_for, repeated_spans
from kvslim.validation.spans import longest_distance, positions_of


@pytest.mark.parametrize("positions", [49, 50, 64, 100, 255, 256, 512, 700, 1024])
@pytest.mark.parametrize("recipe", ["balanced", "small", "lossless"])
def test_defaults_fit_every_model(recipe: str, positions: int) -> None:
    spec = SPEC.model_copy(update={"max_context": positions})
    fitted = load_recipe(recipe).shortened_to(spec)
    check_lengths(fitted, spec)
    assert fitted.validation.length == fitted.calibration.length == min(512, positions)
    assert max(fitted.timed_prompts(spec)) <= positions
    assert Recipe.model_validate(fitted.model_dump()).shortened_to(spec) == fitted


def test_what_is_set_is_not_shortened() -> None:
    spec = SPEC.model_copy(update={"max_context": 256})
    fitted = load_recipe("lossless", ["validation.length=300", "validation.prompts=[500]"]).shortened_to(spec)
    assert (fitted.validation.length, fitted.validation.prompts) == (300, (500,))
    with pytest.raises(UsageError, match=r"validation.length needs 300 positions, validation.prompts needs 500"):
        check_lengths(fitted, spec)


@pytest.mark.parametrize("positions", [1, 16, 48])
def test_model_without_room_for_a_question_is_refused(positions: int) -> None:
    spec = SPEC.model_copy(update={"max_context": positions})
    with pytest.raises(UnsupportedError, match=f"the model has {positions} positions"):
        check_lengths(load_recipe("lossless").shortened_to(spec), spec)


@pytest.mark.parametrize("distance", [16, 31, 32, 100, 159, 512, 2000])
def test_positions_of_recall_are_those_that_its_questions_take(distance: int) -> None:
    windows = np.random.default_rng(0).integers(1, 200, (4, 64))
    windows[:, 0] = 0  # a token that starts every text
    needed = positions_of(distance)
    assert capacity_for(repeated_spans(windows, count=40, distance=distance)) == needed
    (tokens, _), *_ = chained(repeated_spans(windows, count=12, distance=distance))
    assert len(tokens) <= needed
    assert longest_distance(needed) == distance
    assert longest_distance(needed - 1) < distance


@pytest.mark.parametrize(
    ("positions", "prompts", "contexts"),
    [(4096, (128, 512), (128, 1024)), (1024, (128, 512), (128,)), (512, (128, 512), (128,)), (100, (100,), (99,))],
)
def test_bench_has_default_lengths_that_all_artifacts_take(
    positions: int, prompts: tuple[int, ...], contexts: tuple[int, ...]
) -> None:
    specs = [SPEC.model_copy(update={"max_context": most}) for most in (8192, positions)]
    grid = Grid().fitted(specs)
    assert (grid.prompts, grid.contexts) == (prompts, contexts)
    assert Grid(prompts=(9999,), contexts=(1,)).fitted(specs, 4096).prompts == (9999,)


@pytest.mark.parametrize(
    ("target", "prompts", "contexts"),
    [
        (8192, (128, 512, 8192), (128, 1024, 8191)),
        (4096, (128, 512, 4096), (128, 1024, 4096)),
        (512, (128, 512), (128, 512)),
        (99999, (128, 512, 8192), (128, 1024, 8191)),
    ],
)
def test_bench_ends_with_the_context_that_artifacts_are_for(
    target: int, prompts: tuple[int, ...], contexts: tuple[int, ...]
) -> None:
    grid = Grid().fitted([SPEC.model_copy(update={"max_context": 8192})], target)
    assert (grid.prompts, grid.contexts) == (prompts, contexts)
