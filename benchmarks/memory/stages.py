"""Compresses a model, and prints a line of JSON for each stage: its seconds, and its peaks of memory.

    python -m benchmarks.memory.stages MODEL RECIPE FOLDER

The recipe is JSON. Linux alone can tell the peak of one stage.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from kvslim.pipeline import compress
from kvslim.progress import Silent
from kvslim.recipe import parse_recipe
from kvslim.validation.rss import own_peak_mib

STEP = 0.05  # seconds between two looks at the memory
STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET = "5"  # what makes the system forget the peak so far


class Stages(Silent):
    """Prints a line when a stage ends."""

    def __init__(self) -> None:
        self._name, self._started, self._own = "start", time.monotonic(), 0.0
        threading.Thread(target=self._look, daemon=True).start()

    def stage(self, name: str) -> None:
        """Ends the stage before, and begins another."""
        seconds = time.monotonic() - self._started
        values = {"stage": self._name, "seconds": seconds, "peak_mib": own_peak_mib(), "own_mib": self._own}
        print(json.dumps(values), flush=True)
        PEAK.write_text(RESET)
        self._name, self._started, self._own = name, time.monotonic(), 0.0

    def expect(self, stages: Mapping[str, float]) -> None:
        """Nothing is foretold."""

    def _look(self) -> None:
        """Follows the memory of this process without pages of files."""
        while True:
            found = re.search(r"RssAnon:\s+(\d+)", STATUS.read_text(encoding="utf-8"))
            assert found is not None
            self._own = max(self._own, int(found[1]) / 2**10)
            time.sleep(STEP)


if __name__ == "__main__":
    stages = Stages()
    compress(sys.argv[1], parse_recipe(json.loads(sys.argv[2]), where="benchmark"), Path(sys.argv[3]), progress=stages)
    stages.stage("end")
