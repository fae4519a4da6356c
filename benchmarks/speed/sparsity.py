"""What zeros in a matrix save: nothing, where no kernel skips them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.speed.attention_kernel import one_thread, thread_ms
from benchmarks.subjects import Source
from kvslim.loading.source import read_spec, resolve
from kvslim.validation.latency import in_turns
from kvslim.weights.blocks import BlockFormat, quantise

LAYERS = 16  # matrices one after the other, so that the first has left the processor's cache
RATIO = 4  # of MLPs: channels for each hidden number
BLOCK = 32
RANDOM = np.random.default_rng(0)
Weights = Callable[[int, int], np.ndarray]


def dense(outputs: int, inputs: int) -> np.ndarray:
    """A matrix of normal numbers."""
    return RANDOM.standard_normal((outputs, inputs)).astype(np.float32)


def two_of_four(outputs: int, inputs: int) -> np.ndarray:
    """The two largest of four neighbours are kept."""
    matrix = dense(outputs, inputs).reshape(-1, 4)
    np.put_along_axis(matrix, np.argsort(np.abs(matrix), axis=1)[:, :2], 0.0, axis=1)
    return matrix.reshape(outputs, inputs)


def unstructured(outputs: int, inputs: int) -> np.ndarray:
    """The largest half is kept, wherever it stands."""
    matrix = dense(outputs, inputs)
    matrix[np.abs(matrix) < np.median(np.abs(matrix))] = 0.0
    return matrix


def half_the_rows(outputs: int, inputs: int) -> np.ndarray:
    """Half of the channels."""
    return dense(outputs // 2, inputs)


KINDS: dict[str, Weights] = {
    "dense": dense,
    "2:4": two_of_four,
    "half, unstructured": unstructured,
    "half of the channels": half_the_rows,
}
TABLE = Table(
    (Column("weights", "matrix"),),
    pivot="stored",
    each=(Column("ms", "{}: ms", ".2f"), Column("ratio", "to dense", ".2f")),
    format="",
)


@benchmark("smollm2-shape", table=TABLE, quick={"repeats": 4})
def sparsity(source: Source, *, repeats: int = 60) -> Iterator[Values]:
    """Products of one token with matrices of an MLP's size in onnxruntime, by where their zeros are.

    Sixteen matrices one after the other, so that each comes from memory; int4 in blocks of 32, as MatMulNBits reads it.
    Kinds run in turns; CPU time of one thread. Ratios are to the dense matrix, medians over neighbouring turns.
    """
    hidden = read_spec(resolve(source.model)).hidden_size
    for stored in ("fp32", "int4"):
        steps = {
            kind: _step(stored, [make(RATIO * hidden, hidden) for _ in range(LAYERS)]) for kind, make in KINDS.items()
        }
        times = in_turns(list(KINDS), lambda kind, steps=steps: thread_ms(steps[kind]), repeats)
        for kind, row in times.items():
            ratio = float(np.median(row / times["dense"]))
            yield {"weights": kind, "stored": stored, "ms": float(np.median(row)), "ratio": ratio}


def _step(stored: str, matrices: list[np.ndarray]) -> Callable[[], None]:
    """Runs the products of one token with all matrices."""
    session = one_thread(_graph(stored, matrices).SerializeToString())
    token = RANDOM.standard_normal((1, matrices[0].shape[1])).astype(np.float32)
    return lambda: session.run(None, {"x": token})


def _graph(stored: str, matrices: list[np.ndarray]) -> onnx.ModelProto:
    nodes, constants, outputs = [], [], []
    for number, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, [1, rows]))
        if stored == "fp32":
            constants.append(numpy_helper.from_array(np.ascontiguousarray(matrix.T), f"w{number}"))
            nodes.append(helper.make_node("MatMul", ["x", f"w{number}"], [f"y{number}"]))
            continue
        blocks = quantise(matrix, BlockFormat(4, BLOCK), "rtn")
        parts = {"codes": blocks.codes, "scales": blocks.scales}
        constants += [numpy_helper.from_array(part, f"{name}{number}") for name, part in parts.items()]
        attributes = {"K": columns, "N": rows, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        inputs = ["x", f"codes{number}", f"scales{number}"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{number}"], domain="com.microsoft", **attributes))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, matrices[0].shape[1]])
    graph = helper.make_graph(nodes, "products", [x], outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
