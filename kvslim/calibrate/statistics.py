"""Statistics of keys, queries and attention outputs, as values: what methods may know of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class HeadStatistics:
    """What methods may know of a model's attention outputs; L layers, Q query heads, d head_dim.

    Attributes:
        output_mean: [L, Q, d] mean attention output of each query head.
        fluctuation: [L, Q] variance of what each query head adds to the hidden states, summed over these.
        attention_mean: [L, hidden] mean of what attention adds to the hidden states.
        mlp_mean: [L, hidden] mean of what the feed-forward part adds.
        influence: [L, 3] of attention, feed-forward part and block: 1 - mean cosine of hidden states without and with.
        inner_mean: [L, F] mean of each channel of the feed-forward part, as its last projection reads it.
        inner_square: [L, F] mean of its square.
        inner_added: [L, F] mean square of what it adds to the hidden states, summed over these.
    """

    output_mean: Array
    fluctuation: Array
    attention_mean: Array
    mlp_mean: Array
    influence: Array
    inner_mean: Array
    inner_square: Array
    inner_added: Array


@dataclass(frozen=True)
class CalibrationStatistics(HeadStatistics):
    """What methods may know of a model's cache; L layers, H kv heads, d head_dim.

    Attributes:
        key_moment: [L, H, d, d] covariance of keys after RoPE over the target context, by attention received.
        query_moment: [L, H, d, d] second moment of the group's queries after RoPE, mean over the group.
        output_moment: [L, H, d, d] covariance of attention outputs (weighted sums of values), mean over the group.
        sharing_loss: [L, Q, Q] variance that what head i adds to the hidden states gets as an error when it takes the
            attention of head j; values of different tokens are taken to be uncorrelated.
        output_gram: [L, H, d, d] sum over the group's heads of W_O^T W_O: what an error in a value costs downstream.
        key_samples: [L, H, n, d] keys turned to random positions of the target context.
        value_samples: [L, H, n, d] values of the same tokens.
        received: [L, H, n] attention that those tokens received in their windows.
        positions: [n] the random positions.
        frequencies: [L, rotary_dim / 2] of RoPE, radians per position; 0 in a layer without.
        context: The target context in tokens.
        sink_keys: [L, H, m, d] keys of the first tokens, at their own positions.
        sink_values: [L, H, m, d] values of the first tokens.
        sink_mass: [L, H] mean attention that the first tokens receive.
        windows: [n, length] token ids of the text.
        loss_mask: [n, length] bool, the tokens that count when a model is judged on it.
        age_mass: [L, H, n] mean attention to other tokens by age; bucket b holds the ages 2^b - 1 to 2^(b+1) - 2.
    """

    key_moment: Array
    query_moment: Array
    output_moment: Array
    sharing_loss: Array
    output_gram: Array
    key_samples: Array
    value_samples: Array
    received: Array
    positions: Array
    frequencies: Array
    context: Array
    sink_keys: Array
    sink_values: Array
    sink_mass: Array
    age_mass: Array
    windows: Array
    loss_mask: Array

    def thinned(self, step: int) -> CalibrationStatistics:
        """The same with every `step`-th of the sampled tokens alone."""
        names = ("key_samples", "value_samples", "received")
        some = {name: getattr(self, name)[:, :, ::step] for name in names}
        return replace(self, positions=self.positions[::step], **some)

    def arrays(self) -> dict[str, Array]:
        """The fields by name, as they are stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def digest(self) -> str:
        """SHA-256 of all arrays, by name."""
        return sha256_of(self.arrays())


def sha256_of(arrays: Mapping[str, Array], text: str = "") -> str:
    """SHA-256 of a text and of arrays with their names, in their order."""
    found = hashlib.sha256(text.encode())
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
