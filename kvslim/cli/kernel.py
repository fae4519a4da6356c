"""Checks one step of onnxruntime's fused attention against numpy: does the kernel that artifacts need work here?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper

CACHES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8}
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
    rows, stored = ["batch", "length", HEADS * DIM], CACHES[cache]
    inputs = [
        *(_info(name, TensorProto.FLOAT, rows) for name in ("query", "key", "value")),
        *(_info(f"past_{kind}", stored, ["batch", HEADS, "past", DIM]) for kind in ("key", "value")),
        _info("last", TensorProto.INT32, ["batch"]),
        _info("total", TensorProto.INT32, []),
    ]
    outputs = [
        _info("output", TensorProto.FLOAT, rows),
        *(_info(f"present_{kind}", stored, ["batch", HEADS, "present", DIM]) for kind in ("key", "value")),
    ]
    weights = _scales() if cache == "int8" else []
    names = [info.name for info in inputs] + ([""] * 5 + [weight.name for weight in weights] if weights else [])
    attributes: dict[str, Any] = QUANTISED if cache == "int8" else {}
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        [info.name for info in outputs],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
        **attributes,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "kernel", inputs, outputs, weights)
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def _info(name: str, dtype: int, shape: list[Any]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _scales() -> list[TensorProto]:
    steps = np.full((1, HEADS, 1, DIM), SCALE, np.float32)
    return [numpy_helper.from_array(steps, name) for name in ("k_scale", "v_scale")]
