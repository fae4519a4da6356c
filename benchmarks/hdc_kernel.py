"""One decode step of the attention operator by kind of cache: the time that one step per tensor saves, or bits cost.

    python benchmarks/hdc_kernel.py [--contexts 4096,16384] [--repeats 60]

SmolLM2-135M's attention (9 query heads, 3 kv heads, head size 64), one GroupQueryAttention that appends in place.
Kinds run in turns; CPU time of one thread, which other load on the machine changes little. Ratios are to float32,
medians over neighbouring turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from kvslim.validate.latency import in_turns

HEADS, KV_HEADS, DIM = 9, 3, 64
CACHES = 8  # as many layers, so that the last step's cache has left the processor's
KINDS = {
    "float32": (np.float32, 0, ""),
    "int8, one step per tensor": (np.int8, 8, "PER_TENSOR"),
    "int8, per channel": (np.int8, 8, "PER_CHANNEL"),
    "int4, one step per tensor": (np.uint8, 4, "PER_TENSOR"),
    "int4, per channel": (np.uint8, 4, "PER_CHANNEL"),
}


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="4096,16384")
    parser.add_argument("--repeats", type=int, default=60)
    arguments = parser.parse_args()
    contexts = [int(text) for text in arguments.contexts.split(",")]
    print("| cache |" + "".join(f" ms at {context:,} | ratio |" for context in contexts))
    print("|---|" + "---:|---:|" * len(contexts))
    columns = [timed(context, arguments.repeats) for context in contexts]
    for kind in KINDS:
        print(f"| {kind} |" + "".join(f" {times[kind][0]:.2f} | {times[kind][1]:.2f} |" for times in columns))


def timed(context: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each kind, and its median ratio to float32."""
    steps = {kind: step(kind, context) for kind in KINDS}

    def once(kind: str) -> float:
        start = time.thread_time()
        steps[kind]()
        return (time.thread_time() - start) * 1e3

    times = in_turns(list(KINDS), once, repeats)
    paired = {kind: row[1:] + row[:-1] for kind, row in times.items()}  # neighbouring turns, one in either order
    return {
        kind: (float(np.median(row)), float(np.median(paired[kind] / paired["float32"]))) for kind, row in times.items()
    }


def step(kind: str, context: int) -> Callable[[], None]:
    """A decode step at a context, on one cache after the other."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # whose time is then that of the calling thread
    session = ort.InferenceSession(graph(kind).SerializeToString(), options, providers=["CPUExecutionProvider"])
    bindings = [_binding(session, kind, context) for _ in range(CACHES)]
    turn = iter(range(10**9))
    return lambda: session.run_with_iobinding(bindings[next(turn) % CACHES])


def graph(kind: str) -> onnx.ModelProto:
    """One attention operator with a cache of that kind."""
    dtype, bits, granularity = KINDS[kind]
    cached = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    columns = DIM // 2 if bits == 4 else DIM
    shapes = {
        "query": (TensorProto.FLOAT, [1, 1, HEADS * DIM]),
        "key": (TensorProto.FLOAT, [1, 1, KV_HEADS * DIM]),
        "value": (TensorProto.FLOAT, [1, 1, KV_HEADS * DIM]),
        "past_key": (cached, [1, KV_HEADS, "past", columns]),
        "past_value": (cached, [1, KV_HEADS, "past", columns]),
        "seqlens": (TensorProto.INT32, [1]),
        "total": (TensorProto.INT32, []),
    }
    results = {"output": shapes["query"]}
    results |= {f"present_{side}": (cached, [1, KV_HEADS, "present", columns]) for side in ("key", "value")}
    attributes: dict[str, object] = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    names, scales = list(shapes), []
    if bits:
        attributes |= {"k_quant_type": granularity, "v_quant_type": granularity, "kv_cache_bit_width": bits}
        size = 1 if granularity == "PER_TENSOR" else KV_HEADS * DIM
        scale = np.full(size, 0.03 if bits == 8 else 0.5, np.float32)
        scale = scale if size == 1 else scale.reshape(1, KV_HEADS, 1, DIM)
        scales = [numpy_helper.from_array(scale, name) for name in ("key_scale", "value_scale")]
        names += ["", "", "", "", "", "key_scale", "value_scale"]
    node = helper.make_node("GroupQueryAttention", names, list(results), domain="com.microsoft", **attributes)
    values = [[helper.make_tensor_value_info(name, *of) for name, of in side.items()] for side in (shapes, results)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "step", *values, scales), opset_imports=opsets, ir_version=10)


def _binding(session: ort.InferenceSession, kind: str, context: int) -> ort.IOBinding:
    """Random content for all inputs; past and present are one buffer."""
    random, (dtype, bits, _) = np.random.default_rng(0), KINDS[kind]
    shape = (1, KV_HEADS, context + 1, DIM // 2 if bits == 4 else DIM)
    whole = random.integers(0, 100, shape).astype(dtype) if bits else random.standard_normal(shape, dtype=np.float32)
    binding = session.io_binding()
    for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS)):
        binding.bind_cpu_input(name, random.standard_normal((1, 1, heads * DIM), dtype=np.float32))
    binding.bind_cpu_input("seqlens", np.array([context], np.int32))
    binding.bind_cpu_input("total", np.array(context + 1, np.int32))
    for side in ("key", "value"):
        buffer = ort.OrtValue.ortvalue_from_numpy(whole)
        binding.bind_ortvalue_input(f"past_{side}", buffer)
        binding.bind_ortvalue_output(f"present_{side}", buffer)
    binding.bind_output("output", "cpu")
    return binding


if __name__ == "__main__":
    main()
