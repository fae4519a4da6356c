"""Prompts over an integer cache: attention in float32 where there are many new tokens.

onnxruntime's GroupQueryAttention reads an integer cache about as fast as a float32 one for a few new tokens, but takes
two to five times as long for hundreds. So each such operator becomes one branch of an `If` on their number. The other
branch turns the rows so far, of this layer alone, into float32, attends to them by the same operator over float32, and
writes the new rows into the cache, rounded as the integer operator rounds them. It attends to its new tokens as the
cache holds them too, so that both branches give the same, whatever the pieces that a text comes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from kvslim.transform.storage import numbers_of_bytes, packing

LONGEST_STEP = 16  # new tokens up to which the integer operator is as fast: `benchmarks prompt-attention`
PAST, SEQUENCE_ENDS, TOTAL, ROTARY, SCALES = 3, 5, 6, 7, 12  # places of its inputs
MICROSOFT = "com.microsoft"
INT4_OF_BYTES = np.array(numbers_of_bytes(4), dtype=np.float32) - 8  # each is stored plus 8


def branch_prompts(model: ir.Model, longest_step: int = LONGEST_STEP) -> None:
    """Gives every attention over an integer cache its branch for prompts, except where the operator drops rows itself.

    With a sliding window of the model the operator also moves the rows of its cache, which the branch does not.

    Args:
        model: The graph, which is changed.
        longest_step: New tokens up to which the integer operator is kept.
    """
    graph = model.graph
    found = [
        node
        for node in graph
        if node.op_type == "GroupQueryAttention"
        and "kv_cache_bit_width" in node.attributes
        and not node.attributes.get_int("sliding_window_cache", 0)
    ]
    if not found:
        return
    constants = _Constants(graph)
    many = _Branch("prompts", constants)
    is_prompt = many.op("Greater", many.op("Shape", found[0].inputs[0], start=1, end=2), many.ints(longest_step))
    graph.insert_before(found[0], many.nodes)
    for index, node in enumerate(found):
        name = f"{node.name or index}.prompt"
        outputs = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in node.outputs]
        prompt, step = _PromptBranch(name, constants, node).graph(), _kept(name, constants, node)
        branches = {"then_branch": prompt, "else_branch": step}
        branched = ir.node("If", [is_prompt], attributes=branches, outputs=outputs, name=name)
        graph.insert_before(node, branched)
        for old, new in zip(node.outputs, outputs, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)


class _Constants:
    """Constants that all branches of a graph share."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[object, ir.Value] = {}

    def value(self, array: np.ndarray) -> ir.Value:
        key = array.dtype, array.shape, array.tobytes()
        if key not in self._made:
            tensor, name = ir.tensor(array), f"prompts.constant.{len(self._made)}"
            made = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
            )
            self._graph.register_initializer(made)
            self._made[key] = made
        return self._made[key]


class _Branch:
    """Nodes of a branch, whose names begin alike."""

    def __init__(self, name: str, constants: _Constants) -> None:
        self.name, self.constants = name, constants
        self.nodes: list[ir.Node] = []

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", count: int = 1, **attributes: Any) -> Any:
        """Adds an operator; its output, or its outputs where there are several."""
        name = f"{self.name}.{len(self.nodes)}"
        outputs = [ir.Value(name=f"{name}.{index}") for index in range(count)]
        self.nodes.append(ir.node(kind, inputs, attributes=attributes, domain=domain, outputs=outputs, name=name))
        return outputs[0] if count == 1 else outputs

    def ints(self, *numbers: int) -> ir.Value:
        """[n] int64."""
        return self.constants.value(np.array(numbers, dtype=np.int64))

    def scalar(self, number: int | float) -> ir.Value:
        """An int64, or a float32."""
        return self.constants.value(np.array(number, dtype=np.int64 if isinstance(number, int) else np.float32))

    def closed(self, outputs: Sequence[ir.Value], alike: Sequence[ir.Value]) -> ir.Graph:
        """The branch with its outputs, of the types of those that it stands for."""
        for output, value in zip(outputs, alike, strict=True):
            output.type = value.type
        return ir.Graph([], outputs, nodes=self.nodes, name=self.name)


