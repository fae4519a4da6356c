"""Runs the commands named in README.md and docs/ and puts what they print in place.

    python tools/write_tables.py [FILE ...]

A table stands between `<!-- table: COMMAND -->` and `<!-- end -->`; no number in it is written by hand.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrites the named files, by default README.md and every page in docs/."""
    files = [Path(name) for name in sys.argv[1:]] or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for path in files:
        text = path.read_text(encoding="utf-8")
        path.write_text(TABLE.sub(_filled, text), encoding="utf-8")


def _filled(match: re.Match[str]) -> str:
    command = shlex.split(match[2])
    command[0] = sys.executable if command[0] == "python" else str(Path(sys.executable).with_name(command[0]))
    print(f"$ {match[2]}", file=sys.stderr)
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return f"{match[1]}\n{output.strip()}\n\n{match[3]}"


if __name__ == "__main__":
    main()
