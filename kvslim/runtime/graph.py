"""Opening ONNX graphs with onnxruntime, and reading their cache contract."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
from pydantic import TypeAdapter, ValidationError

from kvslim.errors import ArtifactError, NotFoundError, UsageError
from kvslim.transform.clustering import Formed
from kvslim.types import (
    BITS,
    CLUSTER_INPUTS,
    CLUSTERS,
    INPUTS,
    LAST_POSITION,
    RINGS,
    SHARED,
    WINDOW_SLACK,
    CacheType,
    Frozen,
    Kind,
    KVLayout,
    KVTensor,
)

Logits = npt.NDArray[np.float32]

_PAST = re.compile(r"past_key_values\.(\d+)\.((?:key|value)(?:_codes)?)")
_CACHE_TYPES: dict[str, CacheType] = {"tensor(float)": "float32", "tensor(int8)": "int8", "tensor(uint8)": "int4"}
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


class _Ring(Frozen):
    """What no shape tells of a layer with a ring: its sinks, and how it stores what is not in the ring."""

    sinks: int
    cache: CacheType


class _Clusters(Frozen):
    """How a layer forms clusters of its heads for each prompt."""

    count: int
    calibrated: list[list[float]]


_T = TypeVar("_T")
_RINGS = TypeAdapter(dict[str, _Ring])
_CLUSTERS = TypeAdapter(dict[str, _Clusters | None])


def open_session(model: Path, threads: int | None = None, *, all_positions: bool = False) -> ort.InferenceSession:
    """A CPU session of a graph.

    Args:
        model: The `.onnx` file, or the folder that holds `model.onnx`.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        all_positions: Whether to give logits of all new positions, for evaluation; the head then reads what it would
            read of the last one, and all else stays as it is.

    Raises:
        NotFoundError: There is no such file.
        UsageError: Its path is not UTF-8.
        ArtifactError: onnxruntime cannot load it.
    """
    path = model / "model.onnx" if model.is_dir() else model
    if not path.is_file():
        raise NotFoundError("no ONNX graph", where=str(path), fix="name a folder that `kvslim compress` wrote")
    if os.fsencode(path).decode(errors="replace") != str(path):
        raise UsageError("onnxruntime opens no path that is not UTF-8", where=str(path), fix="rename the folder")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Worker threads would spin for some 50 ms after a run, and keep a core from whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        graph = _with_all_positions(path) if all_positions else str(path)
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        _read_names(session)
        return session
    except ORT_ERRORS as error:
        raise artifact_error("onnxruntime cannot load the graph", error, str(path)) from error


def _read_names(session: ort.InferenceSession) -> None:
    """Reads all that the graph says of its inputs and outputs; a name that is no text raises here."""
    for node in (*session.get_inputs(), *session.get_outputs()):
        _ = (node.name, node.type, node.shape)


def _with_all_positions(path: Path) -> bytes | str:
    """The graph without the node that keeps the last position; as it is where it has none."""
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return str(path)  # onnxruntime tells what is wrong with it
    nodes = model.graph.node
    found = [node for node in nodes if node.name == LAST_POSITION]
    if not found:
        return str(path)
    (last,) = found
    for node in nodes:
        node.input[:] = [last.input[0] if name == last.output[0] else name for name in node.input]
    nodes.remove(last)
    logits = next(value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
    return model.SerializeToString()


def layout_of(session: ort.InferenceSession) -> KVLayout:
    """The KV inputs of a graph, in its order: what the bytes of a cache are counted from.

    Raises:
        ArtifactError: An input is no part of KVSlim's graph contract.
    """
    rings, clusters = _noted(session, RINGS, _RINGS), _noted(session, CLUSTERS, _CLUSTERS)
    others = {*INPUTS, *(name.format(layer) for layer in clusters for name in CLUSTER_INPUTS)}
    tensors: list[KVTensor] = []
    for node in session.get_inputs():
        match = _PAST.fullmatch(node.name)
        if match is None and node.name in others:
            continue
        if match is not None and match[1] in clusters:
            tensor = _clustered_tensor(node, match, clusters[match[1]])
        else:
            tensor = _kv_tensor(node, match, None if match is None else rings.get(match[1]))
        if tensor is None or (tensor.is_packed and not tensors):
            raise ArtifactError(
                f"graph input {node.name!r} is {node.type} {list(node.shape)}",
                where="model.onnx",
                fix="export with `kvslim compress`: float32, int8 or int4 [batch, heads, past, dim], heads, dim fixed",
            )
        if tensor.is_packed:  # its window is that of the ring before it
            tensor = tensor.model_copy(update={"window": tensors[-1].window})
        tensors.append(tensor)
    return KVLayout(tensors=tuple(tensors))


def shared_outputs(session: ort.InferenceSession, tensor: KVTensor) -> list[str]:
    """Outputs that are to lie in a tensor's memory too: what layers that read it give back of it."""
    start = f"{SHARED}{tensor.kind}.{tensor.layer}."
    return [node.name for node in session.get_outputs() if node.name.startswith(start)]