def _kept(name: str, constants: _Constants, node: ir.Node) -> ir.Graph:
    """The operator as it is."""
    branch = _Branch(f"{name}.step", constants)
    options = {key: attribute.value for key, attribute in node.attributes.items()}
    outputs = branch.op(node.op_type, *node.inputs, domain=node.domain, count=len(node.outputs), **options)
    return branch.closed(outputs, node.outputs)


class _PromptBranch(_Branch):
    """The branch for many new tokens.

    Args:
        name: What its names begin with.
        constants: Those of the graph.
        node: The operator over integers.
    """

    def __init__(self, name: str, constants: _Constants, node: ir.Node) -> None:
        super().__init__(name, constants)
        self.node = node
        options = {key: value.value for key, value in node.attributes.items()}
        self.bits = options.pop("kv_cache_bit_width")
        self.rotates = options.pop("do_rotary", 0)
        self.options = {key: value for key, value in options.items() if not key.endswith("_quant_type")}
        self.q_heads, self.kv_heads = options["num_heads"], options["kv_num_heads"]
        self.caches: list[Any] = list(node.inputs[PAST : PAST + 2])
        self.scales: list[Any] = list(node.inputs[SCALES : SCALES + 2])
        self.is_shared = not self.caches[0].is_graph_input()
        self.dim = self.caches[0].shape[3] * 8 // self.bits

    def graph(self) -> ir.Graph:
        """Its outputs are those of the operator: what is attended to, then the caches."""
        query, key, value = self._states()
        length, total = self.op("Shape", query, start=1, end=2), self._integer(self.node.inputs[TOTAL])
        held = self.op("Sub", total, length)  # of each sequence: the operator takes unequal ones at the start alone
        if self.rotates:
            query, key = self._rotated(query, held, self.q_heads), self._rotated(key, held, self.kv_heads)
        if self.is_shared:  # the source layer has written the new rows
            rows = [self.op("Slice", cache, held, total, self.ints(2)) for cache in self.caches]
        else:
            rows = [self._stored(states, scale) for states, scale in zip((key, value), self.scales, strict=True)]
        new = [self._merged(self._read(stored, scale)) for stored, scale in zip(rows, self.scales, strict=True)]
        past = [
            self._read(self.op("Slice", cache, self.ints(0), held, self.ints(2)), scale)
            for cache, scale in zip(self.caches, self.scales, strict=True)
        ]
        ends, others = self.node.inputs[SEQUENCE_ENDS : TOTAL + 1], self.node.inputs[ROTARY + 2 : SCALES]
        attended, _, _ = self.op(
            self.node.op_type, query, *new, *past, *ends, None, None, *others, domain=MICROSOFT, count=3, **self.options
        )
        if self.is_shared:
            outputs = [attended, *(self.op("Identity", cache) for cache in self.caches)]
        else:
            outputs = [attended, *self._written(rows, held, total)]
        return self.closed(outputs, self.node.outputs)

    def _states(self) -> Sequence[Any]:
        """Query, key and value, [batch, length, heads * dim] each, which may come in one."""
        query, *others = self.node.inputs[:PAST]
        if others[0] is not None:
            return query, *others
        sizes = self.ints(*(heads * self.dim for heads in (self.q_heads, self.kv_heads, self.kv_heads)))
        split: Sequence[Any] = self.op("Split", query, sizes, count=3, axis=2)
        return split

    def _rotated(self, states: ir.Value, start: ir.Value, heads: int) -> ir.Value:
        tables: list[Any] = list(self.node.inputs[ROTARY : ROTARY + 2])
        dim = 2 * tables[0].shape[1]
        partial = {} if dim == self.dim else {"rotary_embedding_dim": dim}
        return self.op("RotaryEmbedding", states, start, *tables, domain=MICROSOFT, num_heads=heads, **partial)

    def _integer(self, number: ir.Value | None) -> ir.Value:
        """[1] int64."""
        return self.op("Reshape", self.op("Cast", number, to=ir.DataType.INT64.value), self.ints(1))

    def _stored(self, states: ir.Value, scale: ir.Value | None) -> ir.Value:
        """[batch, length, kv_heads * dim] as rows of the cache, [batch, kv_heads, length, columns]."""
        heads = self.op("Reshape", states, self.ints(0, 0, self.kv_heads, self.dim))
        steps = self.op("Div", self.op("Transpose", heads, perm=[0, 2, 1, 3]), scale)
        most = 1 << (self.bits - 1)
        numbers = self.op("Clip", self.op("Round", steps), self.scalar(-float(most)), self.scalar(most - 1.0))
        if self.bits == 8:
            return self.op("Cast", numbers, to=ir.DataType.INT8.value)
        packing_matrix = self.constants.value(packing(self.dim, self.bits))
        packed = self.op("Add", self.op("MatMul", numbers, packing_matrix), self.scalar(17.0 * most))
        return self.op("Cast", packed, to=ir.DataType.UINT8.value)

    def _read(self, rows: ir.Value, scale: ir.Value | None) -> ir.Value:
        """Rows of the cache as float32 [batch, kv_heads, rows, dim]."""
        if self.bits == 8:
            return self.op("Mul", self.op("Cast", rows, to=ir.DataType.FLOAT.value), scale)
        pairs = self.op(
            "Gather", self.constants.value(INT4_OF_BYTES), self.op("Cast", rows, to=ir.DataType.INT32.value)
        )
        return self.op("Mul", self.op("Reshape", pairs, self.ints(0, 0, 0, self.dim)), scale)

    def _merged(self, states: ir.Value) -> ir.Value:
        """[batch, kv_heads, length, dim] as [batch, length, kv_heads * dim]."""
        by_token = self.op("Transpose", states, perm=[0, 2, 1, 3])
        return self.op("Reshape", by_token, self.ints(0, 0, self.kv_heads * self.dim))

    def _written(self, rows: Sequence[ir.Value], held: ir.Value, total: ir.Value) -> Sequence[ir.Value]:
        """The caches with the new rows: in place where they have room, else as long as all tokens."""
        grown, in_place = (_Branch(f"{self.name}.{part}", self.constants) for part in ("grown", "in_place"))
        longer = [grown.op("Concat", cache, new, axis=2) for cache, new in zip(self.caches, rows, strict=True)]
        indices = self._indices(rows[0], held, total)
        filled = [in_place.op("ScatterND", cache, indices, new) for cache, new in zip(self.caches, rows, strict=True)]
        branches: dict[str, Any] = {
            "then_branch": grown.closed(longer, self.node.outputs[1:]),
            "else_branch": in_place.closed(filled, self.node.outputs[1:]),
        }
        room = self.op("Shape", self.caches[0], start=2, end=3)
        both: Sequence[ir.Value] = self.op("If", self.op("Less", room, total), count=2, **branches)
        return both

    def _indices(self, rows: ir.Value, held: ir.Value, total: ir.Value) -> ir.Value:
        """[batch, kv_heads, length, 3], where in a cache each new row lies."""
        batch = self.op("Squeeze", self.op("Shape", rows, start=0, end=1))
        parts = [
            (self.op("Range", self.scalar(0), batch, self.scalar(1)), (1, 2, 3)),
            (self.constants.value(np.arange(self.kv_heads)), (0, 2, 3)),
            (self.op("Range", self.op("Squeeze", held), self.op("Squeeze", total), self.scalar(1)), (0, 1, 3)),
        ]
        shape = self.op("Concat", self.op("Shape", rows, start=0, end=3), self.ints(1), axis=0)
        spread = [self.op("Expand", self.op("Unsqueeze", part, self.ints(*axes)), shape) for part, axes in parts]
        return self.op("Concat", *spread, axis=3)
