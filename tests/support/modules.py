"""What a piece of code imports."""

from __future__ import annotations

import json
import subprocess
import sys

from support.paths import ROOT


def modules_after(code: str) -> set[str]:
    """The modules that are imported in a fresh process that runs some code."""
    script = f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))
