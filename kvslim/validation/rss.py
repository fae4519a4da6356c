"""Peak memory of one use of a model, measured in a process that does nothing else.

    python -m kvslim.validation.rss decode|encode MODEL TOKENS BATCH [THREADS]

prints MiB: the interpreter, onnxruntime, the weights, and for each of BATCH sequences either a cache of TOKENS with one
decoded token, or one text of TOKENS encoded.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

from kvslim.errors import ArtifactError
from kvslim.runtime.encoder import EncoderSession
from kvslim.runtime.session import DecodeSession

Use = Literal["decode", "encode"]


def peak_rss(model: Path, tokens: int, threads: int | None = None, use: Use = "decode", batch: int = 1) -> float:
    """Peak resident memory of a fresh process that decodes one token at a context or encodes one text, in MiB.

    Args:
        model: The `.onnx` file, or the folder that holds `model.onnx`.
        tokens: Tokens in the cache, or of the text.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        use: Whether to decode or to encode.
        batch: Sequences per batch.

    Raises:
        ArtifactError: The process failed.
    """
    arguments = [use, str(model), str(tokens), str(batch), *([] if threads is None else [str(threads)])]
    command = [sys.executable, "-m", "kvslim.validation.rss", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise ArtifactError(
            f"measuring memory failed (exit {result.returncode}): {lines[-1] if lines else 'no message'}",
            where=str(model),
            fix=f"run `python -m kvslim.validation.rss {' '.join(arguments)}` to see why",
        )
    return float(result.stdout)


def own_peak_mib() -> float:
    """Peak resident memory of this process in MiB.

    On Linux `ru_maxrss` survives exec, so a small child of a large parent would report the parent's peak. `VmHWM` does
    not.
    """
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) / 2**10
    # imported here because Windows does not have it
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main(arguments: list[str]) -> None:
    """Uses a model once and prints the peak in MiB."""
    use, model, tokens, batch, *threads = arguments
    run = {"decode": _decode, "encode": _encode}[use]
    run(Path(model), int(tokens), int(batch), int(threads[0]) if threads else None)
    sys.stdout.write(f"{own_peak_mib()}\n")


def _decode(model: Path, context: int, batch: int, threads: int | None) -> None:
    session = DecodeSession(model, capacity=context + 1, threads=threads, batch=batch)
    session.fill(context)
    session.step([0])


def _encode(model: Path, length: int, batch: int, threads: int | None) -> None:
    EncoderSession(model, threads=threads).embed([[0] * length] * batch)


if __name__ == "__main__":
    main(sys.argv[1:])
