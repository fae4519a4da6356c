"""Water-filling against brute force, and what choices cost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.numbers_of_a_model import SPEC, statistics_of

from kvslim.caches.rotation import has_rotation
from kvslim.checks import check_plan
from kvslim.errors import UsageError
from kvslim.planning.allocate import Option, allocate, hull
from kvslim.planning.cost import Choice, Cost, SideCosts, bundled, choices, side_costs
from kvslim.planning.prices import Price
from kvslim.types import LayerPlan, Plan

Layers = list[list[Option]]


def random_layers(seed: int, convex: bool) -> Layers:
    """Four layers of five options; convex ones lose less and less per byte."""
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(4):
        sizes = np.cumsum(rng.integers(1, 9, 5))
        steps = np.sort(rng.random(5))[::-1] if convex else rng.random(5)
        losses = np.cumsum((steps * np.diff(sizes, prepend=0))[::-1])[::-1]
        losses = losses if convex else rng.permutation(losses)
        layers.append(
            [
                Option(float(size), float(loss), name)
                for name, (size, loss) in enumerate(zip(sizes, losses, strict=True))
            ]
        )
    return layers


def size(options: list[Option]) -> float:
    return sum(option.size for option in options)


def loss(options: list[Option]) -> float:
    return sum(option.loss for option in options)


def best(layers: Layers, budget: float) -> float:
    """Least loss of all combinations."""
    return min(loss(list(taken)) for taken in itertools.product(*layers) if size(list(taken)) <= budget)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_within_one_step_of_the_best_and_of_the_budget(seed: int, convex: bool) -> None:
    layers = random_layers(seed, convex)
    least, most = (sum(end(option.size for option in layer) for layer in layers) for end in (min, max))
    # What the hulls leave open is at most the largest step between two neighbours of one of them.
    gap = max(a.loss - b.loss for layer in layers for a, b in itertools.pairwise(hull(layer)))
    for budget in np.linspace(least, most, 9):
        taken = allocate(layers, float(budget))
        assert taken is not None
        assert size(taken) <= budget
        assert all(option in layer for option, layer in zip(taken, layers, strict=True))
        assert best(layers, float(budget)) - 1e-9 <= loss(taken) <= best(layers, float(budget)) + gap + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_the_best_when_the_budget_ends_on_the_hull(seed: int) -> None:
    layers = random_layers(seed, convex=True)
    middle = allocate(layers, sum(layer[2].size for layer in layers))
    assert middle is not None
    hulls = [hull(layer) for layer in layers]
    slopes = sorted(
        ((a.loss - b.loss) / (b.size - a.size), a, b) for options in hulls for a, b in itertools.pairwise(options)
    )[::-1]
    budget = sum(options[0].size for options in hulls)
    for _, small, large in slopes:
        budget += large.size - small.size
        taken = allocate(layers, budget)
        assert taken is not None
        assert loss(taken) == pytest.approx(best(layers, budget))


def test_allocation_is_none_when_the_smallest_options_do_not_fit() -> None:
    layers = random_layers(0, convex=True)
    least = sum(min(option.size for option in layer) for layer in layers)
    assert allocate(layers, least - 1e-6) is None
    assert size(allocate(layers, least) or []) == least


def test_hull_drops_what_no_budget_would_take() -> None:
    options = [Option(1, 10, 0), Option(2, 9, 1), Option(3, 2, 2), Option(4, 5, 3), Option(5, 1, 4)]
    assert [option.name for option in hull(options)] == [0, 2, 4]


def test_dropped_and_kept_energy_are_all_of_it() -> None:
    (key, _), *_ = side_costs(SPEC, statistics_of(SPEC))
    whole = key.cost(Choice(0, 0), 8).dropped
    assert whole == pytest.approx(key.values.sum())
    for rank in (4, 8, 16):
        assert key.cost(Choice(rank, 0), 4).dropped + key.values[:, :rank].sum() == pytest.approx(whole)
    assert key.cost(Choice(SPEC.head_dim, 0), 4).dropped == 0


def test_noise_falls_with_bits_and_with_residual_coordinates() -> None:
    for sides in side_costs(SPEC, statistics_of(SPEC)):
        for costs in sides:
            noise = [costs.cost(Choice(16, residual), 4).noise for residual in (0, 8, 16)]
            assert noise[0] > noise[1] > noise[2] > 0
            assert costs.cost(Choice(16, 0), 8).noise < 0.1 * noise[0]


def test_noise_is_that_of_a_spread_when_coordinates_are_alike() -> None:
    costs = SideCosts(np.full((2, 8), 3.0), 0.5)
    assert costs.cost(Choice(8, 0), 4) == Cost(0.0, pytest.approx(0.5 * 2 * 8 * 3.0))


def test_rotation_is_refused_when_either_group_of_coordinates_has_no_rotation() -> None:
    wide = SPEC.model_copy(update={"head_dim": 192, "layers": 1, "windows": (None,)})
    for choice in (Choice(184, 0), Choice(192, 8)):
        with pytest.raises(UsageError, match="there is no Hadamard matrix of order 184"):
            check_plan(Plan(layers=(bundled(LayerPlan(layer=0), choice, None, 4),)), wide)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_choices_are_all_valid_plans_of_their_width(window: int | None, bits: int) -> None:
    wide = SPEC.model_copy(update={"head_dim": 192, "layers": 1, "windows": (window,)})
    found = {width: list(choices(wide, window, width, bits)) for width in range(1, 2 * 192 + 2)}
    assert any(found.values())
    for width, possible in found.items():
        for choice in possible:
            assert choice.rank + choice.residual == width
            assert has_rotation(choice.rank - choice.residual)
            assert has_rotation(choice.residual)
            check_plan(Plan(layers=(bundled(LayerPlan(layer=0), choice, None, bits),)), wide)
    assert {width % (8 if window is None else 16 if bits == 8 else 32) for width, some in found.items() if some} == {0}
    assert max(width for width, some in found.items() if some) == (192 if bits == 8 else 384)


@pytest.mark.parametrize("exponent", [1.0, 1.7, 3.0])
def test_price_rises_with_energy_and_noise(exponent: float) -> None:
    price = Price(energy=2.0, kl=0.1, exponent=exponent, per_noise=0.01)
    prices = [price.of(Cost(dropped, 1.0)) for dropped in np.linspace(0, 8, 50)]
    assert prices[0] == pytest.approx(0.01)
    assert (np.diff(prices) > 0).all()
    assert price.of(Cost(2.0, 0.0)) == pytest.approx(0.4)
    assert price.of(Cost(1.0, 2.0)) > price.of(Cost(1.0, 1.0))
