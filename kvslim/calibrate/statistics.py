"""Streaming float64 statistics of keys, queries and attention outputs, one pass over the calibration windows.

What a softmax loses by small errors in its scores is half their variance under its own weights (the second-order term
of the KL divergence), so keys count by the attention they receive. Keys and queries are un-rotated to before RoPE;
`rope` then averages their moments over the target context in closed form, so a short calibration serves a long
deployment. The first tokens of a sequence are attention sinks (Xiao et al., "Efficient Streaming Language Models with
Attention Sinks", 2023, section 3.1): they stay where they are however long the context, so their keys are not turned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvslim.calibrate import rope
from kvslim.calibrate.parts import parts_recorded
from kvslim.contract import ModelSpec
from kvslim.load.architecture import Architecture
from kvslim.transform.attention import Observed, SlimAttention
from kvslim.transform.surgery import attention_modules, projection, slim_modules

Array = np.ndarray
SINKS = 4
SAMPLES = 2048
QUERY_BLOCK = 256


@dataclass(frozen=True)
class HeadStatistics:
    """What methods may know of a model's attention outputs; L layers, Q query heads, d head_dim.

    Attributes:
        output_mean: [L, Q, d] mean attention output of each query head.
        fluctuation: [L, Q] variance of what each query head adds to the hidden states, summed over these.
        attention_mean: [L, hidden] mean of what attention adds to the hidden states.
        mlp_mean: [L, hidden] mean of what the feed-forward part adds.
        influence: [L, 3] of attention, feed-forward part and block: 1 - mean cosine of hidden states without and with.
    """

    output_mean: Array
    fluctuation: Array
    attention_mean: Array
    mlp_mean: Array
    influence: Array


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
        counted: [n, length] bool, the tokens that count when a model is judged on it.
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
    counted: Array

    def arrays(self) -> dict[str, Array]:
        """The fields by name, as they are stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class _LayerRecorder:
    """Sums of one layer; memory does not depend on the number of tokens."""

    def __init__(self, spec: ModelSpec, frequencies: Array, picks: Iterable[Array], gram: Array) -> None:
        self.spec, self.frequencies, self.picks, self.gram = spec, frequencies, iter(picks), gram
        self.windows = 0
        self.sums: dict[str, Tensor] = {}
        self.samples: dict[str, list[Tensor]] = {
            name: [] for name in ("key", "value", "received", "sink_key", "sink_value")
        }

    def __call__(self, seen: Observed) -> None:
        """Adds one batch."""
        bare_key, bare_query, key = seen.bare_key.double(), seen.bare_query.double(), seen.key
        received, by_age, outputs, sharing = _attend(seen, torch.from_numpy(self.gram).float())
        self._add("age", by_age)
        self._add("sharing", sharing)
        self._add_keys("key", bare_key[:, :, SINKS:], received[:, :, SINKS:])
        self._add_keys("sink", key[:, :, :SINKS].double(), received[:, :, :SINKS])
        self._add("mass", received[:, :, :SINKS].sum((0, 2)))
        grouped = bare_query.unflatten(1, (self.spec.kv_heads, -1))
        self._add("query", torch.einsum("bhgsd,bhgse->hde", grouped, grouped) / grouped[0, 0, :, :, 0].numel())
        self._add("output_mean", outputs.mean(3).sum(0))
        self._add("output", torch.einsum("bhgsd,bhgse->hgde", outputs, outputs) / outputs.shape[3])
        self.windows += key.shape[0]
        self._sample(bare_key, key, seen.value, received)

    def _add(self, name: str, amount: Tensor) -> None:
        self.sums[name] = self.sums[name] + amount if name in self.sums else amount

    def _add_keys(self, name: str, keys: Tensor, weights: Tensor) -> None:
        self._add(f"{name}_mean", torch.einsum("bhs,bhsd->hd", weights, keys))
        self._add(name, torch.einsum("bhs,bhsd,bhse->hde", weights, keys, keys))

    def _sample(self, bare_key: Tensor, key: Tensor, value: Tensor, received: Tensor) -> None:
        pick = torch.from_numpy(next(self.picks))
        self.samples["received"].append(received[:, :, pick].transpose(0, 1).flatten(1))
        self.samples["key"].append(bare_key[:, :, pick].transpose(0, 1).flatten(1, 2).float())
        self.samples["value"].append(value[:, :, pick].transpose(0, 1).flatten(1, 2))
        if self.windows * SINKS <= SAMPLES // 4:
            self.samples["sink_key"].append(key[:, :, :SINKS].transpose(0, 1).flatten(1, 2))
            self.samples["sink_value"].append(value[:, :, :SINKS].transpose(0, 1).flatten(1, 2))

    def finish(self, context: int, positions: Array) -> dict[str, Array]:
        """The statistics of this layer, by field name."""
        frequencies, gram = self.frequencies, self.gram
        mean = {name: (total / self.windows).numpy() for name, total in self.sums.items()}
        key_mean = rope.average_mean(mean["key_mean"], frequencies, context) + mean["sink_mean"]
        key_square = rope.average_moment(mean["key"], frequencies, context) + mean["sink"]
        group_mean = mean["output_mean"]
        covariance = mean["output"] - np.einsum("hgd,hge->hgde", group_mean, group_mean)
        samples = {name: torch.cat(parts, dim=1).numpy() for name, parts in self.samples.items()}
        return {
            "key_moment": key_square - key_mean[:, :, None] * key_mean[:, None, :],
            "query_moment": rope.average_moment(mean["query"], frequencies, context),
            "output_moment": covariance.mean(1),
            "output_mean": group_mean.reshape(-1, group_mean.shape[-1]),
            "fluctuation": np.einsum("hgde,hgde->hg", covariance, gram).ravel(),
            "sharing_loss": mean["sharing"],
            "output_gram": gram.sum(1),
            "key_samples": rope.rotate(samples["key"], positions, frequencies).astype(np.float32),
            "value_samples": samples["value"],
            "received": samples["received"],
            "sink_keys": samples["sink_key"],
            "sink_values": samples["sink_value"],
            "sink_mass": mean["mass"],
            "age_mass": mean["age"],
        }


