"""Opening ONNX graphs with onnxruntime, and reading their cache contract."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
from pydantic import TypeAdapter, ValidationError

from kvslim.caches import CACHES, Cache, FullCache
from kvslim.caches.buffers import LayerBuffers
from kvslim.caches.shared import SHARED
from kvslim.contract import INPUTS, KVTensor
from kvslim.errors import ArtifactError, NotFoundError, UsageError, one_line
from kvslim.export.manifest import SPECULATIVE_GRAPH, WEIGHTS
from kvslim.memory import is_too_large
from kvslim.types import KVLayout

Logits = npt.NDArray[np.float32]

_PAST = re.compile(r"past_key_values\.(\d+)\.[a-z_]+")
MOST_THREADS = 1024
QUANTISED = b"MatMulNBits"  # a graph whose weights are quantised names it
# onnxruntime derives each of its errors from Exception itself, so there is no common base to catch; a run through an
# IOBinding raises RuntimeError instead, and a message that quotes a broken name fails on its way to Python.
ORT_ERRORS = (
    RuntimeError,
    UnicodeDecodeError,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoModel,
    ort_state.NoSuchFile,
    ort_state.NotFound,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)


def open_session(
    model: Path, threads: int | None = None, *, all_positions: bool = False, float_activations: bool = False
) -> ort.InferenceSession:
    """A CPU session of a graph.

    Args:
        model: The `.onnx` file, or the folder that holds `model.onnx`.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        all_positions: Whether to give logits of all new positions, for evaluation, or of those from `FIRST_LOGITS`
            on, an input with a default; the head then reads what it would read of the last one, and all else stays as
            it is.
        float_activations: Whether products with quantised weights take their inputs in float32, not rounded to int8;
            for evaluation, as it is slow.

    Raises:
        NotFoundError: There is no such file.
        UsageError: Its path is not UTF-8, or the number of threads is out of range.
        ArtifactError: onnxruntime cannot load it.
    """
    path = model / "model.onnx" if model.is_dir() else model
    if not path.is_file():
        fix = "name a folder that `kvslim compress` wrote"
        if path.name == SPECULATIVE_GRAPH:
            fix = "do without the draft (--speculative none), or compress again"
        raise NotFoundError("no ONNX graph", where=str(path), fix=fix)
    if os.fsencode(path).decode(errors="replace") != str(path):
        raise UsageError("onnxruntime opens no path that is not UTF-8", where=str(path), fix="rename the folder")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Worker threads would spin for some 50 ms after a run, and keep a core from whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if _stays_in_file(path):
        options.add_session_config_entry("session.disable_prepacking", "1")
    if threads is not None:
        check_threads(threads)
        options.intra_op_num_threads = threads
    try:
        graph = _for_evaluation(path, options, all_positions, float_activations)
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        _read_names(session)
        return session
    except ORT_ERRORS as error:
        raise artifact_error("onnxruntime cannot load the graph", error, str(path)) from error


def _stays_in_file(path: Path) -> bool:
    """Whether a graph's weights are to be read from their file again and again, as memory is too small for a copy.

    onnxruntime maps them from the file, and its products make copies in an order that suits them. Without these they
    read float32 where it is. Products with quantised weights have no fast way to do that, and need less memory.
    """
    weights = path.parent / WEIGHTS
    if not weights.is_file() or _is_quantised(path):  # first: to ask for the memory takes longer than to read a graph
        return False
    return is_too_large(weights.stat().st_size)


def _is_quantised(path: Path) -> bool:
    try:
        return QUANTISED in path.read_bytes()
    except OSError:
        return False  # onnxruntime says what is wrong with it


def check_threads(threads: int) -> None:
    """Refuses a number of threads that no machine has.

    Raises:
        UsageError: It is not positive, or too large.
    """
    if not 1 <= threads <= MOST_THREADS:
        message = f"{threads} threads are not between 1 and {MOST_THREADS}"
        raise UsageError(message, where="--threads", fix="give as many as the machine has cores, or leave it out")


def _read_names(session: ort.InferenceSession) -> None:
    """Reads all that the graph says of its inputs and outputs; a name that is no text raises here."""
    for node in (*session.get_inputs(), *session.get_outputs()):
        _ = (node.name, node.type, node.shape)


def _for_evaluation(
    path: Path, options: ort.SessionOptions, all_positions: bool, float_activations: bool
) -> bytes | str:
    """The graph with what an evaluation asks for; its path where that is how it is stored.

    The options are told where the weights of a graph in memory lie.
    """
    if not all_positions and not float_activations:
        return str(path)
    from kvslim.runtime.evaluation import changed_graph

    changed = changed_graph(path, all_positions, float_activations)
    if changed is None:
        return str(path)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(changed.folder))
    return changed.model


def layout_of(session: ort.InferenceSession) -> KVLayout:
    """The KV inputs of a graph, in its order: what the bytes of a cache are counted from.

    Raises:
        ArtifactError: An input is no part of KVSlim's graph contract.
    """
    notes = cache_notes(session)
    by_layer: dict[int, list[ort.NodeArg]] = {}
    others = []
    for node in session.get_inputs():
        match = _PAST.fullmatch(node.name)
        if match is None:
            others.append(node)
        else:
            by_layer.setdefault(int(match[1]), []).append(node)
    tensors: list[KVTensor] = []
    for layer, nodes in by_layer.items():
        kind, note = notes.get(layer, (FullCache, None))
        found = kind.read_tensors(nodes, note)
        if found is None:
            raise _foreign(nodes)
        tensors.extend(found)
    layout = KVLayout(tensors=tuple(tensors))
    if foreign := [node for node in others if node.name not in {*INPUTS, *layout.extra_inputs}]:
        raise _foreign(foreign)
    return layout


def cache_notes(session: ort.InferenceSession) -> dict[int, tuple[type[Cache], Any]]:
    """The kind of cache of each layer that the graph's metadata tell of, with what they say.

    Raises:
        ArtifactError: The graph's metadata cannot be read.
    """
    written = session.get_modelmeta().custom_metadata_map
    found: dict[int, tuple[type[Cache], Any]] = {}
    for kind in CACHES.values():
        if kind.metadata is None or kind.metadata not in written:
            continue
        try:
            notes = TypeAdapter(dict[int, kind.note_type]).validate_json(written[kind.metadata])  # type: ignore[name-defined]
        except ValidationError as error:
            message = f"cannot read the metadata {kind.metadata}"
            raise ArtifactError(message, where="model.onnx", fix="export the model again") from error
        found |= {layer: (kind, note) for layer, note in notes.items() if kind.claims(note)}
    return found


def layer_buffers(session: ort.InferenceSession, layout: KVLayout, *, capacity: int, batch: int) -> list[LayerBuffers]:
    """Memory for the cache of each layer."""
    notes = cache_notes(session)
    return [
        CACHES[tensors[0].cache].buffers()(
            tensors,
            capacity=capacity,
            batch=batch,
            note=notes.get(tensors[0].layer, (None, None))[1],
            aliases=[_shared_outputs(session, tensor) for tensor in tensors],
        )
        for tensors in layout.layers
    ]


def _shared_outputs(session: ort.InferenceSession, tensor: KVTensor) -> list[str]:
    """Outputs that are to lie in a tensor's memory too: what layers that read it give back of it."""
    start = f"{SHARED}{tensor.kind}.{tensor.layer}."
    return [node.name for node in session.get_outputs() if node.name.startswith(start)]


def _foreign(nodes: Sequence[ort.NodeArg]) -> ArtifactError:
    inputs = ", ".join(f"{node.name!r} is {node.type} {list(node.shape)}" for node in nodes[:2])
    return ArtifactError(
        f"graph input {inputs}",
        where="model.onnx",
        fix="export with `kvslim compress`: float32, int8 or int4 [batch, heads, past, dim], heads, dim fixed",
    )


def run_graph(session: ort.InferenceSession, output: str, feed: dict[str, npt.NDArray[np.int64]], where: str) -> Logits:
    """One output of a graph without a cache.

    Raises:
        ArtifactError: onnxruntime fails on the graph.
    """
    try:
        result: Logits = session.run([output], feed)[0]
    except ORT_ERRORS as error:
        raise artifact_error("onnxruntime failed on the graph", error, where) from error
    return result


def artifact_error(message: str, error: Exception, where: str) -> ArtifactError:
    """onnxruntime's own words, in the form of ours."""
    fix = "check the folder with `kvslim verify`, or export it again"
    return ArtifactError(f"{message}: {one_line(error)[:300]}", where=where, fix=fix)
