"""Statistics of a tiny model, and what its layers compute, for tests that compare the two."""

from __future__ import annotations

import numpy as np

from kvslim.calibrate.recorder import Recorder
from kvslim.calibrate.recording import finish
from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Silent
from kvslim.transform.attention import Observed
from kvslim.transform.surgery import slim_modules


def gather(prepared: PreparedDecoder, windows: np.ndarray, context: int = 200) -> CalibrationStatistics:
    recorder = Recorder(prepared.model, prepared.architecture, prepared.spec, windows, seed=0)
    return finish(recorder.record(Silent()), context=context)


def windows_of(prepared: PreparedDecoder, count: int, length: int = 40) -> np.ndarray:
    return np.random.default_rng(3).integers(0, prepared.spec.vocab_size, (count, length))


def states(prepared: PreparedDecoder, windows: np.ndarray, layer: int) -> dict[str, np.ndarray]:
    """q, k and v of a layer, [windows, heads, length, dim], by running the model and listening."""
    import torch

    heard: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}

    def listen(seen: Observed) -> None:
        for name, tensor in (("q", seen.query), ("k", seen.key), ("v", seen.value)):
            heard[name].append(tensor.double().numpy())

    slim = slim_modules(prepared.model, prepared.architecture)[layer]
    slim.observer = listen
    with torch.inference_mode():
        prepared.model(torch.from_numpy(windows))
    slim.observer = None
    return {name: np.concatenate(parts) for name, parts in heard.items()}


def attention(heard: dict[str, np.ndarray]) -> np.ndarray:
    """[windows, kv_heads, group, queries, length] softmax weights of all queries but the first eighth."""
    query = heard["q"].reshape(len(heard["q"]), 2, 2, *heard["q"].shape[2:])
    scores = np.einsum("bhgsd,bhtd->bhgst", query, heard["k"]) / 4
    scores[..., np.triu(np.ones(scores.shape[-2:], dtype=bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights[..., weights.shape[-1] // 8 :, :]
