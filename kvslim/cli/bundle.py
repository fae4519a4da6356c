"""`kvslim bundle`: one file with an artifact and all that runs it without a network."""

from __future__ import annotations

import platform as system
import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Artifact, Json
from kvslim.cli.progress import Terminal

HERE = ".".join(system.python_version_tuple()[:2])


def bundle(
    artifact: Artifact,
    platform: Annotated[str, typer.Option(help="the machine that runs it: linux-aarch64 or linux-x86_64")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.tar.gz", help="the file to write")],
    python: Annotated[str, typer.Option(help="the version of Python there")] = HERE,
    as_json: Json = False,
) -> None:
    """Pack an artifact with all that runs it offline.

    Downloads the wheels of the small install for that machine with pip. There, unpack the file and type ./run: the
    first start makes a virtual environment without a network. ./run serve and ./run generate take the options of these
    commands.
    """
    from kvslim.bundle.archive import write_bundle
    from kvslim.cli.inputs import check_target

    check_target(out, "--out")
    with Terminal() as progress:
        made = write_bundle(artifact, out, platform, python, progress)
    if as_json:
        console.print_json("bundle", made.model_dump(mode="json"))
        return
    console.print_text(
        f"{out}: {made.bytes / 2**20:.1f} MiB, {len(made.wheels)} wheels for {platform}, Python {python}\n"
    )
    start = shlex.quote(f"{out.name.removesuffix('.tar.gz')}/run")
    console.print_text(f"there: tar -xf {shlex.quote(out.name)} && {start}\n")
