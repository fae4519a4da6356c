"""Streaming float64 statistics of keys, queries and values, one pass over the calibration windows.

Keys and queries are un-rotated to before RoPE; `rope` then averages their moments over the target context in closed
form, so a short calibration serves a long deployment. The first tokens of a sequence are attention sinks: their keys
sit far from all others and most softmaxes lean on them, so they are kept apart and weighted by the attention they get.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvslim.calibrate import rope
from kvslim.load.architecture import Architecture
from kvslim.transform.surgery import attention_modules, projection, slim_modules
from kvslim.types import ModelSpec

Array = np.ndarray
SINKS = 4
SAMPLES = 2048


@dataclass(frozen=True)
class CalibrationStatistics:
    """What methods may know of a model's cache; L layers, H kv heads, d head_dim.

    Attributes:
        key_moment: [L, H, d, d] covariance of keys after RoPE over the target context, sinks by attention mass.
        query_moment: [L, H, d, d] second moment of the group's queries after RoPE, summed over the group.
        value_moment: [L, H, d, d] covariance of values, sinks by attention mass.
        value_mean: [L, H, d] mean of values, sinks by attention mass.
        output_gram: [L, H, d, d] sum over the group's heads of W_O^T W_O: what an error in a value costs downstream.
        key_samples: [L, H, n, d] keys rotated to random positions of the target context.
        value_samples: [L, H, n, d] values of the same tokens.
        sink_keys: [L, H, m, d] keys of the first tokens, at their own positions.
        sink_values: [L, H, m, d] values of the first tokens.
        sink_mass: [L, H] mean attention that the first tokens get.
    """

    key_moment: Array
    query_moment: Array
    value_moment: Array
    value_mean: Array
    output_gram: Array
    key_samples: Array
    value_samples: Array
    sink_keys: Array
    sink_values: Array
    sink_mass: Array

    def arrays(self) -> dict[str, Array]:
        """The fields by name, as they are stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class _LayerRecorder:
    """Sums of one layer; memory does not depend on the number of tokens."""

    def __init__(self, spec: ModelSpec, frequencies: Array, picks: Iterable[Array]) -> None:
        heads, dim = spec.kv_heads, spec.head_dim
        self.spec, self.frequencies, self.picks = spec, torch.from_numpy(frequencies), iter(picks)
        self.count, self.sink_count, self.score_count = 0, 0, 0
        zeros = lambda *shape: torch.zeros(heads, *shape, dtype=torch.float64)  # noqa: E731
        self.sums = {name: zeros(dim) for name in ("key", "value", "sink_key", "sink_value")}
        self.squares = {name: zeros(dim, dim) for name in (*self.sums, "query")}
        self.mass = zeros()
        self.samples: dict[str, list[Tensor]] = {name: [] for name in ("key", "value", "sink_key", "sink_value")}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Adds one batch: q, k, v as [batch, heads, length, head_dim] after RoPE."""
        self._add_mass(query, key, scaling)
        positions = torch.arange(key.shape[2], dtype=torch.float64)
        bare_key, bare_query = (_unrotate(x.double(), positions, self.frequencies) for x in (key, query))
        self._add("key", bare_key[:, :, SINKS:])
        self._add("value", value[:, :, SINKS:].double())
        self._add("sink_key", key[:, :, :SINKS].double())
        self._add("sink_value", value[:, :, :SINKS].double())
        grouped = bare_query.unflatten(1, (self.spec.kv_heads, -1))
        self.squares["query"] += torch.einsum("bhgsd,bhgse->hde", grouped, grouped)
        self.count += key.shape[0] * (key.shape[2] - SINKS)
        self.sink_count += key.shape[0] * SINKS
        self._sample(bare_key, key, value)

    def _add(self, name: str, states: Tensor) -> None:
        self.sums[name] += states.sum(dim=(0, 2))
        self.squares[name] += torch.einsum("bhsd,bhse->hde", states, states)

    def _add_mass(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Attention on the sinks, from the queries of the window's second half."""
        half = key.shape[2] // 2
        grouped = query[:, :, half:].unflatten(1, (key.shape[1], -1))
        scores = torch.einsum("bhgsd,bhtd->bhgst", grouped, key) * scaling
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(half + 1)
        mass = scores.masked_fill_(later, -torch.inf).softmax(-1)[..., :SINKS].sum(-1)
        self.mass += mass.mean((2, 3)).sum(0)
        self.score_count += key.shape[0]

    def _sample(self, bare_key: Tensor, key: Tensor, value: Tensor) -> None:
        pick = torch.from_numpy(next(self.picks))
        self.samples["key"].append(bare_key[:, :, pick].transpose(0, 1).flatten(1, 2).float())
        self.samples["value"].append(value[:, :, pick].transpose(0, 1).flatten(1, 2))
        if self.sink_count <= SAMPLES // 4:
            self.samples["sink_key"].append(key[:, :, :SINKS].transpose(0, 1).flatten(1, 2))
            self.samples["sink_value"].append(value[:, :, :SINKS].transpose(0, 1).flatten(1, 2))

    def finish(self, context: int, positions: Array, gram: Array) -> dict[str, Array]:
        """The statistics of this layer, by field name."""
        frequencies = self.frequencies.numpy()
        mass = (self.mass / self.score_count).numpy()
        mean = {n: (s / (self.sink_count if "sink" in n else self.count)).numpy() for n, s in self.sums.items()}
        square = {n: (s / (self.sink_count if "sink" in n else self.count)).numpy() for n, s in self.squares.items()}
        square["key"] = rope.average_moment(square["key"], frequencies, context)
        mean["key"] = rope.average_mean(mean["key"], frequencies, context)
        key_moment, _ = _mixture(mass, (mean["key"], square["key"]), (mean["sink_key"], square["sink_key"]))
        value_moment, value_mean = _mixture(
            mass, (mean["value"], square["value"]), (mean["sink_value"], square["sink_value"])
        )
        samples = {name: torch.cat(parts, dim=1).numpy() for name, parts in self.samples.items()}
        return {
            "key_moment": key_moment,
            "query_moment": rope.average_moment(square["query"], frequencies, context),
            "value_moment": value_moment,
            "value_mean": value_mean,
            "output_gram": gram,
            "key_samples": rope.rotate(samples["key"], positions, frequencies).astype(np.float32),
            "value_samples": samples["value"],
            "sink_keys": samples["sink_key"],
            "sink_values": samples["sink_value"],
            "sink_mass": mass,
        }


