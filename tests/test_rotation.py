"""Role hypervectors of the HDC codes: orthogonal, bipolar, the same for a seed."""

from __future__ import annotations

import numpy as np
import pytest

from kvslim.caches.rotation import hadamard, has_rotation, rotation

ORDERS = tuple(range(8, 129, 8))
MISSING = (3, 6, 92, 184)  # not a multiple of 4; 92 has no Paley construction, nor has its double


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 60, *ORDERS])
def test_hadamard_is_orthogonal_and_bipolar(order: int) -> None:
    matrix = hadamard(order)
    np.testing.assert_array_equal(np.abs(matrix), np.ones((order, order)))
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", ORDERS)
def test_roles_have_length_1_and_entries_of_one_size(order: int) -> None:
    roles = rotation(order, seed=3)
    assert has_rotation(order)
    np.testing.assert_allclose(np.abs(roles), order**-0.5)
    np.testing.assert_allclose(roles @ roles.T, np.eye(order), atol=1e-12)


def test_roles_are_those_of_their_seed() -> None:
    np.testing.assert_array_equal(rotation(24, 5), rotation(24, 5))
    assert (rotation(24, 5) != rotation(24, 6)).any()


@pytest.mark.parametrize("order", MISSING)
def test_order_is_refused_when_it_has_no_construction(order: int) -> None:
    assert not has_rotation(order)
    with pytest.raises(ValueError, match="no Hadamard matrix"):
        rotation(order, 0)


def test_has_rotation_knows_all_orders_that_are_built() -> None:
    def built(order: int) -> bool:
        try:
            return rotation(order, 0).shape == (order, order)
        except ValueError:
            return False

    assert [order for order in range(1, 200) if built(order) != has_rotation(order)] == []


def test_each_component_holds_an_equal_share_when_one_coordinate_has_all_the_power() -> None:
    coordinate = np.zeros(40)
    coordinate[7] = 3.0
    np.testing.assert_allclose(np.square(coordinate @ rotation(40, 0)), 9 / 40)