def collect(
    model: Any,
    architecture: Architecture,
    spec: ModelSpec,
    windows: Array,
    *,
    context: int,
    seed: int,
    batches: Any,
    counted: Array | None = None,
) -> CalibrationStatistics:
    """Runs the windows through a prepared model and gathers its statistics.

    Args:
        model: The prepared model, without codes.
        architecture: Where its parts live.
        spec: Its shape.
        windows: [n, length] token ids.
        context: Target context in tokens.
        seed: Seed of sampled tokens and positions.
        batches: Wraps the iterable of batches, to show progress.
        counted: [n, length] bool, the tokens that count when a model is judged; None for all.

    Returns:
        The statistics of all layers.
    """
    rng = np.random.default_rng(seed)
    per_window = min(windows.shape[1] - SINKS, -(-SAMPLES // len(windows)))
    picks = [SINKS + np.sort(rng.permutation(windows.shape[1] - SINKS)[:per_window]) for _ in windows]
    positions = rng.integers(0, context, per_window * len(windows))
    slims = slim_modules(model, architecture)
    grams = [output_gram(attention, architecture, spec) for attention in attention_modules(model, architecture)]
    recorders = [
        _LayerRecorder(spec, rope_frequencies(slim), picks, gram) for slim, gram in zip(slims, grams, strict=True)
    ]
    for slim, recorder in zip(slims, recorders, strict=True):
        slim.observer = recorder
    try:
        with torch.inference_mode(), parts_recorded(model, architecture) as parts:
            for window in batches(windows):
                model.base_model(input_ids=torch.from_numpy(window[None]), use_cache=False)
    finally:
        for slim in slims:
            slim.observer, slim.hidden = None, None
    layers = [recorder.finish(context, positions) for recorder in recorders]
    layers = [{**layer, **part.finish()} for layer, part in zip(layers, parts, strict=True)]
    by_name = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    counted = np.ones(windows.shape, bool) if counted is None else counted
    return CalibrationStatistics(
        **by_name,
        positions=positions,
        frequencies=_stacked([recorder.frequencies for recorder in recorders]),
        context=np.array(context),
        windows=windows,
        counted=counted,
    )


def rope_frequencies(slim: SlimAttention) -> Array:
    """[rotary_dim / 2] radians per position, scaling included; empty without RoPE."""
    return np.zeros(0) if slim.rotary is None else slim.rotary.frequencies


def _stacked(frequencies: list[Array]) -> Array:
    """One row per layer; a rotation by nothing where there is none."""
    width = max(map(len, frequencies))
    return np.stack([each if len(each) else np.zeros(width) for each in frequencies])


def output_gram(attention: Any, architecture: Architecture, spec: ModelSpec) -> Array:
    """W_O^T W_O of each query head, [kv_heads, group, head_dim, head_dim]."""
    weight, _ = projection(attention, architecture, "output")
    by_head = weight.reshape(-1, spec.kv_heads, spec.group_size, spec.head_dim)
    return np.einsum("ohgd,ohge->hgde", by_head, by_head)


def _attend(seen: Observed, gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention that each key receives, by key and by age, outputs, and what it costs heads to share their attention.

    All are taken from all queries but the first eighth.

    The first queries have few keys to choose from. Queries go in blocks, so that memory grows with the length alone.

    Returns:
        [batch, kv_heads, length] mean over group and queries, summing to 1; [kv_heads, buckets] the same by age, sinks
        left out, summed over the batch; the outputs, float64 [batch, kv_heads, group, queries, head_dim]; and the
        sharing loss [q_heads, q_heads], mean over queries, summed over the batch.
    """
    key, value, length = seen.key, seen.value, seen.key.shape[2]
    grouped = seen.query.unflatten(1, (key.shape[1], -1))
    received, outputs = torch.zeros(key.shape[:3], dtype=torch.float64), []
    by_age = torch.zeros(key.shape[1], length.bit_length(), dtype=torch.float64)
    power = value_power(value, gram)
    sharing = torch.zeros(power.shape[1], power.shape[1], dtype=torch.float64)
    for start in range(length // 8, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        weights = seen.scoring.weights(grouped[..., start:stop, :], key[:, :, None, :stop], start)
        mean = weights.mean(2)
        received[:, :, :stop] += mean.sum(2)
        by_age += _by_age(mean.sum(0)[:, :, SINKS:], start - SINKS, by_age.shape[1])
        outputs.append(torch.einsum("bhgst,bhtd->bhgsd", weights, value[:, :, :stop]).double())
        sharing += sharing_loss(weights.flatten(1, 2), power[..., :stop]).sum(0)
    queries = length - length // 8
    return received / queries, by_age / queries, torch.cat(outputs, dim=3), sharing / queries


def value_power(value: Tensor, gram: Tensor) -> Tensor:
    """Squared norms of what values add to the hidden states beyond their mean: [batch, q_heads, keys].

    Args:
        value: [batch, kv_heads, keys, head_dim].
        gram: [kv_heads, group, head_dim, head_dim] of each query head's W_O^T W_O.
    """
    centred = value - value.mean(2, keepdim=True)
    return torch.einsum("bhtd,hgde,bhte->bhgt", centred, gram, centred).flatten(1, 2)


def sharing_loss(weights: Tensor, power: Tensor) -> Tensor:
    """Sum over queries of the squared error that a head's output gets by the weights of another.

    Args:
        weights: [batch, heads, queries, keys] attention weights.
        power: [batch, heads, keys] squared norms of each head's values.

    Returns:
        float64 [batch, heads, heads]; entry i, j is what head i loses by the weights of head j.
    """
    weights, power = weights.double(), power.double()  # heads that attend alike differ by little
    products = (weights * power[:, :, None]).flatten(2) @ weights.flatten(2).transpose(1, 2)
    squares = power @ weights.square().sum(2).transpose(1, 2)
    own = products.diagonal(dim1=1, dim2=2)
    loss = (own[:, :, None] + squares - 2 * products).clamp(min=0)
    return loss * (1 - torch.eye(loss.shape[1], dtype=loss.dtype))


def _by_age(weights: Tensor, lead: int, buckets: int) -> Tensor:
    """Sums of weights [heads, queries, keys] over ages 0, 1..2, 3..6 and so on: [heads, buckets].

    Args:
        weights: Causal attention.
        lead: Age of the first key at the first query.
        buckets: Number of them.
    """
    heads, queries, keys = weights.shape
    # Each row a place further right than the one above it: columns are then ages, and one sum serves a diagonal.
    skewed = torch.nn.functional.pad(weights.flip(-1), (0, queries)).flatten(1)[:, : queries * (keys + queries - 1)]
    sums = skewed.unflatten(1, (queries, keys + queries - 1)).sum(1).double()
    age = (torch.arange(keys + queries - 1) + lead - keys + 1).clamp(min=0)
    bucket = (age + 1).float().log2().floor().long()
    return torch.zeros(heads, buckets, dtype=torch.float64).index_add_(1, bucket, sums)
