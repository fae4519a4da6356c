"""What caches of linear codes have in common: rank, rotation, and how numbers are rounded."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field

from kvslim.caches.base import Cache
from kvslim.contract import BITS, CacheType, Clip, Granularity, ModelSpec, Objective, Stored
from kvslim.errors import UsageError

STEP, WINDOW_STEP = 8, 16  # onnxruntime's kernel reads heads in multiples of this, with a window in those of that


class CodedCache(Cache):
    """A cache of coordinates: keys and values in a basis, maybe fewer of them, maybe rotated."""

    kind: str
    rank: int | None = Field(None, description="cached dimensions per kv head; None keeps head_dim untouched")
    value_rank: int | None = Field(None, description="the same for values, where it differs (layout attention24)")
    objective: Objective = "balanced"
    rotation: int | None = Field(
        None, description="seed of the randomised Hadamard rotation that spreads the coordinates; None: none"
    )
    granularity: Granularity = "per_channel"
    centred: bool = Field(False, description="whether the mean key is taken from all keys before rounding")
    value_centred: bool = Field(False, description="whether the first token's value is taken from all values")

    def ranks(self, head_dim: int) -> tuple[int, int]:
        """Dimensions that are kept of a key, and of a value."""
        rank = self.rank or head_dim
        return rank, self.value_rank or rank

    @property
    def residuals(self) -> tuple[int, int]:
        """Coordinates of a key, and of a value, that are stored twice: rounded, and what rounding left of them."""
        return 0, 0

    def widths(self, head_dim: int) -> tuple[int, int]:
        """Numbers that a head of the cache holds of a token's key, and of its value."""
        (key, value), (more_key, more_value) = self.ranks(head_dim), self.residuals
        return key + more_key, value + more_value

    def describe(self, spec: ModelSpec) -> str:
        """Ranks, of how many dimensions."""
        key, value = self.ranks(spec.head_dim)
        ranks = f"rank {key}" if key == value else f"ranks {key} and {value}"
        residual = ", {} and {} of them with a residual".format(*self.residuals) if any(self.residuals) else ""
        return f"{ranks} of {spec.head_dim}{residual}"

    def with_(self, **update: Any) -> Self:
        """The cache with some fields changed."""
        return self.model_copy(update=update)


class IntegerCache(CodedCache):
    """A cache of coordinates in float32, or in the integers of onnxruntime's kernels."""

    stored: Stored = Field("float32", description="as what a number is stored")
    clip: Clip = "error"
    residual: int = Field(0, description="leading coordinates stored twice: rounded, and what rounding left of them")
    value_residual: int | None = Field(None, description="the same for values, where it differs")
    feedback: bool = Field(
        False, description="whether the first half of the coordinates takes up the rounding error of the last half"
    )

    @property
    def dtype(self) -> CacheType:
        """How its numbers are stored."""
        return self.stored

    @property
    def is_integer(self) -> bool:
        """Whether it rounds."""
        return self.stored != "float32"

    @property
    def residuals(self) -> tuple[int, int]:
        """Coordinates of a key, and of a value, that are stored twice: rounded, and what rounding left of them."""
        return self.residual, self.residual if self.value_residual is None else self.value_residual


def rank_step(window: int | None) -> int:
    """The step of the ranks that a layer with this window can have."""
    return STEP if window is None else WINDOW_STEP


def width_step(window: int | None, stored: CacheType) -> int:
    """The step of the numbers per head that a layer with this window can cache; two of int4 lie in a byte."""
    return rank_step(window) * (2 if window is not None and stored == "int4" else 1)


def check_rank(rank: int, spec: ModelSpec, window: int | None, where: str) -> None:
    """Refuses a rank that the kernel cannot take, or beyond head_dim.

    Raises:
        UsageError: Naming `where` it was asked for.
    """
    step = rank_step(window)
    if rank % step or not step <= rank <= spec.head_dim:
        raise UsageError(
            f"rank {rank} does not fit head_dim {spec.head_dim}" + ("" if window is None else " and a window"),
            where=where,
            fix=f"use a multiple of {step}, at most {spec.head_dim}",
        )


def check_widths(cache: CodedCache, spec: ModelSpec, layer: int, step: int, where: str) -> None:
    """Refuses a cache whose heads are no multiple of what the kernel takes.

    Raises:
        UsageError: Naming `where` it was asked for.
    """
    for width in cache.widths(spec.head_dim):
        if width % step:
            raise UsageError(
                f"{width} numbers per head in {cache.dtype} do not fit the window of layer {layer}",
                where=where,
                fix=f"use a multiple of {step}, or more bits",
            )


def bits_of(cache: Cache) -> int:
    """Bits of most of its numbers."""
    return BITS[cache.dtype]
