"""Weight quantisation in place: products with a constant matrix become MatMulNBits, the embedding GatherBlockQuantized.

One matrix at a time is in memory as float32 beside the model itself, and nothing passes through one protobuf, whose
limit is 2 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir import convenience

from kvslim.export.products import Matrix, bias_of, constant_products, embedding_lookups, factor_of, tensor_of
from kvslim.loading.mapped import in_file, let_go
from kvslim.weights.blocks import SMALLEST_BLOCK, BlockFormat
from kvslim.weights.offsets import GROUP
from kvslim.weights.rows import QuantisedRows

ACCURACY_LEVEL = 4  # activations in int8: the fast path on CPU
DOMAIN = "com.microsoft"


def quantise_weights(model: ir.Model, rows: QuantisedRows) -> None:
    """Stores the model's large constant matrices in blocks.

    A table that is both embedding and output head is stored once. Codes on keys and queries, a few thousand numbers a
    layer, stay float32, and so do tables of learned positions.

    Args:
        model: The graph; edited.
        rows: What the rows of its matrices are stored as.
    """
    model.opset_imports.setdefault(DOMAIN, 1)
    quantiser = _Quantiser(model.graph, rows)
    for node, matrix in constant_products(model.graph).items():
        quantiser.replace_product(node, matrix)
    for node, table in embedding_lookups(model.graph).items():
        if table.shape[1] % SMALLEST_BLOCK == 0:  # else the rows would come back with the filling of their last block
            quantiser.replace_lookup(node, table)
    quantiser.drop_unused()


@dataclass(frozen=True)
class _Stored:
    """Constants of the graph that stand for a matrix; see `weights.blocks.Quantised`.

    Attributes:
        to: Bits and block size.
        sums: Blocks of the input whose sums are inputs as well; 0 where the matrix has no offsets.
    """

    to: BlockFormat
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    sums: int

    @property
    def attributes(self) -> dict[str, int]:
        return {"bits": self.to.bits, "block_size": self.to.block}

    @property
    def times(self) -> int:
        """How often the sums are inputs: once for each digit of an offset."""
        return 8 // self.to.bits

    @property
    def columns(self) -> int:
        """Further columns of the matrix, for one digit of its offsets."""
        return self.sums + -self.sums % GROUP


class _Quantiser:
    """Replaces nodes of a graph, and keeps what it made of each matrix for other nodes that read it."""

    def __init__(self, graph: ir.Graph, rows: QuantisedRows) -> None:
        self.graph, self.rows = graph, rows
        self.stored: dict[Matrix, _Stored] = {}

    def replace_product(self, node: ir.Node, matrix: Matrix) -> None:
        """Puts MatMulNBits in place of a product, and of the addition of its bias; a factor stays as a product."""
        outputs, inputs = matrix.shape
        stored = self._store(matrix)
        bias, last = bias_of(node, outputs)
        x, summed = self._with_sums(node, stored, inputs)
        operands = [x, stored.codes, stored.scales, stored.zero_points, None, bias]
        sizes = {"K": inputs + stored.times * stored.columns, "N": outputs, "accuracy_level": ACCURACY_LEVEL}
        new = [*summed, _node("MatMulNBits", operands, {**stored.attributes, **sizes}, node)]
        if (factor := factor_of(node)) != 1.0:
            constant = self._constant(f"{node.name}.factor", np.array(factor, np.float32))
            new.append(ir.node("Mul", [new[-1].outputs[0], constant], name=f"{node.name}.scaled"))
        self._replace([node] if last is node else [node, last], new)

    def replace_lookup(self, node: ir.Node, table: Matrix) -> None:
        """Puts GatherBlockQuantized in place of a Gather of the embedding's rows."""
        stored = self._store(table)
        name, (rows, blocks, size) = stored.codes.name, tensor_of(stored.codes).shape.numpy()
        flat = ir.node("Reshape", [stored.codes, self._constant(f"{name}.shape", np.array([rows, blocks * size]))])
        flat.name, flat.outputs[0].name = f"{name}.reshape", f"{name}.rows"
        operands = [flat.outputs[0], node.inputs[1], stored.scales, stored.zero_points]
        axes = {"gather_axis": 0, "quantize_axis": 1}
        made = _node("GatherBlockQuantized", operands, {**stored.attributes, **axes}, node)
        self._replace([node], [flat, made, *self._offset_rows(made, stored, table.shape[1])])

    def _with_sums(self, node: ir.Node, stored: _Stored, inputs: int) -> tuple[ir.Value | None, list[ir.Node]]:
        """The input of a product with its sums over blocks behind it, which offsets are multiplied with."""
        x = node.inputs[0]
        if not stored.sums:
            return x, []
        summing = self._constant_once(f"block_sums.{inputs}.{stored.to.block}", _block_sums(stored, inputs))
        sums = ir.node("MatMul", [x, summing], name=f"{node.name}.sums")
        parts = [x, *[sums.outputs[0]] * stored.times]
        both = ir.node("Concat", parts, {"axis": -1}, name=f"{node.name}.input")
        return both.outputs[0], [sums, both]

    def _offset_rows(self, made: ir.Node, stored: _Stored, width: int) -> list[ir.Node]:
        """Adds the offsets of rows that are looked up, which lie behind them, each to the numbers of its block."""
        if not stored.sums:
            return []
        name, each = made.name, _block_sums(stored, width).T
        spreading = self._constant(f"{name}.blocks", np.tile(each, (stored.times, 1)))
        sizes = self._constant(f"{name}.sizes", np.array([width, len(each) * stored.times]))
        split = ir.node("Split", [made.outputs[0], sizes], {"axis": -1}, num_outputs=2, name=f"{name}.split")
        offsets = ir.node("MatMul", [split.outputs[1], spreading], name=f"{name}.offsets")
        added = ir.node("Add", [split.outputs[0], offsets.outputs[0]], name=f"{name}.added")
        return [split, offsets, added]

    def drop_unused(self) -> None:
        """Forgets the float matrices that nothing reads any more."""
        for matrix in self.stored:
            if not matrix.source.uses():
                self.graph.initializers.pop(str(matrix.source.name), None)

    def _store(self, matrix: Matrix) -> _Stored:
        """The constants for a matrix."""
        if matrix not in self.stored:
            found = self.rows.stored(matrix.load())
            let_go()
            result = found.widened()
            name = f"{matrix.source.name}.int{result.bits}"
            self.stored[matrix] = _Stored(
                result.format,
                self._constant(f"{name}.codes", result.codes),
                self._constant(f"{name}.scales", result.scales),
                None if result.zero_points is None else self._constant(f"{name}.zero_points", result.zero_points),
                0 if found.offsets is None else found.scales.shape[1],
            )
        return self.stored[matrix]

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(in_file(array), name=name))
        self.graph.register_initializer(value)
        return value

    def _constant_once(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A constant that several nodes share."""
        known = self.graph.initializers.get(name)
        return self._constant(name, array) if known is None else known

    def _replace(self, old: list[ir.Node], new: list[ir.Node]) -> None:
        convenience.replace_nodes_and_values(self.graph, old[-1], old, new, old[-1].outputs, new[-1].outputs)


def _block_sums(stored: _Stored, inputs: int) -> npt.NDArray[np.float32]:
    """A matrix [inputs, sums filled up] that adds up the numbers of each block."""
    each = np.eye(stored.sums, stored.columns, dtype=np.float32)
    return each.repeat(stored.to.block, 0)[:inputs]


def _node(operator: str, inputs: list[ir.Value | None], attributes: Mapping[str, int], old: ir.Node) -> ir.Node:
    while inputs[-1] is None:
        inputs.pop()
    return ir.node(operator, inputs, attributes, domain=DOMAIN, name=f"{old.name}.quantised")
