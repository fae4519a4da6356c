"""Checks one step of onnxruntime's fused attention against numpy: does the kernel that artifacts need work here?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from kvslim import onnx_format as onnx

CACHES = {"float32": onnx.FLOAT, "int8": onnx.INT8}
QUANTISED = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
HEADS, DIM, LENGTH = 2, 8, 5
SCALE = np.float32(1 / 32)
Floats = npt.NDArray[np.float32]


def attention_error(cache: str) -> float:
    """Largest error of one decode step that appends to its cache in place.

    Args:
        cache: One of `CACHES`.
    """
    random = np.random.default_rng(0)
    query, key, value = (random.uniform(-1, 1, (HEADS, DIM)).astype(np.float32) for _ in range(3))
    past = random.integers(-32, 32, (2, HEADS, LENGTH, DIM)).astype(np.int8)
    expected = _reference(query, key, value, past * SCALE)
    output = _run(cache, query, key, value, past if cache == "int8" else past * SCALE)
    return float(np.abs(output.reshape(HEADS, DIM) - expected).max())


def _reference(query: Floats, key: Floats, value: Floats, past: Floats) -> Floats:
    """Softmax attention over the cache with its last slot filled; [heads, dim]."""
    keys, values = (
        np.concatenate([side[:, :-1], new[:, None]], 1) for side, new in zip(past, (key, value), strict=True)
    )
    weights = np.exp(np.einsum("hd,htd->ht", query, keys) / np.sqrt(DIM))
    return np.asarray(np.einsum("ht,htd->hd", weights / weights.sum(-1, keepdims=True), values), np.float32)


def _run(cache: str, query: Floats, key: Floats, value: Floats, past: npt.NDArray[Any]) -> Floats:
    session = onnxruntime.InferenceSession(_graph(cache), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in {"query": query, "key": key, "value": value}.items():
        binding.bind_cpu_input(name, array.reshape(1, 1, -1))
    binding.bind_cpu_input("last", np.array([LENGTH - 1], np.int32))
    binding.bind_cpu_input("total", np.array(LENGTH, np.int32))
    binding.bind_output("output", "cpu")
    for kind, side in zip(("key", "value"), past, strict=True):
        buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(side[None]))
        binding.bind_ortvalue_input(f"past_{kind}", buffer)
        binding.bind_ortvalue_output(f"present_{kind}", buffer)
    session.run_with_iobinding(binding)
    return np.asarray(binding.copy_outputs_to_cpu()[0])


def _graph(cache: str) -> bytes:
    stored = CACHES[cache]
    rows = ("batch", "length", HEADS * DIM)
    inputs = [
        *(onnx.value(name, onnx.FLOAT, rows) for name in ("query", "key", "value")),
        *(_cache(f"past_{kind}", stored, "past") for kind in ("key", "value")),
        onnx.value("last", onnx.INT32, ["batch"]),
        onnx.value("total", onnx.INT32, []),
    ]
    outputs = [
        onnx.value("output", onnx.FLOAT, rows),
        *(_cache(f"present_{kind}", stored, "present") for kind in ("key", "value")),
    ]
    weights = _scales() if cache == "int8" else []
    names = [given.name for given in inputs] + ([""] * 5 + [weight.name for weight in weights] if weights else [])
    attributes: dict[str, Any] = QUANTISED if cache == "int8" else {}
    node = onnx.node(
        "GroupQueryAttention",
        names,
        [output.name for output in outputs],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
        **attributes,
    )
    return onnx.model_bytes([node], inputs, outputs, weights)


def _cache(name: str, stored: int, length: str) -> Any:
    return onnx.value(name, stored, ("batch", HEADS, length, DIM))


def _scales() -> list[Any]:
    steps = np.full((1, HEADS, 1, DIM), SCALE, np.float32)
    return [onnx.constant(name, onnx.FLOAT, steps) for name in ("k_scale", "v_scale")]
