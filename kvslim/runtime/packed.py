"""An artifact whose weights lie in its files as this processor's kernels read them.

    python -m kvslim.runtime.packed ARTIFACT OUT

onnxruntime packs the weights of products when it opens a graph, into memory of its own. A copy that holds them packed
is mapped instead: the system can give such pages up and read them again. It is for this kind of processor and this
version of onnxruntime alone, and larger, since the weights as they were stay in it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import onnxruntime as ort

from kvslim.errors import KvslimError
from kvslim.export.manifest import GRAPH, WEIGHTS, hash_files, read_runnable, write_manifest
from kvslim.export.package import staging
from kvslim.runtime.opening import ORT_ERRORS, artifact_error

PACKED = f"{GRAPH}_packed"
LEAST_BYTES = 1024  # what is smaller stays in the graph


def write_packed(artifact: Path, out: Path) -> None:
    """Copies an artifact with its weights packed for this machine.

    Args:
        artifact: A folder that `kvslim compress` wrote.
        out: The folder to make.

    Raises:
        NotFoundError, ArtifactError, UnsupportedError: The artifact cannot be opened here.
        OutputError: `out` is taken or cannot be written.
    """
    manifest = read_runnable(artifact)
    with staging(out) as folder:
        others = any(path.name != GRAPH for path in artifact.glob("*.onnx"))  # which read the weights as they were
        left_out = shutil.ignore_patterns(GRAPH, *([] if others else [WEIGHTS]))
        shutil.copytree(artifact, folder, ignore=left_out, dirs_exist_ok=True)
        write_packed_graph(artifact / GRAPH, folder / GRAPH)
        write_manifest(folder, manifest.model_copy(update={"files": hash_files(folder)}))


def write_packed_graph(model: Path, out: Path) -> None:
    """Writes a graph as onnxruntime has it in memory once it is open, with a file of weights beside it.

    Raises:
        ArtifactError: onnxruntime cannot load it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(out)
    for name, value in {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": PACKED,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(LEAST_BYTES),
    }.items():
        options.add_session_config_entry(name, value)
    try:
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise artifact_error("onnxruntime cannot load the graph", error, str(model)) from error


def main(arguments: list[str]) -> int:
    """Writes a packed copy; the exit code is that of `kvslim`."""
    try:
        write_packed(*map(Path, arguments))
    except KvslimError as error:
        sys.stderr.write(f"error: {error.message}\n  where: {error.where}\n  fix: {error.fix}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
