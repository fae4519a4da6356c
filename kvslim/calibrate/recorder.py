"""Streaming float64 sums of keys, queries and attention outputs, one pass over the calibration windows.

What a softmax loses by small errors in its scores is half their variance under its own weights (the second-order term
of the KL divergence), so keys count by the attention they receive. Keys and queries are un-rotated to before RoPE;
`rope` then averages their moments over the target context in closed form, so a short calibration serves a long
deployment. The first tokens of a sequence are attention sinks (Xiao et al., "Efficient Streaming Language Models with
Attention Sinks", 2023, section 3.1): they stay where they are however long the context, so their keys are not turned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvslim.calibrate.attended import attend
from kvslim.calibrate.parts import parts_recorded
from kvslim.calibrate.recording import SAMPLES, SINKS, LayerRecording, Recording, sampled_tokens
from kvslim.contract import ModelSpec
from kvslim.loading.architecture import Architecture
from kvslim.memory import give_back
from kvslim.progress import Progress
from kvslim.transform.attention import Observed, SlimAttention
from kvslim.transform.device import where
from kvslim.transform.projections import projection
from kvslim.transform.surgery import attention_modules, slim_modules

Array = np.ndarray


class _LayerRecorder:
    """Sums of one layer; memory does not depend on the number of tokens.

    Args:
        spec: The model's shape.
        frequencies: Of RoPE.
        gram: W_O^T W_O of each query head.
        picks: The tokens to sample of each window.
        first: Windows of the text before the first one that is seen.
    """

    def __init__(self, spec: ModelSpec, frequencies: Array, gram: Array, picks: Iterable[Array], first: int) -> None:
        self.spec, self.frequencies, self.gram, self.picks = spec, frequencies, gram, iter(picks)
        self.windows = first
        self.sums: dict[str, Tensor] = {}
        self.samples: dict[str, list[Tensor]] = {
            name: [] for name in ("key", "value", "received", "sink_key", "sink_value")
        }

    def __call__(self, seen: Observed) -> None:
        """Adds one batch."""
        bare_key, bare_query, key = seen.bare_key.double(), seen.bare_query.double(), seen.key
        received, by_age, outputs, sharing = attend(seen, torch.from_numpy(self.gram).float().to(key.device))
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
        pick = torch.from_numpy(next(self.picks)).to(key.device)
        self.samples["received"].append(received[:, :, pick].transpose(0, 1).flatten(1))
        self.samples["key"].append(bare_key[:, :, pick].transpose(0, 1).flatten(1, 2).float())
        self.samples["value"].append(value[:, :, pick].transpose(0, 1).flatten(1, 2))
        sinks = SINKS if self.windows * SINKS <= SAMPLES // 4 else 0
        self.samples["sink_key"].append(key[:, :, :sinks].transpose(0, 1).flatten(1, 2))
        self.samples["sink_value"].append(value[:, :, :sinks].transpose(0, 1).flatten(1, 2))

    def recording(self, hidden: dict[str, Tensor]) -> LayerRecording:
        """What was added up, with the sums of the layer's hidden states."""
        return LayerRecording(
            self.frequencies,
            self.gram,
            {name: total.cpu().numpy() for name, total in self.sums.items()},
            {name: total.cpu().numpy() for name, total in hidden.items()},
            {name: torch.cat(parts, dim=1).cpu().numpy() for name, parts in self.samples.items()},
        )


class Recorder:
    """Runs windows through a prepared model and adds up what its layers do, one part of the text after another.

    Args:
        model: The prepared model, without codes.
        architecture: Where its parts live.
        spec: Its shape.
        windows: [n, length] token ids of the whole text.
        seed: Of sampled tokens.
    """

    def __init__(self, model: Any, architecture: Architecture, spec: ModelSpec, windows: Array, seed: int) -> None:
        self.model, self.architecture, self.spec = model, architecture, spec
        self.windows, self.seed = windows, seed
        self._picks, _ = sampled_tokens(windows, seed)
        self._slims = slim_modules(model, architecture)
        attentions = attention_modules(model, architecture)
        self._known = [
            (rope_frequencies(slim), output_gram(attention, architecture, spec))
            for slim, attention in zip(self._slims, attentions, strict=True)
        ]

    def record(self, progress: Progress, part: range | None = None) -> Recording:
        """What the layers do in some windows, one at least and without gaps; None for all."""
        part = range(len(self.windows)) if part is None else part
        picks = self._picks[part.start : part.stop]
        recorders = [_LayerRecorder(self.spec, *known, picks, part.start) for known in self._known]
        for slim, recorder in zip(self._slims, recorders, strict=True):
            slim.observer = recorder
        try:
            with where(self.model), torch.inference_mode(), parts_recorded(self.model, self.architecture) as parts:
                for window in progress.track(self.windows[part.start : part.stop], "windows"):
                    tokens = torch.from_numpy(window[None]).to(self.model.device)
                    self.model.base_model(input_ids=tokens, use_cache=False)
                    give_back()  # or what windows leave behind adds up, to gigabytes in a large model
        finally:
            for slim in self._slims:
                slim.observer, slim.hidden = None, None
        layers = tuple(recorder.recording(hidden.sums) for recorder, hidden in zip(recorders, parts, strict=True))
        return Recording(self.windows, self.seed, part, parts[0].tokens, layers)


def rope_frequencies(slim: SlimAttention) -> Array:
    """[rotary_dim / 2] radians per position, scaling included; empty without RoPE."""
    return np.zeros(0) if slim.rotary is None else slim.rotary.frequencies


def output_gram(attention: Any, architecture: Architecture, spec: ModelSpec) -> Array:
    """W_O^T W_O of each query head, [kv_heads, group, head_dim, head_dim]."""
    weight, _ = projection(attention, architecture, "output")
    by_head = weight.reshape(-1, spec.kv_heads, spec.group_size, spec.head_dim)
    return np.einsum("ohgd,ohge->hgde", by_head, by_head)
