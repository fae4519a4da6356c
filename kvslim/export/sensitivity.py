"""Which matrices lose most by four bits.

The rule is llama.cpp's (`use_more_bits` in llama-quant.cpp), as onnxruntime-genai's builder has it: the output head,
and in the first and last eighth of the layers and in every third between them, the projection that makes the values
(with queries and keys, where it is packed) and the one that ends the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

ATTENTION = ("GroupQueryAttention", "MultiHeadAttention", "Softmax")  # the last stands for attention over a ring


def sensitive_products(graph: ir.Graph, products: Sequence[ir.Node]) -> set[ir.Node]:
    """The products among `products`, in the graph's order, that deserve more bits."""
    attentions = [node for node in graph if node.op_type in ATTENTION]
    place = {node: index for index, node in enumerate(products)}
    first = [min((place[node] for node in _sources(layer.inputs[:3], place)), default=None) for layer in attentions]
    chosen = set(products[-1:])
    ends = [*first[1:], len(products) - 1]
    for index, (layer, end) in enumerate(zip(attentions, ends, strict=True)):
        if _takes_more_bits(index, len(attentions)):
            value = layer.inputs[2] if len(layer.inputs) > 2 and layer.inputs[2] is not None else layer.inputs[0]
            chosen |= _sources([value], place)
            chosen |= {products[end - 1]} if end else set()
    return chosen


def _takes_more_bits(layer: int, layers: int) -> bool:
    return layer < layers / 8 or layer >= 7 * layers / 8 or (layer - round(layers / 8)) % 3 == 2


def _sources(values: Sequence[ir.Value | None], place: dict[ir.Node, int]) -> set[ir.Node]:
    """The nearest products that these values are made by."""
    found, seen, pending = set(), set(), [value for value in values if value is not None]
    while pending:
        node = pending.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in place:
            found.add(node)
        else:
            pending.extend(value for value in node.inputs if value is not None)
    return found
