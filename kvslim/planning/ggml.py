"""llama.cpp's cache types, evaluated in torch alone to compare with; `gguf` does their arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from kvslim.caches import Cache
from kvslim.caches.attention.base import States, attended
from kvslim.caches.attention.full import FullAttention
from kvslim.caches.rotation import rotation
from kvslim.transform.scoring import Scoring

if TYPE_CHECKING:
    from kvslim.transform.attention import SlimAttention
    from kvslim.transform.edits import LayerEdit


class GgmlCache(Cache):
    """Keys and values in blocks of 32 numbers of a token, each block with a scale of its own.

    The kind has no default name, so it is not registered, and no plan can ask for it.

    Attributes:
        key: ggml's type of keys, such as Q8_0.
        value: Of values.
        rotated: Whether a Hadamard rotation turns both before they are rounded.
    """

    replaces_attention: ClassVar[bool] = True

    key: str
    value: str
    rotated: bool = False

    def attention(self, edit: LayerEdit) -> GgmlAttention:
        """What a layer with this cache computes."""
        return GgmlAttention(self)

    def bytes_of(self, numbers: int) -> float:
        """Bytes of as many numbers of a key, and as many of a value."""
        sizes = (GGML_QUANT_SIZES[GGMLQuantizationType[name]] for name in (self.key, self.value))
        return sum(numbers / block * size for block, size in sizes)


class GgmlAttention(FullAttention):
    """Attention over what such a cache gives back."""

    def __init__(self, cache: GgmlCache) -> None:
        self.kept = cache

    def evaluated(self, slim: SlimAttention, states: States, scoring: Scoring) -> Tensor:
        """Queries stay as they are; llama.cpp itself rounds them too."""
        query, key, value = states
        return attended(query, self._given_back(key, self.kept.key), self._given_back(value, self.kept.value), scoring)

    def _given_back(self, states: Tensor, name: str) -> Tensor:
        dim = states.shape[-1]
        turn = torch.from_numpy(rotation(dim, 0)).to(states.dtype) if self.kept.rotated else torch.eye(dim)
        rows = (states @ turn).transpose(1, 2).flatten(2)  # a token's heads lie side by side
        kind = GGMLQuantizationType[name]
        found = torch.from_numpy(quants.dequantize(quants.quantize(rows.numpy(), kind), kind))
        return found.unflatten(2, (-1, dim)).transpose(1, 2) @ turn.T
