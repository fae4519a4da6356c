"""Answers once in a way that is not quite ours, and prints MiB: its own once open, at the end, and the peak.

python -m benchmarks.memory.changed_session CHANGE FOLDER CONTEXT
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from benchmarks.memory.answer import CHUNK, answer
from kvslim.validation.rss import own_peak_mib

AS_REQUESTED = "an arena that grows by what is asked for"
CHANGES = {
    "nothing": {},
    "no arena": {"enable_cpu_mem_arena": False},
    "no arena, no memory pattern": {"enable_cpu_mem_arena": False, "enable_mem_pattern": False},
    "weights outside the arena": {"session.use_device_allocator_for_initializers": "1"},
    AS_REQUESTED: {"session.use_env_allocators": "1"},
    "weights not packed": {"session.disable_prepacking": "1"},
    "chunks of 256": {},
    "chunks of 128": {},
    "chunks of 64": {},
}


def own_mib() -> float:
    """Memory of this process in MiB, without pages of files."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 2**10


def main(change: str, folder: str, context: str) -> None:
    """Opens every session of this process with the change."""
    opened: list[float] = []
    plain = ort.InferenceSession

    def session(model: Any, options: ort.SessionOptions, **others: Any) -> ort.InferenceSession:
        for name, value in CHANGES[change].items():
            if "." in name:
                options.add_session_config_entry(name, value)
            else:
                setattr(options, name, value)
        made = plain(model, options, **others)
        opened.append(own_mib())
        return made

    if change == AS_REQUESTED:
        place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(place, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
    ort.InferenceSession = session
    answer(Path(folder), int(context), int(change.split()[-1]) if change.startswith("chunks") else CHUNK)
    print(opened[0], own_mib(), own_peak_mib())


if __name__ == "__main__":
    main(*sys.argv[1:])
