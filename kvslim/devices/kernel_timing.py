"""Times the kernels that decode a token: products with weights, attention to a cache, and the operators of a layer.

Each is timed in a graph of its own with onnxruntime, on a thread for each core. The graphs hold more than
a processor's caches, so that numbers come from memory as a model's do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from kvslim import onnx_format as onnx
from kvslim.contract import CacheType, WeightType
from kvslim.devices.timing import best_seconds, session_of

SIDES = 512, 2048  # of small and of large matrices of weights
LARGE: dict[WeightType, int] = {"fp32": 6, "int8": 16, "int4": 28}  # so many, and small ones of as many numbers
Q_HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
CONTEXT = 8192
CACHES: dict[CacheType, int] = {"float32": 6, "int8": 12, "int4": 20}
STORED: dict[CacheType, tuple[int, int, type]] = {  # bits of a number, and what holds one, or two of four bits
    "float32": (32, onnx.FLOAT, np.float32),
    "int8": (8, onnx.INT8, np.int8),
    "int4": (4, onnx.UINT8, np.uint8),
}
LAYERS, SHORT = 60, 16
MICROSOFT = "com.microsoft"
BLOCK = 32
LEAST = 1e-7  # seconds
ACCURACY_LEVEL = 4  # activations in int8, as in our graphs


class Timed(NamedTuple):
    """What was timed.

    Attributes:
        kernel: As `Demand.kernels` names it.
        rate: 1e9 numbers per second; for what a matrix and a layer take however small they are, 1e9 of them.
        source: How it was measured.
    """

    kernel: str
    rate: float
    source: str


def kernel_rates() -> Iterator[Timed]:
    """How fast this machine is at each kernel, as the best of several runs."""
    for kind, large in LARGE.items():
        counts = large * (SIDES[1] // SIDES[0]) ** 2, large
        source = (
            f"onnxruntime, a vector times {counts[0]} and {counts[1]} matrices of {SIDES[0]} and {SIDES[1]} squared"
        )
        small, whole = (
            _seconds(*_products(kind, count, side)) / count for count, side in zip(counts, SIDES, strict=True)
        )
        share = SIDES[0] ** 2 / SIDES[1] ** 2
        fixed = (small - share * whole) / (1 - share)  # of a matrix however small; noise can turn it around
        fixed = min(max(fixed, LEAST), whole / 2)
        yield Timed(f"{kind} product", SIDES[1] ** 2 / (whole - fixed) / 1e9, source)
        yield Timed(f"{kind} matrix", 1e-9 / fixed, source)
    heads = f"{Q_HEADS} query heads and {KV_HEADS} kv heads of {HEAD_DIM}"
    for cache, count in CACHES.items():
        numbers = count * 2 * CONTEXT * Q_HEADS * HEAD_DIM
        source = f"onnxruntime, {heads} over {count} x {CONTEXT} tokens"
        yield Timed(f"{cache} attention", numbers / _seconds(*_attentions(cache, count)) / 1e9, source)
    source = f"onnxruntime, {LAYERS} layers of {HEAD_DIM} numbers at a context of {SHORT}"
    yield Timed("layer", LAYERS / _seconds(*_layers()) / 1e9, source)


def _products(kind: WeightType, count: int, side: int) -> tuple[bytes, dict[str, np.ndarray]]:
    """A vector through one matrix after the other."""
    random, weights, nodes = np.random.default_rng(0), [], []
    for index in range(count):
        into = [f"x{index}", *(f"{part}{index}" for part in ("weights", "scales"))]
        if kind == "fp32":
            matrix = random.standard_normal((side, side), np.float32) / side**0.5
            weights.append(onnx.constant(into[1], onnx.FLOAT, matrix))
            nodes.append(onnx.node("MatMul", into[:2], [f"x{index + 1}"]))
            continue
        bits = int(kind.removeprefix("int"))
        codes = random.integers(0, 256, (side, side // BLOCK, BLOCK * bits // 8), np.uint8)
        scales = np.full((side, side // BLOCK), 2.0**-bits / side**0.5, np.float32)
        weights += [onnx.constant(into[1], onnx.UINT8, codes), onnx.constant(into[2], onnx.FLOAT, scales)]
        nodes.append(_product(into, f"x{index + 1}", side, side, bits))
    ends = [onnx.value(name, onnx.FLOAT, [1, 1, side]) for name in ("x0", f"x{count}")]
    return onnx.model_bytes(nodes, ends[:1], ends[1:], weights), {"x0": np.ones((1, 1, side), np.float32)}


def _product(read: list[str], out: str, inputs: int, outputs: int, bits: int) -> Any:
    """The product of a vector with a matrix in blocks: `read` are the vector, codes and scales."""
    sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
    return onnx.node("MatMulNBits", read, [out], MICROSOFT, **sizes)


def _attentions(cache: CacheType, count: int) -> tuple[bytes, dict[str, np.ndarray]]:
    """One token's attention, layer after layer, each with a cache of its own."""
    bits, dtype, item = STORED[cache]
    columns = HEAD_DIM // 2 if bits == 4 else HEAD_DIM
    shape = [1, KV_HEADS, CONTEXT, columns]
    state, row = ([1, 1, heads * HEAD_DIM] for heads in (Q_HEADS, KV_HEADS))
    inputs = [onnx.value("x0", onnx.FLOAT, state), *(onnx.value(name, onnx.FLOAT, row) for name in ("key", "value"))]
    inputs += [onnx.value("seqlens", onnx.INT32, [1]), onnx.value("total", onnx.INT32, [])]
    outputs, nodes, attributes = [onnx.value(f"x{count}", onnx.FLOAT, state)], [], dict[str, int | str]()
    scales, names = [], list[str]()
    if bits < 32:
        attributes = {"kv_cache_bit_width": bits, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        scale = np.full((1, KV_HEADS, 1, HEAD_DIM), 2.0**-bits, np.float32)
        scales, names = [onnx.constant("scale", onnx.FLOAT, scale)], ["", "", "", "", "", "scale", "scale"]
    feeds: dict[str, Any] = {"seqlens": np.array([CONTEXT - 1], np.int32), "total": np.array(CONTEXT, np.int32)}
    feeds |= {"x0": np.ones(state, np.float32), "key": np.ones(row, np.float32), "value": np.ones(row, np.float32)}
    for index in range(count):
        past, present = ([f"{when}.{side}{index}" for side in ("key", "value")] for when in ("past", "present"))
        inputs += [onnx.value(name, dtype, shape) for name in past]
        outputs += [onnx.value(name, dtype, shape) for name in present]
        read = [f"x{index}", "key", "value", *past, "seqlens", "total", *names]
        sizes = {"num_heads": Q_HEADS, "kv_num_heads": KV_HEADS, **attributes}
        nodes.append(onnx.node("GroupQueryAttention", read, [f"x{index + 1}", *present], MICROSOFT, **sizes))
        feeds |= {name: np.ones(shape, item) for name in past}
    return onnx.model_bytes(nodes, inputs, outputs, scales), feeds


def _layers() -> tuple[bytes, dict[str, np.ndarray]]:
    """Layers so small that they take the time of their operators alone."""
    row = [1, 1, HEAD_DIM]
    inputs = [
        onnx.value("x0", onnx.FLOAT, row),
        onnx.value("seqlens", onnx.INT32, [1]),
        onnx.value("total", onnx.INT32, []),
    ]
    caches = [onnx.value(name, onnx.FLOAT, [1, 1, SHORT, HEAD_DIM]) for name in ("past.key", "past.value")]
    weights = [onnx.constant("norm", onnx.FLOAT, np.ones(HEAD_DIM, np.float32))]
    for outputs in (HEAD_DIM, 2 * HEAD_DIM, 3 * HEAD_DIM):
        codes = np.zeros((outputs, HEAD_DIM // BLOCK, BLOCK // 2), np.uint8)
        scales = np.full((outputs, HEAD_DIM // BLOCK), 0.01, np.float32)
        weights += [
            onnx.constant(f"codes{outputs}", onnx.UINT8, codes),
            onnx.constant(f"scales{outputs}", onnx.FLOAT, scales),
        ]
    nodes = [each for index in range(LAYERS) for each in _layer(index)]
    feeds: dict[str, Any] = {each.name: np.ones([1, 1, SHORT, HEAD_DIM], np.float32) for each in caches}
    feeds |= {
        "x0": np.ones(row, np.float32),
        "seqlens": np.array([SHORT - 1], np.int32),
        "total": np.array(SHORT, np.int32),
    }
    ends = [onnx.value(f"x{LAYERS}", onnx.FLOAT, row)]
    return onnx.model_bytes(nodes, [*inputs, *caches], ends, weights), feeds


def _layer(index: int) -> Iterator[Any]:
    """The operators of one layer: norm, projections, attention, norm, a gated feed-forward part."""

    def names(*parts: str) -> list[str]:
        return [f"{part}.{index}" for part in parts]

    def product(into: str, out: str, outputs: int) -> Any:
        read = [f"{into}.{index}", f"codes{outputs}", f"scales{outputs}"]
        return _product(read, f"{out}.{index}", HEAD_DIM, outputs, 4)

    yield onnx.node("SimplifiedLayerNormalization", [f"x{index}", "norm"], names("normed"))
    yield product("normed", "projected", 3 * HEAD_DIM)
    yield onnx.node("Split", names("projected"), names("query", "key", "value"), axis=2, num_outputs=3)
    read = [*names("query", "key", "value"), "past.key", "past.value", "seqlens", "total"]
    present = names("present.key", "present.value")
    yield onnx.node("GroupQueryAttention", read, [*names("attended"), *present], MICROSOFT, num_heads=1, kv_num_heads=1)
    yield product("attended", "output", HEAD_DIM)
    summed = [*names("normed2"), "", "", *names("sum")]
    yield onnx.node("SkipSimplifiedLayerNormalization", [*names("output"), f"x{index}", "norm"], summed, MICROSOFT)
    yield product("normed2", "wide", 2 * HEAD_DIM)
    yield onnx.node("Split", names("wide"), names("gate", "up"), axis=2, num_outputs=2)
    yield onnx.node("Sigmoid", names("gate"), names("sigmoid"))
    yield onnx.node("Mul", names("gate", "sigmoid"), names("silu"))
    yield onnx.node("Mul", names("silu", "up"), names("gated"))
    yield product("gated", "down", HEAD_DIM)
    yield onnx.node("Add", names("down", "sum"), [f"x{index + 1}"])


def _seconds(model: bytes, feeds: dict[str, np.ndarray]) -> float:
    """Of the fastest of several runs. Present caches are written into the past ones."""
    session = session_of(model)
    bound = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(numbers) for name, numbers in feeds.items()}
    for name, held in values.items():
        bound.bind_ortvalue_input(name, held)
    for output in session.get_outputs():
        past = values.get(output.name.replace("present", "past"))
        if past is None:
            bound.bind_output(output.name, "cpu")
        else:
            bound.bind_ortvalue_output(output.name, past)
    return best_seconds(lambda: session.run_with_iobinding(bound))
