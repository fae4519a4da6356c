"""Peak memory of decoding at a context, taken in a process that does nothing else.

    python -m kvslim.validate.rss MODEL CONTEXT [THREADS]

prints MiB: the interpreter, onnxruntime, the weights, a cache of CONTEXT tokens, and one decoded token.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from kvslim.errors import ArtifactError
from kvslim.runtime.session import DecodeSession


def peak_rss(model: Path, context: int, threads: int | None = None) -> float:
    """Peak resident memory of a fresh process that decodes one token at a context, in MiB.

    Args:
        model: The `.onnx` file, or the folder that holds `model.onnx`.
        context: Tokens in the cache.
        threads: Threads of one operator; None leaves the choice to onnxruntime.

    Raises:
        ArtifactError: The process failed.
    """
    arguments = [str(model), str(context), *([] if threads is None else [str(threads)])]
    command = [sys.executable, "-m", "kvslim.validate.rss", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise ArtifactError(
            f"measuring memory failed (exit {result.returncode}): {lines[-1] if lines else 'no message'}",
            where=str(model),
            fix=f"run `python -m kvslim.validate.rss {' '.join(arguments)}` to see why",
        )
    return float(result.stdout)


def own_peak_mib() -> float:
    """Peak resident memory of this process in MiB.

    On Linux `ru_maxrss` survives exec, so that a small child of a large parent reports the parent; `VmHWM` does not.
    """
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) / 2**10
    # Imported here because Windows has no such module.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main(arguments: list[str]) -> None:
    """Decodes one token at a context and prints the peak in MiB."""
    model, context, *threads = arguments
    session = DecodeSession(Path(model), capacity=int(context) + 1, threads=int(threads[0]) if threads else None)
    session.fill(int(context))
    session.step([0])
    sys.stdout.write(f"{own_peak_mib()}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
