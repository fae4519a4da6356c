"""Sums of what a model does with a text, as a value, and the statistics that follow from them.

A text can be recorded in parts, on different machines, and merged: sums add, and which tokens are sampled is decided by
the whole text. Merged samples are those of one recording exactly, and merged sums are its sums up to float64 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvslim.calibrate import rope
from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.errors import UsageError

Array = np.ndarray
SINKS = 4
SAMPLES = 2048


@dataclass(frozen=True)
class LayerRecording:
    """What one layer did in some windows.

    Attributes:
        frequencies: [rotary_dim / 2] of RoPE, radians per position; empty without.
        gram: [kv_heads, group, head_dim, head_dim], W_O^T W_O of each query head.
        attention: Sums over windows, each a mean over the queries of a window.
        hidden: Sums over tokens of what the layer's parts add to the hidden states.
        samples: [kv_heads, n, head_dim] keys and values of sampled tokens, and the attention these received.
    """

    frequencies: Array
    gram: Array
    attention: dict[str, Array]
    hidden: dict[str, Array]
    samples: dict[str, Array]

    def plus(self, other: LayerRecording) -> LayerRecording:
        """What the layer did in these windows and in those that follow."""
        return replace(
            self,
            attention={name: total + other.attention[name] for name, total in self.attention.items()},
            hidden={name: total + other.hidden[name] for name, total in self.hidden.items()},
            samples={name: np.concatenate([mine, other.samples[name]], axis=1) for name, mine in self.samples.items()},
        )


@dataclass(frozen=True)
class Recording:
    """What a model did in some windows of a text, from which its statistics follow.

    Attributes:
        windows: [n, length] token ids of the whole text.
        seed: Of sampled tokens and positions.
        part: The windows that were recorded.
        tokens: How many tokens the sums of hidden states are over.
        layers: What each layer did.
    """

    windows: Array
    seed: int
    part: range
    tokens: int
    layers: tuple[LayerRecording, ...]


def merge(*parts: Recording) -> Recording:
    """The recordings of neighbouring parts of one text as one, in any order.

    Raises:
        UsageError: There are no parts, they are of different texts or seeds, overlap, or leave a gap.
    """
    if not parts:
        raise UsageError("there are no recordings to merge", where="statistics", fix="give at least one part")
    merged, *others = sorted(parts, key=lambda recording: recording.part.start)
    for other in others:
        merged = _plus(merged, other)
    return merged


def _plus(before: Recording, after: Recording) -> Recording:
    if before.seed != after.seed or not np.array_equal(before.windows, after.windows):
        raise UsageError("the recordings are of different texts", where="statistics", fix="record one text in parts")
    if before.part.stop != after.part.start:
        wrong = "is recorded twice" if after.part.start < before.part.stop else "is not recorded"
        window = min(before.part.stop, after.part.start)
        raise UsageError(f"window {window} {wrong}", where="statistics", fix="record each window once")
    return replace(
        before,
        part=range(before.part.start, after.part.stop),
        tokens=before.tokens + after.tokens,
        layers=tuple(mine.plus(other) for mine, other in zip(before.layers, after.layers, strict=True)),
    )


def finish(recording: Recording, *, context: int, loss_mask: Array | None = None) -> CalibrationStatistics:
    """The statistics of a text that is recorded as a whole.

    Args:
        recording: Of all its windows.
        context: Target context in tokens.
        loss_mask: [n, length] bool, the tokens that count when a model is judged; None for all.

    Raises:
        UsageError: Windows are missing.
    """
    windows = recording.windows
    if recording.part != range(len(windows)):
        message = f"{len(recording.part)} of {len(windows)} windows are recorded"
        raise UsageError(message, where="statistics", fix="record and merge the others too")
    picks, rng = sampled_tokens(windows, recording.seed)
    positions = rng.integers(0, context, sum(map(len, picks)))
    layers = [_finished(layer, recording, context, positions) for layer in recording.layers]
    return CalibrationStatistics(
        **{name: np.stack([layer[name] for layer in layers]) for name in layers[0]},
        positions=positions,
        frequencies=_stacked([layer.frequencies for layer in recording.layers]),
        context=np.array(context),
        windows=windows,
        loss_mask=np.ones(windows.shape, bool) if loss_mask is None else loss_mask,
    )


def sampled_tokens(windows: Array, seed: int) -> tuple[list[Array], np.random.Generator]:
    """The tokens to sample of each window of the whole text, and the generator behind them."""
    rng = np.random.default_rng(seed)
    count, length = len(windows), windows.shape[1]
    per_window = min(length - SINKS, -(-SAMPLES // count))
    return [SINKS + np.sort(rng.permutation(length - SINKS)[:per_window]) for _ in range(count)], rng


def _finished(layer: LayerRecording, recording: Recording, context: int, positions: Array) -> dict[str, Array]:
    """The statistics of one layer, by field name."""
    frequencies, gram, samples = layer.frequencies, layer.gram, layer.samples
    mean = {name: total / len(recording.part) for name, total in layer.attention.items()}
    key_mean = rope.average_mean(mean["key_mean"], frequencies, context) + mean["sink_mean"]
    key_square = rope.average_moment(mean["key"], frequencies, context) + mean["sink"]
    group_mean = mean["output_mean"]
    covariance = mean["output"] - np.einsum("hgd,hge->hgde", group_mean, group_mean)
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
        **{name: total / recording.tokens for name, total in layer.hidden.items()},
    }


def _stacked(frequencies: list[Array]) -> Array:
    """One row per layer; a rotation by nothing where there is none."""
    width = max(map(len, frequencies))
    return np.stack([each if len(each) else np.zeros(width) for each in frequencies])
