"""The attention operator by kind of cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from kvslim.contract import WINDOW_SLACK, ModelSpec
from kvslim.loading.source import read_spec, resolve
from kvslim.validation.latency import in_turns

CACHES = 8  # as many layers, so that the last step's cache has left the processor's
KINDS = {
    "float32": (np.float32, 0, ""),
    "int8, one step per tensor": (np.int8, 8, "PER_TENSOR"),
    "int8, per channel": (np.int8, 8, "PER_CHANNEL"),
    "int4, one step per tensor": (np.uint8, 4, "PER_TENSOR"),
    "int4, per channel": (np.uint8, 4, "PER_CHANNEL"),
}
TABLE = Table(
    (Column("cache", "cache"),),
    pivot="context",
    each=(Column("ms", "ms at {}", ".2f"), Column("ratio", "ratio", ".2f")),
    format=",",
)


@benchmark("smollm2-shape", table=TABLE, quick={"contexts": (64,), "repeats": 4})
def attention_kernel(
    source: Source, *, contexts: tuple[int, ...] = (4096, 16384), repeats: int = 60
) -> Iterator[Values]:
    """One decode step of the attention operator by kind of cache: what bits and steps per channel save or cost.

    One GroupQueryAttention of the model's heads, which appends in place. Kinds run in turns; CPU time of one thread,
    which other load on the machine changes little. Ratios are to float32, medians over neighbouring turns.
    """
    spec = read_spec(resolve(source.model))
    for context in contexts:
        for kind, (milliseconds, ratio) in timed(spec, context, repeats).items():
            yield {"cache": kind, "context": context, "ms": milliseconds, "ratio": ratio}


def timed(spec: ModelSpec, context: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each kind, and its median ratio to float32."""
    steps = {kind: step(spec, kind, context) for kind in KINDS}

    times = in_turns(list(KINDS), lambda kind: thread_ms(steps[kind]), repeats)
    paired = {kind: row[1:] + row[:-1] for kind, row in times.items()}  # neighbouring turns, one in either order
    return {
        kind: (float(np.median(row)), float(np.median(paired[kind] / paired["float32"]))) for kind, row in times.items()
    }


def step(spec: ModelSpec, kind: str, context: int) -> Callable[[], None]:
    """A decode step at a context, on one cache after the other."""
    session = one_thread(graph(spec, kind).SerializeToString())
    bindings = [binding(session, spec, kind, context) for _ in range(CACHES)]
    turn = iter(range(10**9))
    return lambda: session.run_with_iobinding(bindings[next(turn) % CACHES])


def one_thread(model: bytes) -> ort.InferenceSession:
    """A session that runs in the calling thread, whose time is then that of a run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def thread_ms(run: Callable[[], object]) -> float:
    """CPU time of the calling thread in milliseconds."""
    start = time.thread_time()
    run()
    return (time.thread_time() - start) * 1e3


def graph(spec: ModelSpec, kind: str, window: int | None = None) -> onnx.ModelProto:
    """One attention operator with a cache of that kind, of all tokens or of a window of the model."""
    dtype, bits, granularity = KINDS[kind]
    cached = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    columns = spec.head_dim // 2 if bits == 4 else spec.head_dim
    past, present = ("past", "present") if window is None else (window + WINDOW_SLACK,) * 2
    shapes = {
        "query": (TensorProto.FLOAT, [1, "new", spec.q_heads * spec.head_dim]),
        "key": (TensorProto.FLOAT, [1, "new", spec.kv_heads * spec.head_dim]),
        "value": (TensorProto.FLOAT, [1, "new", spec.kv_heads * spec.head_dim]),
        "past_key": (cached, [1, spec.kv_heads, past, columns]),
        "past_value": (cached, [1, spec.kv_heads, past, columns]),
        "seqlens": (TensorProto.INT32, [1]),
        "total": (TensorProto.INT32, []),
    }
    results = {"output": shapes["query"]}
    results |= {f"present_{side}": (cached, [1, spec.kv_heads, present, columns]) for side in ("key", "value")}
    attributes: dict[str, object] = {"num_heads": spec.q_heads, "kv_num_heads": spec.kv_heads}
    if window is not None:
        attributes |= {"local_window_size": window, "sliding_window_cache": 1}
    names, scales = list(shapes), []
    if bits:
        attributes |= {"k_quant_type": granularity, "v_quant_type": granularity, "kv_cache_bit_width": bits}
        size = 1 if granularity == "PER_TENSOR" else spec.kv_heads * spec.head_dim
        scale = np.full(size, 0.03 if bits == 8 else 0.5, np.float32)
        scale = scale if size == 1 else scale.reshape(1, spec.kv_heads, 1, spec.head_dim)
        scales = [numpy_helper.from_array(scale, name) for name in ("key_scale", "value_scale")]
        names += ["", "", "", "", "", "key_scale", "value_scale"]
    node = helper.make_node("GroupQueryAttention", names, list(results), domain="com.microsoft", **attributes)
    values = [[helper.make_tensor_value_info(name, *of) for name, of in side.items()] for side in (shapes, results)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "step", *values, scales), opset_imports=opsets, ir_version=10)


def binding(
    session: ort.InferenceSession, spec: ModelSpec, kind: str, context: int, new: int = 1, window: int | None = None
) -> ort.IOBinding:
    """Random content for all inputs, `new` tokens after a context; past and present are one buffer."""
    random, (dtype, bits, _) = np.random.default_rng(0), KINDS[kind]
    rows = context + new if window is None else window + WINDOW_SLACK
    shape = (1, spec.kv_heads, rows, spec.head_dim // 2 if bits == 4 else spec.head_dim)
    whole = random.integers(0, 100, shape).astype(dtype) if bits else random.standard_normal(shape, dtype=np.float32)
    bound = session.io_binding()
    for name, heads in (("query", spec.q_heads), ("key", spec.kv_heads), ("value", spec.kv_heads)):
        bound.bind_cpu_input(name, random.standard_normal((1, new, heads * spec.head_dim), dtype=np.float32))
    bound.bind_cpu_input("seqlens", np.array([context + new - 1], np.int32))
    bound.bind_cpu_input("total", np.array(context + new, np.int32))
    for side in ("key", "value"):
        buffer = ort.OrtValue.ortvalue_from_numpy(whole.copy())  # it lies in the array's own memory
        bound.bind_ortvalue_input(f"past_{side}", buffer)
        bound.bind_ortvalue_output(f"present_{side}", buffer)
    bound.bind_output("output", "cpu")
    return bound
