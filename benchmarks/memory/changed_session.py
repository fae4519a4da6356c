"""Answers once in a way that is not quite ours, and prints MiB: its own once open; at the end, and the peak.

    python -m benchmarks.memory.changed_session CHANGE FOLDER CONTEXT LOGITS

The logits after the prompt go to the file LOGITS.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.memory.answer import CHUNK, answer
from kvslim.validation.rss import own_peak_mib

AS_REQUESTED = "an arena that grows by what is asked for"
STORED = "weights stored packed"
CHANGES = {
    "nothing": {},
    "no arena": {"enable_cpu_mem_arena": False},
    "no arena, no memory pattern": {"enable_cpu_mem_arena": False, "enable_mem_pattern": False},
    "weights outside the arena": {"session.use_device_allocator_for_initializers": "1"},
    AS_REQUESTED: {"session.use_env_allocators": "1"},
    "weights not packed": {"session.disable_prepacking": "1"},
    STORED: {},
    "chunks of 256": {},
    "chunks of 128": {},
    "chunks of 64": {},
}


def own_mib() -> float:
    """Memory of this process in MiB, without pages of files."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 2**10


def store_packed(graph: Path, folder: Path) -> Path:
    """Writes a graph to a new folder as onnxruntime has it once open, its weights packed for this processor."""
    folder.mkdir()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "model.onnx")
    for name, value in {
        "save_external_prepacked_constant_initializers": "1",
        "optimized_model_external_initializers_file_name": "model.onnx_data",
        "optimized_model_external_initializers_min_size_in_bytes": "1024",
    }.items():
        options.add_session_config_entry(f"session.{name}", value)
    ort.InferenceSession(graph / "model.onnx", options, providers=["CPUExecutionProvider"])
    return folder


def main(change: str, folder: str, context: str, logits: str) -> None:
    """Opens every session of this process with the change."""
    plain = ort.InferenceSession

    def session(model: Any, options: ort.SessionOptions, **others: Any) -> ort.InferenceSession:
        for name, value in CHANGES[change].items():
            if "." in name:
                options.add_session_config_entry(name, value)
            else:
                setattr(options, name, value)
        made = plain(model, options, **others)
        print(own_mib(), flush=True)  # a run may end the process
        return made

    if change == AS_REQUESTED:
        place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(place, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
    ort.InferenceSession = session
    chunk = int(change.split()[-1]) if change.startswith("chunks") else CHUNK
    np.save(logits, answer(Path(folder), int(context), chunk))
    print(own_mib(), own_peak_mib())


if __name__ == "__main__":
    main(*sys.argv[1:])
