"""Which matrices of a model are stored in blocks, and in how many bits.

With `mixed` the rule is llama.cpp's (`use_more_bits` in llama-quant.cpp), as onnxruntime-genai's builder has it: the
output head, and in the first and last eighth of the layers and in every third between them, the projection that makes
the values and the one that ends the MLP. Queries and keys go with the values, since the graph packs the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvslim.loading.architecture import Architecture
from kvslim.weight_format import WeightFormat
from kvslim.weights.blocks import SMALLEST_BLOCK, BlockFormat

BLOCKS = {4: 32, 8: 128}  # by bits; 8 bits lose nothing to speak of by larger blocks, and are read faster
SMALLEST_MATRIX = 2048  # numbers; a code on keys or queries is smaller, or has a head axis


@dataclass(frozen=True, eq=False)
class Chosen:
    """A module whose matrix [outputs, inputs] is stored in a format."""

    module: Any
    to: BlockFormat


def chosen_matrices(
    model: Any, layers: Sequence[nn.Module], architecture: Architecture, weights: WeightFormat
) -> dict[str, Chosen]:
    """The linear modules and the embedding table, by name; a table that is also the head counts as the head."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    sensitive = {head, *_sensitive(layers, architecture)} if weights.mixed else set()
    found = {}
    for name, module in model.named_modules():
        is_table = module is table and not module.weight.shape[1] % SMALLEST_BLOCK and not _same_weight(table, head)
        if is_table or (isinstance(module, nn.Linear) and module.weight.numel() >= SMALLEST_MATRIX):
            bits = 8 if weights.type == "int8" or module in sensitive else 4
            to = BlockFormat(bits, weights.block or BLOCKS[bits])
            found[name] = Chosen(module, to.of_width(module.weight.shape[1]))
    return found


def _same_weight(table: Any, head: Any) -> bool:
    return head is not None and table.weight is head.weight


def _sensitive(layers: Sequence[nn.Module], architecture: Architecture) -> set[nn.Module]:
    sides = [f"{architecture.attention}.{side}" for side in (architecture.query, architecture.key, architecture.value)]
    return {
        layer.get_submodule(name)
        for index, layer in enumerate(layers)
        if _takes_more_bits(index, len(layers))
        for name in (*sides, architecture.down)
    }


def _takes_more_bits(layer: int, layers: int) -> bool:
    return layer < layers / 8 or layer >= 7 * layers / 8 or (layer - round(layers / 8)) % 3 == 2
