"""How many times smaller a cache is, beside the types that people have."""

from __future__ import annotations

import pytest

from kvslim.kv_ratios import smaller, smaller_than, times


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (1536, "4x smaller than fp32, 2x than fp16, 1.1x than q8_0"),
        (1152, "5.3x smaller than fp32, 2.7x than fp16, 1.4x than q8_0"),
        (502.6, "12.2x smaller than fp32, 6.1x than fp16, 3.2x than q8_0"),
        (3072, "2x smaller than fp32, 1x than fp16, 0.53x than q8_0"),
    ],
)
def test_words_give_all_ratios(size: float, words: str) -> None:
    assert smaller(size, 6144) == words


def test_q8_0_takes_34_bytes_for_32_numbers() -> None:
    found = smaller_than(1.0, 32 * 4)
    assert found == {"fp32": 128, "fp16": 64, "q8_0": 34}


def test_unknown_sizes_have_no_ratios() -> None:
    assert smaller_than(None, 4.0) is None
    assert smaller_than(4.0, None) is None


def test_times_has_no_point_for_whole_numbers() -> None:
    assert [times(ratio) for ratio in (4.0, 4.04, 10.67, 128.0, 0.941)] == ["4x", "4x", "10.7x", "128x", "0.94x"]
