"""Runs the commands named in README.md and docs/ and puts what they print in place.

    python tools/write_tables.py [--render] [--match TEXT] [FILE ...]

A table stands between `<!-- table: COMMAND -->` and `<!-- end -->`; no number in it is written by hand. With `--render`
nothing is measured: tables of benchmarks come from the rows of their last runs, and all others stay as they are. With
`--match` only tables whose command holds the text are written.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
BENCHMARK = ["python", "-m", "benchmarks"]


def main() -> None:
    """Rewrites the named files, by default README.md and every page in docs/."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--match", default="", metavar="TEXT", help="only tables whose command holds this")
    arguments = parser.parse_args()
    filled = partial(_filled, render=arguments.render, match=arguments.match)
    for path in arguments.files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        path.write_text(TABLE.sub(filled, text), encoding="utf-8")


def _filled(found: re.Match[str], *, render: bool, match: str) -> str:
    command = shlex.split(found[2])
    if match not in found[2] or (render and command[: len(BENCHMARK)] != BENCHMARK):
        return found[0]
    command[0] = sys.executable if command[0] == "python" else str(Path(sys.executable).with_name(command[0]))
    command += ["--render"] if render else []
    print(f"$ {found[2]}", file=sys.stderr)
    result = subprocess.run(command, cwd=ROOT, check=not render, stdout=subprocess.PIPE, text=True)
    return f"{found[1]}\n{result.stdout.strip()}\n\n{found[3]}" if result.returncode == 0 else found[0]


if __name__ == "__main__":
    main()
