"""Clusters of heads that a session forms for each prompt, from the attention of its first tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvslim.transform.clustering import Formed
from kvslim.types import CLUSTER_INPUTS, FIRST_TOKENS

Array = npt.NDArray[np.float32]


class PromptClusters:
    """Which heads of which layers attend; until clusters are formed all do.

    Attributes:
        heads: Query heads of each layer that forms clusters.
        is_formed: Whether it has.

    Args:
        formed: How each of these layers forms them; with none there is nothing to form.
    """

    def __init__(self, formed: Mapping[int, Formed]) -> None:
        self._formed = formed
        self.heads = {layer: len(how.calibrated) for layer, how in formed.items()}
        self.reset()

    def reset(self) -> None:
        """Forgets the prompt."""
        self.is_formed = not self.heads
        self._clusters = {layer: tuple(range(heads)) for layer, heads in self.heads.items()}
        self._seen = {layer: np.zeros((heads, FIRST_TOKENS, FIRST_TOKENS)) for layer, heads in self.heads.items()}

    def see(self, layer: int, start: int, weights: Array) -> None:
        """Takes the weights [heads, queries, rows] of the queries from token `start` on, all of the first tokens."""
        seen = weights[:, :, :FIRST_TOKENS]
        self._seen[layer][:, start : start + seen.shape[1], : seen.shape[2]] = seen

    def form(self, values: Mapping[int, Array]) -> None:
        """Clusters the heads by what was seen, and by cached values [heads, rows, head_dim] of each layer."""
        self._clusters = {}
        for layer, how in self._formed.items():
            first = np.zeros((self.heads[layer], FIRST_TOKENS, values[layer].shape[2]))
            rows = values[layer][:, :FIRST_TOKENS]
            first[:, : rows.shape[1]] = rows
            self._clusters[layer] = how.clusters(self._seen[layer], first)
        self.is_formed = True

    def representatives(self, layer: int) -> list[int]:
        """The heads of a layer that attend."""
        return sorted(set(self._clusters[layer]))

    def inputs(self) -> dict[str, npt.NDArray[np.int64]]:
        """The graph's inputs for all layers."""
        found: dict[str, npt.NDArray[np.int64]] = {}
        for layer, clusters in self._clusters.items():
            representatives, membership = np.unique(np.array(clusters, np.int64), return_inverse=True)
            parts = representatives, membership.astype(np.int64)
            found |= {name.format(layer): part for name, part in zip(CLUSTER_INPUTS, parts, strict=True)}
        return found
