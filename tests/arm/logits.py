"""What graphs compute on the machine that this runs on: python logits.py FOLDER, with one folder for each graph in it.

Each holds `tokens.npy`, ids [n] for a decoder and [texts, n] for an encoder. What is computed goes to a file beside it
that is called like the machine's processor.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kvslim.runtime.encoder import EncoderSession, pad
from kvslim.runtime.session import DecodeSession

CONTEXT = 16  # tokens before those that come one by one


def decoded(graph: Path, tokens: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Logits of the tokens behind the context: of all in one run, and of each in a run of its own, with its cache."""
    session = DecodeSession(graph, capacity=len(tokens), threads=1)
    yield "many", session.step(tokens)[CONTEXT:]
    session.reset()
    session.step(tokens[:CONTEXT])
    logits, caches = [], []
    for at in range(CONTEXT, len(tokens)):
        caches.append([array.copy() for array in cache_of(session)])
        logits.append(session.step(tokens[[at]]))
    yield "one", np.concatenate(logits)
    for index, arrays in enumerate(zip(*caches, strict=True)):
        yield f"cache {index}", np.stack(arrays)


def decoded_from(graph: Path, tokens: np.ndarray, caches: Sequence[np.ndarray]) -> np.ndarray:
    """Logits of the same tokens, each with the cache that another machine had before it."""
    session = DecodeSession(graph, capacity=len(tokens), threads=1)
    logits = []
    for index, at in enumerate(range(CONTEXT, len(tokens))):
        session.fill(at)
        for array, theirs in zip(cache_of(session), caches, strict=True):
            array[...] = theirs[index]
        logits.append(session.step(tokens[[at]]))
    return np.concatenate(logits)


def cache_of(session: DecodeSession) -> list[np.ndarray]:
    """All that the cache holds, as it lies in memory."""
    return [array for layer in session._layers for array in layer.arrays]


def encoded(graph: Path, texts: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """States of the last layer of all texts in one batch, and of each alone."""
    session = EncoderSession(graph, threads=1)
    yield "many", session.hidden_states(*pad(list(texts)))
    yield "one", np.concatenate([session.hidden_states(*pad([text])) for text in texts])


def results(folder: Path) -> dict[str, np.ndarray]:
    """Of one graph as evaluation has it, by file and by how it ran."""
    tokens = np.load(folder / "tokens.npy")
    computed = decoded if tokens.ndim == 1 else encoded
    graphs = [graph for graph in sorted(folder.glob("*.onnx")) if graph.name != "model.onnx"]
    return {f"{graph.stem}, {run}": found for graph in graphs for run, found in computed(graph, tokens)}


def main() -> None:
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        np.savez(folder / f"{platform.machine()}.npz", **results(folder))
    os._exit(0)  # under QEMU, a process with many sessions was seen to hang as it ended


if __name__ == "__main__":
    main()
