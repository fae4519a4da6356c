"""How many times smaller a cache is, beside the types that people have: the one place that says so."""

from __future__ import annotations

Q8_0_BITS = 8.5  # of a number: llama.cpp stores 32 of them in one byte each, with a scale of two bytes
# Bytes of the same model's cache, over those of the plain export, which stores float32.
TYPES = {"fp32": 1.0, "fp16": 16 / 32, "q8_0": Q8_0_BITS / 32}


def smaller_than(size: float | None, plain: float | None) -> dict[str, float] | None:
    """How many times smaller a cache is than the same model's in other types; None where a size is unknown or 0.

    Args:
        size: Bytes of the cache.
        plain: Bytes of the plain export's, in float32.
    """
    if not size or not plain:
        return None
    return {name: share * plain / size for name, share in TYPES.items()}


def smaller(size: float, plain: float) -> str:
    """Such as `5.3x smaller than fp32, 2.7x than fp16, 1.4x than q8_0`; sizes as for `smaller_than`, none of them 0."""
    (first, ratio), *others = ((name, share * plain / size) for name, share in TYPES.items())
    return ", ".join(
        [f"{times(ratio)} smaller than {first}", *(f"{times(other)} than {name}" for name, other in others)]
    )


def times(ratio: float) -> str:
    """A ratio with one digit behind the point, or two digits if it is below 1: `5.3x`, `12.2x`, `4x`, `0.94x`."""
    return f"{round(ratio, 1):g}x" if ratio >= 1 else f"{ratio:.2g}x"


def rounded_down(ratio: float) -> str:
    """A ratio that a cache of this one meets."""
    return f"{int(ratio * 100) / 100:g}"
