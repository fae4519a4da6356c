"""The full cache: keys and values of every token, or of the model's own sliding window, in onnxruntime's operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from kvslim.caches.base import Place
from kvslim.caches.coded import IntegerCache, check_rank, check_widths, width_step
from kvslim.caches.rotation import has_rotation
from kvslim.contract import WINDOW_SLACK, CacheType, Kind, KVTensor, Layout, ModelSpec
from kvslim.errors import UsageError

if TYPE_CHECKING:
    import onnxruntime as ort

    from kvslim.caches.attention.base import CacheAttention
    from kvslim.transform.edits import LayerEdit

STORED: dict[str, CacheType] = {"tensor(float)": "float32", "tensor(int8)": "int8", "tensor(uint8)": "int4"}


class FullCache(IntegerCache):
    """A row for every token that the layer sees."""

    kind: Literal["full"] = "full"

    def check(self, spec: ModelSpec, layer: int, layout: Layout, where: str) -> None:
        """Refuses ranks, residual coordinates, rotations and feedback that the operator cannot take."""
        super().check(spec, layer, layout, where)
        if layout == "attention24" and self.is_integer:
            raise UsageError("layout attention24 has no integer cache", where=where, fix="store float32")
        check_codes(self, spec, layout, where)
        self.check_storage(spec, layer, where)

    def check_storage(self, spec: ModelSpec, layer: int, where: str) -> None:
        """With the model's own window the operator wants wider steps."""
        check_widths(self, spec, layer, width_step(spec.windows[layer], self.dtype), where)

    def tensors(self, spec: ModelSpec, place: Place) -> tuple[KVTensor, ...]:
        """Key and value."""
        key, value = self.widths(spec.head_dim)
        common: dict[str, Any] = {"layer": place.layer, "heads": place.kv_heads, "window": place.window}
        return tuple(
            KVTensor(kind=cast("Kind", kind), dim=dim, dtype=self.dtype, **common)
            for kind, dim in (("key", key), ("value", value))
        )

    def attention(self, edit: LayerEdit) -> CacheAttention:
        """onnxruntime's fused operator, or those of ONNX 24."""
        from kvslim.caches.attention.full import FullAttention

        return FullAttention()

    @classmethod
    def read_tensors(cls, nodes: Sequence[ort.NodeArg], note: Any) -> tuple[KVTensor, ...] | None:
        """[batch, heads, past, dim] with heads and dim fixed; a fixed number of rows is a window's."""
        found = [_read(node) for node in nodes]
        return None if None in found else tuple(tensor for tensor in found if tensor is not None)


def check_codes(cache: IntegerCache, spec: ModelSpec, layout: Layout, where: str) -> None:
    """Refuses ranks, residual coordinates, rotations and feedback that no operator can take.

    Raises:
        UsageError: Naming `where` they were asked for.
    """
    residuals, ranks = cache.residuals, cache.ranks(spec.head_dim)
    given = (rank for rank in (cache.rank, cache.value_rank) if rank is not None)  # 0 would pass for none
    for rank in (*ranks, *given):
        check_rank(rank, spec, None, where)
    if layout == "gqa" and len(set(cache.widths(spec.head_dim))) > 1:
        key, value = cache.widths(spec.head_dim)
        raise UsageError(
            f"layout gqa stores keys and values in one size, not {key} and {value}",
            where=where,
            fix="choose ranks and residual coordinates with one sum, or layout attention24",
        )
    if any(count % 8 or not 0 <= count <= min(ranks) for count in residuals):
        message = f"{max(residuals)} residual coordinates do not fit"
        raise UsageError(message, where=where, fix="use a multiple of 8, at most the rank")
    if any(residuals) and not (cache.rank is not None and cache.is_integer):
        message = "residual coordinates need a rank and an integer cache"
        raise UsageError(message, where=where, fix="give them, or drop residual")
    if any(residuals) and cache.granularity == "per_tensor":
        message = "residual coordinates have steps of their own"
        raise UsageError(message, where=where, fix="use granularity per_channel")
    if cache.feedback and not (cache.rotation is not None and cache.is_integer):
        message = "feedback needs a rotation and an integer cache"
        raise UsageError(message, where=where, fix="give them, or drop feedback")
    check_rotation(cache.rotation, cache.rank, (*residuals, *map(_less, ranks, residuals)), where)


def check_rotation(seed: int | None, rank: int | None, orders: Sequence[int], where: str) -> None:
    """Refuses a rotation without a rank, or of an order that has no Hadamard matrix.

    Raises:
        UsageError: Naming `where` it was asked for.
    """
    if seed is None:
        return
    if rank is None:
        raise UsageError("a rotation needs a rank", where=where, fix="give one, or drop rotation")
    missing = [order for order in orders if not has_rotation(order)]
    if missing:
        fix = "use another rank or another number of residual coordinates, or no rotation"
        raise UsageError(f"there is no Hadamard matrix of order {missing[0]}", where=where, fix=fix)


def _less(rank: int, residual: int) -> int:
    """Residual coordinates are rotated among themselves, and the others among themselves."""
    return rank - residual


def _read(node: ort.NodeArg) -> KVTensor | None:
    """The tensor that a graph input is; None where it is none."""
    parts = node.name.split(".")
    if node.type not in STORED or len(node.shape) != 4 or parts[-1] not in ("key", "value"):
        return None
    _, heads, rows, columns = node.shape
    if not isinstance(heads, int) or not isinstance(columns, int):
        return None
    stored = STORED[node.type]
    return KVTensor(
        layer=int(parts[1]),
        kind=cast("Kind", parts[2]),
        heads=heads,
        dim=columns * 2 if stored == "int4" else columns,
        dtype=stored,
        window=rows - WINDOW_SLACK if isinstance(rows, int) else None,
    )