def collect(
    model: Any, architecture: Architecture, spec: ModelSpec, windows: Array, *, context: int, seed: int, batches: Any
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

    Returns:
        The statistics of all layers.
    """
    rng = np.random.default_rng(seed)
    per_window = min(windows.shape[1] - SINKS, -(-SAMPLES // len(windows)))
    picks = [SINKS + np.sort(rng.permutation(windows.shape[1] - SINKS)[:per_window]) for _ in windows]
    positions = rng.integers(0, context, per_window * len(windows))
    frequencies = rope_frequencies(model, architecture)
    slims = slim_modules(model, architecture)
    recorders = [_LayerRecorder(spec, frequencies, picks) for _ in slims]
    for slim, recorder in zip(slims, recorders, strict=True):
        slim.observer = recorder
    try:
        with torch.inference_mode():
            for window in batches(windows):
                model.base_model(input_ids=torch.from_numpy(window[None]), use_cache=False)
    finally:
        for slim in slims:
            slim.observer, slim.hidden = None, None
    grams = [_output_gram(attention, architecture, spec) for attention in attention_modules(model, architecture)]
    layers = [recorder.finish(context, positions, gram) for recorder, gram in zip(recorders, grams, strict=True)]
    return CalibrationStatistics(**{name: np.stack([layer[name] for layer in layers]) for name in layers[0]})


def rope_frequencies(model: Any, architecture: Architecture) -> Array:
    """[rotary_dim / 2] radians per position, scaling included; empty without RoPE."""
    if architecture.rotary is None:
        return np.zeros(0)
    frequencies: Array = model.get_submodule(architecture.rotary).inv_freq.double().numpy()
    return frequencies


def _output_gram(attention: Any, architecture: Architecture, spec: ModelSpec) -> Array:
    weight, _ = projection(attention, architecture, "output")
    by_head = weight.reshape(-1, spec.kv_heads, spec.group_size, spec.head_dim)
    return np.einsum("ohgd,ohge->hde", by_head, by_head)


def _mixture(mass: Array, body: tuple[Array, Array], sink: tuple[Array, Array]) -> tuple[Array, Array]:
    """Covariance and mean of sinks (weight `mass`) and body, each given as mean and second moment per head."""
    share = mass[:, None]
    mean = (1 - share) * body[0] + share * sink[0]
    square = (1 - share[..., None]) * body[1] + share[..., None] * sink[1]
    return square - mean[:, :, None] * mean[:, None, :], mean


def _unrotate(states: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    half = len(frequencies)
    angle = positions[:, None] * frequencies
    cos, sin = angle.cos(), angle.sin()
    first, second = states[..., :half], states[..., half : 2 * half]
    return torch.cat([first * cos + second * sin, second * cos - first * sin, states[..., 2 * half :]], dim=-1)
