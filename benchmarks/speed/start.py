"""How long a person waits after typing a command: from the start of a process to the first token."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.page_cache import drop
from benchmarks.quality.recipes import SHORT
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.rows import Row
from benchmarks.subjects import ROOT, Source
from kvslim.packages import small_install
from kvslim.pipeline import compress
from kvslim.recipe import load_recipe

PROMPT_TOKENS = 16
TEXT = "The lamp in the window of the house by the river was red, and everybody in the town knew whose it was."
TABLE = Table(
    (
        Column("until", "ms from the start of a process until"),
        Column("warm_ms", "warm files", ".0f"),
        Column("cold_ms", "cold files", ".0f"),
    )
)
# What `kvslim generate` does up to its first token, one step after another. Each run ends after one of them.
STEPS = {
    "Python runs": "",
    "the command's modules are imported": "from kvslim.cli import app, completions, prompt_file",
    "the tokenizer is loaded": "from kvslim.runtime.generate import load_tokenizer; load_tokenizer(folder)",
    "the graph is open": "from kvslim.runtime.session import DecodeSession; DecodeSession(folder, capacity=32)",
}
START = "import sys; from pathlib import Path; folder = Path(sys.argv[1])"
END = "print('ready', flush=True)"


def table(rows: Sequence[Row]) -> str:
    """One line per step."""
    return TABLE(rows)


@benchmark("smollm2", table=table, quick={"rounds": 1, "overrides": SHORT})
def start(
    source: Source, *, rounds: int = 7, overrides: tuple[str, ...] = (*SHORT, "weights=int4")
) -> Iterator[Values]:
    """From the start of a process to the first token of a prompt of 16, with int4 weights and an int8 cache.

    Steps take turns, and medians are shown. For cold files the system is asked to drop those of the artifact, of Python
    and of the packages from its page cache before each run; a run that reads them again from a fast disk is not much
    slower.
    """
    artifact = source.folder / "artifact"
    compress(source.model, load_recipe("lossless", overrides), artifact)
    prompt = first_tokens(artifact)
    commands = {
        **{until: [sys.executable, "-c", script, str(artifact)] for until, script in scripts().items()},
        "`kvslim generate` prints its first token": [
            *[sys.executable, "-m", "kvslim.cli.app", "generate", str(artifact), "--prompt", prompt],
            *["--max-new-tokens", "1"],
        ],
        "`examples/generate.py` prints it": [
            sys.executable,
            str(ROOT / "examples" / "generate.py"),
            str(artifact),
            prompt,
            "1",
        ],
    }
    files = [*installed_files(), *artifact.iterdir()]
    taken: dict[tuple[str, str], list[float]] = {(until, key): [] for until in commands for key in ("warm", "cold")}
    for _ in range(rounds):
        for until, command in commands.items():
            first_byte_ms(command)
            taken[until, "warm"].append(first_byte_ms(command))
            drop(files)
            taken[until, "cold"].append(first_byte_ms(command))
    for until in commands:
        yield {"until": until, **{f"{key}_ms": float(np.median(taken[until, key])) for key in ("warm", "cold")}}


def scripts() -> dict[str, str]:
    """A program for each step, which says when it and those before it are done."""
    lines = [START]
    found = {}
    for until, step in STEPS.items():
        lines.append(step)
        found[until] = "\n".join([*lines, END])
    return found


def first_tokens(artifact: Path) -> str:
    """A text of `PROMPT_TOKENS` tokens."""
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    extra = len(tokenizer.encode("").ids)
    return str(tokenizer.decode(ids[: PROMPT_TOKENS - extra]))


def first_byte_ms(command: Sequence[str]) -> float:
    """Milliseconds from starting a command to the first byte that it prints."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        taken = (time.perf_counter() - started) * 1e3
        process.stdout.read()
    if process.returncode or not first:
        raise RuntimeError(f"{command[:4]} ended with {process.returncode}")
    return taken


def installed_files() -> Iterator[Path]:
    """The files of Python's library, of the small install, and of KVSlim."""
    yield from Path(sysconfig.get_path("stdlib")).glob("*.py")
    yield from Path(sysconfig.get_path("stdlib")).glob("__pycache__/*.pyc")
    for pin in small_install():
        yield from (Path(str(file.locate())) for file in metadata.files(pin.partition("==")[0]) or [])
    yield from (ROOT / "kvslim").rglob("*.py*")
