"""Ways to compute with blocks that have a minimum, as those of GGUF's Q4_1 and Q4_K."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.speed.attention_kernel import one_thread, thread_ms
from benchmarks.subjects import Source
from kvslim.contract import ModelSpec
from kvslim.loading.source import read_spec, resolve
from kvslim.validation.latency import in_turns

BLOCK = 32
LAYERS = 16
SPREAD = {4: 6.5, 8: 104.5}  # standard deviation of an integer less a zero point, by bits
WAYS = {
    "none: integer zero points alone": "integer",
    "float zero points": "float",
    "a product in float32, and an addition": "product",
    "a product in 8 bits, and an addition": "small product",
    "two columns of 4 bits in the same product": "columns 2",
    "three columns of 4 bits in the same product": "columns 3",
    "none: 8 bits, blocks of 32": "bytes 32",
    "none: 8 bits, blocks of 16 (Q6_K as it is)": "bytes 16",
}
TABLE = Table(
    (Column("minima", "minima"),), pivot="tokens", each=(Column("ratio", "tokens at a time: {}", ".2f"),), format=","
)


@benchmark("smollm2", table=TABLE, quick={"tokens": (1,), "repeats": 4})
def block_minima(source: Source, *, tokens: tuple[int, ...] = (1, 128), repeats: int = 40) -> Iterator[Values]:
    """The products of a model's layers with 4-bit blocks that have a minimum, against blocks without.

    Sums of the input over each block are part of all ways but the first two. CPU time of one thread, in turns; ratios
    are medians over neighbouring turns.
    """
    spec = read_spec(resolve(source.model))
    width = resolve(source.model).config()["intermediate_size"]
    sessions = {name: one_thread(_Graph(spec, width, way).bytes()) for name, way in WAYS.items()}
    for length in tokens:
        x = np.random.default_rng(0).normal(size=(1, length, spec.hidden_size)).astype(np.float32)
        runs = {name: partial(session.run, None, {"x": x}) for name, session in sessions.items()}
        times = in_turns(list(WAYS), lambda name, runs=runs: _warm_ms(runs[name]), max(8, repeats // length))
        first = next(iter(times.values()))
        for name, row in times.items():
            ratio = np.median((row[1:] + row[:-1]) / (first[1:] + first[:-1]))
            yield {"minima": name, "tokens": length, "ratio": float(ratio)}


def _warm_ms(run: Callable[[], object]) -> float:
    """Time of a run behind another, so that what ran in the turn before has left the processor's caches alike."""
    run()
    return thread_ms(run)


class _Graph:
    """Layers of products, each of what the one before gives."""

    def __init__(self, spec: ModelSpec, width: int, way: str) -> None:
        self.way, self.nodes, self.constants = way, list[Any](), dict[str, Any]()
        self.random = np.random.default_rng(0)
        hidden, attention = spec.hidden_size, spec.q_heads * spec.head_dim
        packed = attention + 2 * spec.kv_heads * spec.head_dim
        value = "x"
        for _ in range(LAYERS):
            value = self._first(self._product(value, hidden, packed), attention)
            value = self._product(value, attention, hidden)
            value = self._first(self._product(value, hidden, 2 * width), width)
            value = self._node("Tanh", [self._product(value, width, hidden)])
        self.result = value

    def bytes(self) -> bytes:
        """The model."""
        shapes = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", self.result)}
        graph = helper.make_graph(
            self.nodes, "products", [shapes["x"]], [shapes[self.result]], list(self.constants.values())
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        found: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        return found

    def _product(self, x: str, inputs: int, outputs: int) -> str:
        kind, _, digits = self.way.partition(" ")
        blocks = -(-inputs // BLOCK)
        if kind == "columns":
            columns = -(-blocks // BLOCK) * BLOCK
            sums = self._node("MatMul", [x, self._block_sums(inputs, columns)])
            x = self._node("Concat", [x, *[sums] * int(digits)], axis=-1)
            return self._quantised(x, inputs + int(digits) * columns, outputs)
        if kind == "bytes":
            return self._quantised(x, inputs, outputs, bits=8, block=int(digits))
        if kind in ("integer", "float"):
            return self._quantised(x, inputs, outputs, floats=kind == "float")
        sums = self._node("MatMul", [x, self._block_sums(inputs, blocks)])
        if self.way == "product":
            size = 1 / np.sqrt(blocks * BLOCK)
            offsets = self._constant(self.random.normal(0, size, (outputs, blocks)).astype(np.float32))
            added = self._node("FusedMatMul", [sums, offsets], domain="com.microsoft", transB=1)
        else:
            added = self._quantised(sums, blocks, outputs, bits=8)
        return self._node("Add", [self._quantised(x, inputs, outputs), added])

    def _quantised(
        self, x: str, inputs: int, outputs: int, *, bits: int = 4, block: int = BLOCK, floats: bool = False
    ) -> str:
        blocks = -(-inputs // block)
        draw = self.random.integers
        codes = self._constant(draw(256, size=(outputs, blocks, block * bits // 8), dtype=np.uint8))
        # Numbers that neither grow nor die out: products of denormal ones take several times as long.
        size = 1 / (SPREAD[bits] * np.sqrt(inputs))
        scales = self._constant(self.random.uniform(0.5 * size, 1.5 * size, (outputs, blocks)).astype(np.float32))
        zeros = (
            self.random.uniform(7, 9, (outputs, blocks)).astype(np.float32)
            if floats
            else draw(256, size=(outputs, -(-blocks * bits // 8)), dtype=np.uint8)
        )
        sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": 4}
        inputs_ = [x, codes, scales, self._constant(zeros)]
        return self._node("MatMulNBits", inputs_, domain="com.microsoft", **sizes)

    def _first(self, x: str, size: int) -> str:
        """The first numbers of each row."""
        bounds = (self._constant(np.array([bound])) for bound in (0, size, 2))
        return self._node("Slice", [x, *bounds])

    def _block_sums(self, inputs: int, columns: int) -> str:
        name = f"sums.{inputs}.{columns}"
        if name not in self.constants:
            summing = np.eye(-(-inputs // BLOCK), columns, dtype=np.float32).repeat(BLOCK, 0)[:inputs]
            self.constants[name] = numpy_helper.from_array(summing, name)
        return name

    def _constant(self, array: np.ndarray) -> str:
        name = f"constant.{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def _node(self, operator: str, inputs: Sequence[str], domain: str = "", **attributes: int) -> str:
        name = f"value.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, domain=domain, **attributes))
        return name
