"""Prompts over an integer cache: attention in float32 where there are many new tokens.

onnxruntime's GroupQueryAttention reads an integer cache about as fast as a float32 one for a few new tokens, but takes
two to five times as long for hundreds. So each such operator becomes one branch of an `If` on their number. The other
branch turns the rows so far, of this layer alone, into float32, attends to them by the same operator over float32, and
writes the new rows into the cache, rounded as the integer operator rounds them. It attends to its new tokens as the
cache holds them too, so that both branches give the same, whatever the pieces that a text comes in. With a sliding
window of the model it drops the rows that the operator drops. Of a ring both read a copy of its rows, and the graph
writes the new ones.

Coordinates that the cache holds twice, rounded and what that leaves, are added up for the float32 operator, whose
heads are smaller then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from kvslim.contract import WINDOW_SLACK
from kvslim.export.subgraphs import Constants, Nodes, Subgraph
from kvslim.transform.operators import RESIDUALS
from kvslim.transform.storage import packing

LONGEST_STEP = 16  # new tokens up to which the integer operator is as fast: `benchmarks prompt-attention`
PAST, SEQUENCE_ENDS, TOTAL, ROTARY, MASK, SCALES = 3, 5, 6, 7, 10, 12  # places of its inputs
MICROSOFT = "com.microsoft"


def branch_prompts(model: ir.Model, longest_step: int = LONGEST_STEP) -> None:
    """Gives every attention over an integer cache its branch for prompts.

    Where the operator drops rows, the branch is for one sequence: those of a batch may differ in length.

    Args:
        model: The graph, which is changed.
        longest_step: New tokens up to which the integer operator is kept.
    """
    graph = model.graph
    found = [
        node for node in graph if node.op_type == "GroupQueryAttention" and "kv_cache_bit_width" in node.attributes
    ]
    if not found:
        return
    shared = Constants("prompts.constant")
    many = Nodes("prompts", shared)
    query = found[0].inputs[0]
    is_prompt = many.op("Greater", many.op("Shape", query, start=1, end=2), many.ints(longest_step))
    is_window_prompt = None
    if any(_has_window(node) for node in found):
        is_alone = many.op("Equal", many.op("Shape", query, start=0, end=1), many.ints(1))
        is_window_prompt = many.op("And", is_prompt, is_alone)
    graph.insert_before(found[0], many.nodes)
    for index, node in enumerate(found):
        name = f"{node.name or index}.prompt"
        residuals = node.attributes.pop(RESIDUALS, None)
        adding = [] if residuals is None else _adding(node)
        replaced = [[node, *adding][-1].outputs[0], *node.outputs[1:]]
        outputs = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in replaced]
        prompt = _WindowBranch if _has_window(node) else _RingBranch if _has_mask(node) else _PromptBranch
        attributes = {
            "then_branch": prompt(name, shared, node, (0, 0) if residuals is None else residuals.as_ints()).graph(),
            "else_branch": _kept(name, shared, node, adding),
        }
        condition = is_window_prompt if _has_window(node) else is_prompt
        branched = ir.node("If", [condition], attributes=attributes, outputs=outputs, name=name)
        graph.insert_before(node, branched)
        for old, new in zip(replaced, outputs, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove([node, *adding], safe=True)
    for value in shared.made:
        graph.register_initializer(value)


def _has_window(node: ir.Node) -> bool:
    """Whether an attention keeps a window of the model in its cache, and drops the rows that leave it."""
    return bool(node.attributes.get_int("sliding_window_cache", 0))


def _has_mask(node: ir.Node) -> bool:
    """Whether an attention reads a mask, as over the rows of a ring."""
    return len(node.inputs) > MASK and node.inputs[MASK] is not None


def _adding(node: ir.Node) -> list[ir.Node]:
    """What adds up the coordinates of values that an attention gives twice: its heads apart, and a product of each."""
    (apart,) = node.outputs[0].consumers()
    (product,) = apart.outputs[0].consumers()
    return [apart, product]


def _kept(name: str, shared: Constants, node: ir.Node, adding: Sequence[ir.Node]) -> ir.Graph:
    """The operator as it is, and what adds up what it gives."""
    branch = Subgraph(f"{name}.step", shared)
    options = {key: attribute.value for key, attribute in node.attributes.items()}
    attended, *caches = branch.op(node.op_type, *node.inputs, domain=node.domain, count=len(node.outputs), **options)
    if adding:
        by_head = branch.op("Reshape", attended, branch.ints(0, 0, options["num_heads"], -1))
        attended = branch.op("MatMul", by_head, adding[1].inputs[1])
    return branch.closed([attended, *caches], node.outputs)


class _PromptBranch(Subgraph):
    """The branch for many new tokens.

    Args:
        name: What its names begin with.
        shared: Constants of the graph.
        node: The operator over integers.
        residuals: Last coordinates of keys and of values that hold what rounding leaves of the first ones.
    """

    def __init__(self, name: str, shared: Constants, node: ir.Node, residuals: Sequence[int]) -> None:
        super().__init__(name, shared)
        self.node = node
        options = {key: value.value for key, value in node.attributes.items()}
        self.bits = options.pop("kv_cache_bit_width")
        self.rotates = options.pop("do_rotary", 0)
        options.pop("sliding_window_cache", None)
        self.options = {key: value for key, value in options.items() if not key.endswith("_quant_type")}
        self.q_heads, self.kv_heads = options["num_heads"], options["kv_num_heads"]
        self.caches: list[Any] = list(node.inputs[PAST : PAST + 2])
        self.scales: list[Any] = list(node.inputs[SCALES : SCALES + 2])
        self.is_shared = self.caches[0].is_graph_output()
        self.dim = self._stored(self.caches[0]).shape[3] * 8 // self.bits
        self.coordinates = _AddedUp(self, residuals) if min(residuals) else _Coordinates(self)

    def graph(self) -> ir.Graph:
        """Its outputs are those of the operator: what is attended to, then the caches."""
        query, key, value = self._states()
        length, total = self.op("Shape", query, start=1, end=2), self._integer(self.node.inputs[TOTAL])
        before = self.op("Sub", total, length)  # of each sequence: the operator takes unequal ones at the start alone
        if self.rotates:
            query, key = self._rotated(query, before, self.q_heads), self._rotated(key, before, self.kv_heads)
        held = self._held(before)
        if self.is_shared:  # the source layer has written the new rows
            rows = [self.op("Slice", cache, before, total, self.ints(2)) for cache in self.caches]
            new = [self.merged(each) for each in self._read(rows)]
        else:
            numbers = [self._numbers(states, scale) for states, scale in zip((key, value), self.scales, strict=True)]
            rows = [self._rows(each) for each in numbers]
            new = [self.coordinates.new(each, side) for side, each in enumerate(numbers)]
        past = [self.op("Slice", cache, self.ints(0), held, self.ints(2)) for cache in self.caches]
        lengths, others = self._lengths(before, held), self.node.inputs[ROTARY + 2 : SCALES]
        inputs = [self.coordinates.query(query), *new, *self._read(past), *lengths, None, None, *others]
        attended, _, _ = self.op(self.node.op_type, *inputs, domain=MICROSOFT, count=3, **self.options)
        attended = self.coordinates.attended(attended)
        if self.is_shared:
            outputs = [attended, *(self.op("Identity", cache) for cache in self.caches)]
        else:
            outputs = [attended, *self._written(past, rows, before, total)]
        return self.closed(outputs, self.node.outputs)

    def _stored(self, cache: Any) -> Any:
        """What the rows that the operator reads are of."""
        return cache

    def _held(self, tokens: ir.Value) -> ir.Value:
        """Rows that the cache has after so many tokens."""
        return tokens

    def _lengths(self, before: ir.Value, held: ir.Value) -> Sequence[Any]:
        """What the operator reads of lengths: of each sequence, and of the longest."""
        return self.node.inputs[SEQUENCE_ENDS : TOTAL + 1]

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

    def _numbers(self, states: ir.Value, scale: ir.Value) -> ir.Value:
        """[batch, length, kv_heads * dim] as the whole numbers that the cache holds, in float32."""
        steps, most = self.op("Round", self.op("Div", states, self.flat(scale))), 1 << (self.bits - 1)
        numbers: ir.Value = self.op("Clip", steps, self.scalar(-float(most)), self.scalar(most - 1.0))
        return numbers

    def flat(self, scale: ir.Value) -> ir.Value:
        """A step for all, or one for each of [kv_heads * dim]."""
        flat: ir.Value = self.op("Reshape", scale, self.ints(-1))
        return flat

    def _rows(self, numbers: ir.Value) -> ir.Value:
        """[batch, length, kv_heads * dim] numbers as rows of the cache, [batch, kv_heads, length, columns]."""
        heads = self.ints(0, 0, self.kv_heads, self.dim)
        if self.bits == 8:
            by_token = self.op("Reshape", self.op("Cast", numbers, to=ir.DataType.INT8.value), heads)
        else:
            packed = self.op("MatMul", self.op("Reshape", numbers, heads), self.constants.value(packing(self.dim, 4)))
            by_token = self.op("Cast", self.op("Add", packed, self.scalar(8.0 * 17)), to=ir.DataType.UINT8.value)
        rows: ir.Value = self.op("Transpose", by_token, perm=[0, 2, 1, 3])
        return rows

    def _read(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """Rows of both caches as the float32 operator takes them."""
        return [self.coordinates.past(self._unpacked(each), side) for side, each in enumerate(rows)]

    def _unpacked(self, rows: ir.Value) -> ir.Value:
        """Rows of the cache as whole numbers in float32 [batch, kv_heads, rows, dim]."""
        if self.bits == 8:
            numbers: ir.Value = self.op("Cast", rows, to=ir.DataType.FLOAT.value)
        else:
            numbers = self.op("DequantizeLinear", self._halves(rows), self.scalar(1.0), self.byte(8))
        return numbers

    def _halves(self, rows: ir.Value) -> ir.Value:
        """Both halves of each byte, [batch, kv_heads, rows, dim] uint8; a look-up takes four times as long."""
        low = self.op("BitwiseAnd", rows, self.byte(15))
        high = self.op("BitShift", rows, self.byte(4), direction="RIGHT")
        pairs = self.op("Concat", *(self.op("Unsqueeze", half, self.ints(4)) for half in (low, high)), axis=4)
        halves: ir.Value = self.op("Reshape", pairs, self.ints(0, 0, 0, self.dim))
        return halves

    def merged(self, states: ir.Value) -> ir.Value:
        """[batch, kv_heads, length, columns] as [batch, length, kv_heads * columns]."""
        by_token = self.op("Transpose", states, perm=[0, 2, 1, 3])
        return self.op("Reshape", by_token, self.ints(0, 0, -1))

    def _written(
        self, past: Sequence[ir.Value], rows: Sequence[ir.Value], before: ir.Value, total: ir.Value
    ) -> Sequence[ir.Value]:
        """The caches with the new rows: in place where they have room, else as long as all tokens."""
        grown, in_place = (Subgraph(f"{self.name}.{part}", self.constants) for part in ("grown", "in_place"))
        longer = [grown.op("Concat", cache, new, axis=2) for cache, new in zip(self.caches, rows, strict=True)]
        indices = self._indices(rows[0], before, total)
        filled = [in_place.op("ScatterND", cache, indices, new) for cache, new in zip(self.caches, rows, strict=True)]
        branches: dict[str, Any] = {
            "then_branch": grown.closed(longer, self.node.outputs[1:]),
            "else_branch": in_place.closed(filled, self.node.outputs[1:]),
        }
        room = self.op("Shape", self.caches[0], start=2, end=3)
        both: Sequence[ir.Value] = self.op("If", self.op("Less", room, total), count=2, **branches)
        return both

    def _indices(self, rows: ir.Value, before: ir.Value, total: ir.Value) -> ir.Value:
        """[batch, kv_heads, length, 3], where in a cache each new row lies."""
        batch = self.op("Squeeze", self.op("Shape", rows, start=0, end=1))
        parts = [
            (self.op("Range", self.scalar(0), batch, self.scalar(1)), (1, 2, 3)),
            (self.constants.value(np.arange(self.kv_heads)), (0, 2, 3)),
            (self.op("Range", self.op("Squeeze", before), self.op("Squeeze", total), self.scalar(1)), (0, 1, 3)),
        ]
        shape = self.op("Concat", self.op("Shape", rows, start=0, end=3), self.ints(1), axis=0)
        spread = [self.op("Expand", self.op("Unsqueeze", part, self.ints(*axes)), shape) for part, axes in parts]
        return self.op("Concat", *spread, axis=3)


class _Coordinates:
    """What the float32 operator takes of keys, values and queries: coordinates as the cache holds them.

    Args:
        branch: What takes it.
    """

    def __init__(self, branch: _PromptBranch) -> None:
        self.branch = branch

    def past(self, numbers: ir.Value, side: int) -> ir.Value:
        """Whole numbers [batch, kv_heads, rows, dim] of keys or values as states."""
        states: ir.Value = self.branch.op("Mul", numbers, self.branch.scales[side])
        return states

    def new(self, numbers: ir.Value, side: int) -> ir.Value:
        """The same of new tokens, [batch, length, kv_heads * dim]."""
        states: ir.Value = self.branch.op("Mul", numbers, self.branch.flat(self.branch.scales[side]))
        return states

    def query(self, query: ir.Value) -> ir.Value:
        """Queries, [batch, length, q_heads * dim]."""
        return query

    def attended(self, attended: ir.Value) -> ir.Value:
        """What is attended to, as the operator over integers gives it."""
        return attended


class _AddedUp(_Coordinates):
    """Coordinates that the cache holds twice are added up, so that heads have `less` of them.

    Args:
        branch: What takes it.
        residuals: Last coordinates of keys and of values that hold what rounding leaves of the first ones.
    """

    def __init__(self, branch: _PromptBranch, residuals: Sequence[int]) -> None:
        super().__init__(branch)
        self.doubled = min(residuals)
        self.unadded = residuals[1] - self.doubled
        self.less = branch.dim - self.doubled
        self.sums = [_sums(branch.dim, count, self.doubled) for count in residuals]

    def past(self, numbers: ir.Value, side: int) -> ir.Value:
        """[batch, kv_heads, rows, less]."""
        steps = self.branch.op("Transpose", self.branch.scales[side], perm=[0, 1, 3, 2])
        sums = self.branch.op("Mul", steps, self.branch.constants.value(self.sums[side]))
        states: ir.Value = self.branch.op("MatMul", numbers, sums)
        return states

    def new(self, numbers: ir.Value, side: int) -> ir.Value:
        """[batch, length, kv_heads * less]."""
        by_head = self.branch.op("Transpose", self._apart(numbers, self.branch.kv_heads), perm=[0, 2, 1, 3])
        return self.branch.merged(self.past(by_head, side))

    def query(self, query: ir.Value) -> ir.Value:
        """Without what they hold twice, [batch, length, q_heads * less]."""
        op, ints, heads = self.branch.op, self.branch.ints, self.branch.q_heads
        first = op("Slice", self._apart(query, heads), ints(0), ints(self.less), ints(3))
        states: ir.Value = op("Reshape", first, ints(0, 0, heads * self.less))
        return states

    def attended(self, attended: ir.Value) -> ir.Value:
        """With all that values hold twice added up, [batch, length, q_heads, rank]."""
        op, less = self.branch.op, self.less
        by_head: ir.Value = op("Reshape", attended, self.branch.ints(0, 0, self.branch.q_heads, less))
        if not self.unadded:
            return by_head
        added: ir.Value = op("MatMul", by_head, self.branch.constants.value(_sums(less, self.unadded, self.unadded)))
        return added

    def _apart(self, states: ir.Value, heads: int) -> ir.Value:
        """[batch, length, heads * dim] as [batch, length, heads, dim]."""
        by_head: ir.Value = self.branch.op("Reshape", states, self.branch.ints(0, 0, heads, self.branch.dim))
        return by_head


def _sums(dim: int, count: int, doubled: int) -> np.ndarray:
    """[dim, dim - doubled], adds the last coordinates to those whose rounding they make up for.

    Args:
        dim: Coordinates of a head.
        count: How many of the first are held twice; what rounding leaves of them comes last, in their order.
        doubled: How many of the last to add.
    """
    sums = np.eye(dim, dim - doubled, dtype=np.float32)
    for place in range(doubled):
        sums[dim - doubled + place, count - doubled + place] = 1
    return sums


class _WindowBranch(_PromptBranch):
    """The branch where the cache is a window of the model: its rows are the last ones, from the first row on."""

    def _held(self, tokens: ir.Value) -> ir.Value:
        """The operator drops rows in blocks, when more tokens come than there are rows."""
        block, capacity = WINDOW_SLACK + 1, int(self.caches[0].shape[2])
        over = self.op("Max", self.op("Sub", tokens, self.ints(capacity)), self.ints(0))
        blocks = self.op("Div", self.op("Add", over, self.ints(block - 1)), self.ints(block))
        held: ir.Value = self.op("Sub", tokens, self.op("Mul", blocks, self.ints(block)))
        return held

    def _lengths(self, before: ir.Value, held: ir.Value) -> Sequence[Any]:
        """Without the tokens that are gone."""
        gone = self.op("Cast", self.op("Sub", before, held), to=ir.DataType.INT32.value)
        ends, total = super()._lengths(before, held)
        return self.op("Sub", ends, gone), self.op("Sub", total, self.op("Squeeze", gone))

    def _written(
        self, past: Sequence[ir.Value], rows: Sequence[ir.Value], before: ir.Value, total: ir.Value
    ) -> Sequence[ir.Value]:
        """The last rows of past and new ones, and behind them what lay there."""
        held, end, second = self._held(total), self.ints(np.iinfo(np.int64).max), self.ints(2)
        written = []
        for cache, old, new in zip(self.caches, past, rows, strict=True):
            both = self.op("Concat", old, new, axis=2)
            last = self.op("Slice", both, self.op("Neg", held), end, second)
            written.append(self.op("Concat", last, self.op("Slice", cache, held, end, second), axis=2))
        return written


class _RingBranch(_PromptBranch):
    """The branch over rows of a ring, which the graph writes by itself."""

    def _stored(self, cache: Any) -> Any:
        """The ring that they were taken from."""
        return cache.producer().inputs[0]

    def _written(
        self, past: Sequence[ir.Value], rows: Sequence[ir.Value], before: ir.Value, total: ir.Value
    ) -> Sequence[ir.Value]:
        """The new rows behind those so far."""
        return [self.op("Concat", cache, new, axis=2) for cache, new in zip(self.caches, rows, strict=True)]
