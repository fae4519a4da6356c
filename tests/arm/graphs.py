"""The graphs that are compared: every kind of cache, weights in every form, and encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from support.models import export_slim, open_prepared, recipe_of
from support.tiny_decoders import save_decoder
from support.tiny_encoders import save_encoder
from support.tiny_gguf import write_gguf

from kvslim.loading.source import read_spec, resolve
from kvslim.methods import ClusterHeads, KvHdc, KvQuant, KvWindow, Method, ShareKv
from kvslim.prepared.encoder import PreparedEncoder
from kvslim.progress import Silent
from kvslim.recipe import Recipe
from kvslim.runtime.evaluation import changed_graph
from kvslim.types import Plan
from kvslim.weight_format import Weights

ROUNDED, FLOAT = "rounded.onnx", "float.onnx"  # the same, with products' inputs rounded or not
TOKENS = np.random.default_rng(0).integers(0, 256, 72)  # every tiny tokenizer has all bytes
TEXTS = np.random.default_rng(1).integers(10, 250, (3, 24))
RING = KvWindow(window=12, sinks=3)


@dataclass(frozen=True)
class Graph:
    """How a graph is made.

    Attributes:
        write: Writes it to a new folder, with a folder for the model beside it.
        tokens: What it is given.
        rounds: Whether weights are blocks of integers, so that the kernel rounds what they are multiplied with.
    """

    write: Callable[[Path, Path], None]
    tokens: np.ndarray
    rounds: bool = False


def _decoder(model: Path, graph: Path, family: str, methods: tuple[Method, ...], weights: Weights) -> None:
    export_slim(open_prepared(save_decoder(family, model), recipe_of(methods, weights)), graph)


def _stored(model: Path, graph: Path, kind: str) -> None:
    path = write_gguf(save_decoder("llama", model), graph.parent.parent / f"{kind}.gguf", kind)
    export_slim(open_prepared(path, recipe_of((), "stored")), graph)


def _encoder(model: Path, graph: Path, weights: Weights) -> None:
    snapshot = resolve(str(save_encoder("bert", "feature-extraction", model)))
    prepared = PreparedEncoder(snapshot, read_spec(snapshot), Recipe(name="test", weights=weights), Silent())
    graph.mkdir()
    prepared.export(Plan.identity(prepared.spec), graph)


def _of(*methods: Method, family: str = "llama", weights: Weights = "fp32") -> Graph:
    return Graph(partial(_decoder, family=family, methods=methods, weights=weights), TOKENS, weights != "fp32")


GRAPHS: dict[str, Graph] = {
    "plain cache": _of(),
    "sliding windows of the model": _of(family="mistral"),
    "int8 cache": _of(KvQuant()),
    "int4 cache": _of(KvQuant(bits=4), family="phi"),
    "int4 cache, rotated": _of(KvHdc(bits=4, granularity="per_channel")),
    "packed in 2 bits": _of(KvHdc(bits=2, window=12, sinks=3)),
    "window with sinks": _of(RING),
    "window with sinks, int8": _of(RING, KvQuant()),
    "clustered heads": _of(ClusterHeads(clusters={0: 2, 1: 1}), family="gpt2"),
    "heads clustered by the prompt": _of(ClusterHeads(clusters={0: 1, 1: 2}, mode="dynamic"), family="gpt2"),
    "shared int8 cache": _of(ShareKv(sources={1: 0}), KvQuant()),
    "int8 weights": _of(weights="int8"),
    "int4 weights": _of(weights="int4"),
    "int4 weights, int8 cache": _of(KvQuant(), weights="int4"),
    "weights as stored, Q4_0": Graph(partial(_stored, kind="Q4_0"), TOKENS, rounds=True),
    "weights as stored, Q8_0": Graph(partial(_stored, kind="Q8_0"), TOKENS, rounds=True),
    "encoder": Graph(partial(_encoder, weights="fp32"), TEXTS),
    "encoder, int8 weights": Graph(partial(_encoder, weights="int8"), TEXTS, rounds=True),
}


def write_graphs(folder: Path, models: Path) -> None:
    """Writes all of them, each to a folder of its name."""
    for number, (name, graph) in enumerate(GRAPHS.items()):
        graph.write(models / str(number), folder / name)
        np.save(folder / name / "tokens.npy", graph.tokens)
        _write_for_evaluation(folder / name, graph)


def _write_for_evaluation(folder: Path, graph: Graph) -> None:
    """Writes the graph as evaluation has it; a board lacks the package that changes graphs.

    Logits are those of all positions, and products with integers read inputs that are rounded, or that are not.
    """
    is_decoder, model = graph.tokens.ndim == 1, folder / "model.onnx"
    for file, float_activations in {ROUNDED: False, **({FLOAT: True} if graph.rounds else {})}.items():
        changed = changed_graph(model, all_positions=is_decoder, float_activations=float_activations)
        (folder / file).write_bytes(model.read_bytes() if changed is None else changed.model)