def formed_clusters(session: ort.InferenceSession) -> dict[int, Formed]:
    """How the layers with dynamic clusters form them.

    Raises:
        ArtifactError: The graph's metadata cannot be read.
    """
    noted = _noted(session, CLUSTERS, _CLUSTERS).items()
    return {int(layer): Formed(how.count, np.array(how.calibrated)) for layer, how in noted if how is not None}


def _noted(session: ort.InferenceSession, key: str, kind: TypeAdapter[dict[str, _T]]) -> dict[str, _T]:
    """What the graph's metadata say under a key, by layer; nothing if another tool made it."""
    text = session.get_modelmeta().custom_metadata_map.get(key)
    try:
        return {} if text is None else kind.validate_json(text)
    except ValidationError as error:
        raise ArtifactError(
            f"cannot read the metadata {key}", where="model.onnx", fix="export the model again"
        ) from error


def _clustered_tensor(node: ort.NodeArg, match: re.Match[str], clusters: _Clusters | None) -> KVTensor | None:
    """The KV tensor of a layer with dynamic clusters, or static ones; None where the input is none."""
    if _CACHE_TYPES.get(node.type) != "float32" or len(node.shape) != 4:
        return None
    heads, dim = node.shape[1], node.shape[3]
    if clusters is not None and match[2] == "key":
        heads = clusters.count
    if not isinstance(heads, int) or not isinstance(dim, int):
        return None
    kind = "static" if clusters is None else "dynamic"
    return KVTensor(
        layer=int(match[1]), kind=cast("Kind", match[2]), heads=heads, dim=dim, dtype="float32", clusters=kind
    )


def _kv_tensor(node: ort.NodeArg, match: re.Match[str] | None, ring: _Ring | None) -> KVTensor | None:
    """The KV tensor that a graph input is; None where it is none."""
    if match is None or node.type not in _CACHE_TYPES or len(node.shape) != 4:
        return None
    packed = match[2].endswith("_codes")
    rows, heads = node.shape[2 - packed], node.shape[1 + packed]
    columns = node.shape[3]
    if not isinstance(heads, int) or not isinstance(columns, int) or (packed and ring is None):
        return None
    if ring is not None and not packed and not (isinstance(rows, int) and rows > ring.sinks):
        return None
    dtype = ring.cache if packed and ring is not None else _CACHE_TYPES[node.type]
    slack = WINDOW_SLACK if ring is None else ring.sinks
    return KVTensor(
        layer=int(match[1]),
        kind=cast("Kind", match[2]),
        heads=heads,
        dim=columns if dtype in {"float32", "int8"} else columns * 8 // BITS[dtype],
        dtype=dtype,
        window=rows - slack if isinstance(rows, int) else None,
        sinks=None if ring is None else ring.sinks,
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
    detail = " ".join(str(error).split())
    return ArtifactError(
        f"{message}: {detail[:300]}", where=where, fix="check the folder with `kvslim verify`, or export it again"
    )
