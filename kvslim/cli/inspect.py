"""`kvslim inspect`: shows how much memory a KV cache takes, and what devices allow."""

from __future__ import annotations

from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Json, WeightKind


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL|ARTIFACT", help="a model (as for compress) or an artifact")],
    contexts: Annotated[
        str | None, typer.Option("--context", help="context lengths; default: 4k,16k, at most all of its positions")
    ] = None,
    weights: Annotated[
        WeightKind | None, typer.Option(help="how a model stores its weights; default: as compress")
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--device", help="show the limits of a device: a name (docs/devices.md) or a .yaml file; repeatable"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how much memory the KV cache takes, and what devices allow.

    Reads the config, or the manifest and the graph, and no weights. With --device the last lines answer: what fits at
    each context, and how fast it is at best.
    """
    from kvslim.cli.lengths import read_lengths
    from kvslim.devices.profile import load_device, shipped_devices
    from kvslim.report.draft import draft_note
    from kvslim.report.inspect import inspect as memory_of
    from kvslim.report.limits import answers, limits_table, stages_table
    from kvslim.report.matrices import formats_line
    from kvslim.report.tables import caches_table, layers_table

    lengths = None if contexts is None else read_lengths(contexts, "--context")
    memory = memory_of(model, lengths, weights, [load_device(name) for name in dict.fromkeys(devices or ())])
    if as_json:
        console.print_json("inspect", memory.model_dump(mode="json"))
        return
    console.print_tables(layers_table(memory), caches_table(memory))
    promise = "; the cache of a recipe takes at most the bytes above" if memory.recipes else ""
    console.print_text(f"weights: {memory.weights_mib:,.1f} MiB, {memory.weights}{promise}\n")
    if memory.matrices:
        console.print_text(f"stored as: {formats_line(memory.matrices)}\n")
    if memory.draft:
        console.print_text(f"{draft_note(memory.speculation) or f'draft: {memory.draft.kind}'}\n")
    console.print_tables(stages_table(memory), limits_table(memory))
    console.print_text("".join(f"{line}\n" for line in answers(memory)))
    if memory.refusal:
        console.hint(f"warning: compress refuses it: {memory.refusal}")
    if memory.layers and not devices:
        console.hint(f"hint: --device says what fits and how fast it is: {', '.join(shipped_devices())}")
    longest = max(map(int, memory.mib))
    if longest > memory.max_context:
        console.hint(f"hint: this model was made for {memory.max_context:,} positions, fewer than {longest:,}")
