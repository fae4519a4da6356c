"""The operators that could attend to a prompt in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.speed.attention_kernel import binding, graph, one_thread, thread_ms
from benchmarks.subjects import Source
from kvslim.contract import ModelSpec
from kvslim.loading.source import read_spec, resolve
from kvslim.validation.latency import in_turns

MOST_DIFFERENT = 1e-4  # between what two operators give for random content
TABLE = Table(
    (
        Column("context", "context", ",d"),
        Column("new", "new tokens", ",d"),
        Column("GroupQueryAttention", "GroupQueryAttention", ",.0f"),
        Column("Attention", "Attention", ",.0f"),
        Column("MultiHeadAttention", "MultiHeadAttention", ",.0f"),
    )
)


@benchmark("smollm2-shape", table=TABLE, quick={"lengths": ((8, 16),), "repeats": 3})
def prompt_kernels(
    source: Source,
    *,
    lengths: tuple[tuple[int, int], ...] = ((0, 512), (3584, 512), (0, 2048), (0, 4096)),
    repeats: int = 3,
) -> Iterator[Values]:
    """Attention to a context and so many new tokens in float32 by three operators: milliseconds.

    The model's heads on one thread, in turns; medians. Attention is that of ONNX 23. MultiHeadAttention has no groups,
    so keys and values are repeated for the query heads. All three must give the same.
    """
    spec = read_spec(resolve(source.model))
    for context, new in lengths:
        runs = {"GroupQueryAttention": _grouped(spec, context, new)}
        runs |= {kind: _separate(spec, kind, context, new) for kind in ("Attention", "MultiHeadAttention")}
        expected, *others = (run() for run in runs.values())
        for found in others:
            np.testing.assert_allclose(found, expected, atol=MOST_DIFFERENT)
        times = in_turns(list(runs), lambda name, runs=runs: thread_ms(runs[name]), repeats)  # type: ignore[misc]
        yield {"context": context, "new": new, **{name: float(np.median(row)) for name, row in times.items()}}


def _grouped(spec: ModelSpec, context: int, new: int) -> Callable[[], np.ndarray]:
    session = one_thread(graph(spec, "float32").SerializeToString())
    return _run(session, binding(session, spec, "float32", context, new))


def _separate(spec: ModelSpec, kind: str, context: int, new: int) -> Callable[[], np.ndarray]:
    """The same content: what `binding` draws first it draws for this graph as well."""
    session = one_thread(_graph(spec, kind).SerializeToString())
    random, bound = np.random.default_rng(0), session.io_binding()
    cache = random.standard_normal((1, spec.kv_heads, context + new, spec.head_dim), dtype=np.float32)[:, :, :context]
    for name, heads in (("query", spec.q_heads), ("key", spec.kv_heads), ("value", spec.kv_heads)):
        bound.bind_cpu_input(name, random.standard_normal((1, new, heads * spec.head_dim), dtype=np.float32))
    for side in ("key", "value"):
        bound.bind_cpu_input(f"past_{side}", np.ascontiguousarray(cache))
    bound.bind_output("output", "cpu")
    return _run(session, bound)


def _run(session: ort.InferenceSession, bound: ort.IOBinding) -> Callable[[], np.ndarray]:
    def run() -> np.ndarray:
        session.run_with_iobinding(bound)
        attended: np.ndarray = bound.get_outputs()[-1].numpy()  # it is bound last
        return attended

    return run


def _graph(spec: ModelSpec, kind: str) -> onnx.ModelProto:
    """New tokens [1, new, heads * dim] and a cache [1, kv_heads, past, dim], whole in one operator."""
    dim, group = spec.head_dim, spec.q_heads // spec.kv_heads
    constants = {
        "by_query_head": [0, 0, spec.q_heads, dim],
        "by_kv_head": [0, 0, spec.kv_heads, dim],
        "one_group": [0, 0, spec.kv_heads, 1, dim],
        "groups": [1, 1, 1, group, 1],
        "flat": [0, 0, spec.q_heads * dim],
        "repeated_past": [0, spec.q_heads, -1, dim],
        "past_groups": [1, 1, group, 1, 1],
        "two": [2],
    }
    nodes: list[onnx.NodeProto] = []

    def op(name: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        nodes.append(helper.make_node(name, inputs, outputs, **attributes))

    if kind == "Attention":
        for side, shape in (("query", "by_query_head"), ("key", "by_kv_head"), ("value", "by_kv_head")):
            op("Reshape", [side, shape], [f"{side}_heads"])
            op("Transpose", [f"{side}_heads"], [f"{side}_by_head"], perm=[0, 2, 1, 3])
        inputs = ["query_by_head", "key_by_head", "value_by_head", "", "past_key", "past_value"]
        op("Attention", inputs, ["attended", "present_key", "present_value"], is_causal=1)
        op("Transpose", ["attended"], ["by_token"], perm=[0, 2, 1, 3])
        op("Reshape", ["by_token", "flat"], ["output"])
    else:
        for side in ("key", "value"):
            op("Reshape", [side, "one_group"], [f"{side}_group"])
            op("Expand", [f"{side}_group", "groups"], [f"{side}_groups"])
            op("Reshape", [f"{side}_groups", "flat"], [f"{side}_repeated"])
            op("Unsqueeze", [f"past_{side}", "two"], [f"past_{side}_group"])
            op("Expand", [f"past_{side}_group", "past_groups"], [f"past_{side}_groups"])
            op("Reshape", [f"past_{side}_groups", "repeated_past"], [f"past_{side}_repeated"])
        inputs = ["query", "key_repeated", "value_repeated", "", "", ""]
        inputs += ["past_key_repeated", "past_value_repeated"]
        outputs = ["output", "present_key", "present_value"]
        op(kind, inputs, outputs, domain="com.microsoft", num_heads=spec.q_heads, unidirectional=1)
    shapes = {"query": [1, "new", spec.q_heads * dim]}
    shapes |= {side: [1, "new", spec.kv_heads * dim] for side in ("key", "value")}
    shapes |= {f"past_{side}": [1, spec.kv_heads, "past", dim] for side in ("key", "value")}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, shapes["query"])
    read = {name for node in nodes for name in node.input}
    values = [
        numpy_helper.from_array(np.array(constants[name], np.int64), name) for name in sorted(read & set(constants))
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(nodes, "prompt", given, [output], values)
    return helper.make_model(made, opset_imports=opsets, ir_version=10)
