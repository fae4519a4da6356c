"""The verbs that use an artifact, look at it, or check it."""

from __future__ import annotations

from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Artifact, Json, Threads, WeightKind
from kvslim.errors import ArtifactError


def generate(
    artifact: Artifact,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="the text to continue")] = None,
    file: Annotated[
        str | None, typer.Option(help='JSON lines, {"prompt": ...} or {"messages": [...]}; - for stdin')
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="converse; Ctrl-D ends")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the chat template")] = False,
    system: Annotated[str | None, typer.Option(help="the system message; goes with the chat template")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to write at most")] = 128,
    context: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="room in the cache, such as 16k; default: what is needed")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="sample from this many tokens; 0 for all")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="sample from the tokens that hold this share")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="seed of the sampling")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> int:
    """Continue a text, converse, or complete a file of prompts.

    Text is printed as it comes, and then on stderr what it took. Prompts of a file give one JSON object per line; a
    line that cannot be completed gives its error, and exit code 2 at the end.
    """
    from kvslim.cli.generating import Options
    from kvslim.cli.generating import generate as write
    from kvslim.cli.inputs import read_length
    from kvslim.runtime.generate import Sampling

    options = Options(
        chat=chat or system is not None,
        system=system,
        max_new_tokens=max_new_tokens,
        context=None if context is None else read_length(context, "--context"),
        sampling=Sampling(temperature, top_k, top_p, seed),
        threads=threads,
        as_json=as_json,
    )
    return write(artifact, prompt, file, interactive, options)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL|ARTIFACT", help="a model as for compress, or an artifact")],
    contexts: Annotated[str, typer.Option("--context", help="context lengths")] = "4k,16k",
    weights: Annotated[WeightKind | None, typer.Option(help="how a model's weights are stored; default: fp32")] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option("--device", help="limits of a device: a name (docs/devices.md) or a .yaml; may be repeated"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how much memory the KV cache takes, and what devices allow.

    Told from the config, or the manifest and the graph; no weights are read.
    """
    from kvslim.cli.inputs import read_lengths
    from kvslim.cli.inspect import inspect as examine
    from kvslim.devices.profile import load_device
    from kvslim.report.limits import limits_table, stages_table
    from kvslim.report.tables import contexts_table, layers_table

    lengths = read_lengths(contexts, "--context")
    memory = examine(model, lengths, weights, [load_device(name) for name in devices or ()])
    if as_json:
        console.print_json("inspect", memory.model_dump(mode="json"))
        return
    console.print_tables(layers_table(memory), contexts_table(memory))
    console.print_text(f"weights: {memory.weights_mib:,.1f} MiB, {memory.weights}\n")
    console.print_tables(limits_table(memory.devices), stages_table(memory.devices))
    longest = max(lengths)
    if longest > memory.max_context:
        console.hint(f"hint: this model was made for {memory.max_context:,} positions, fewer than {longest:,}")


def verify(artifact: Artifact, as_json: Json = False) -> int:
    """Check the files of an artifact.

    Each is compared with its SHA-256; exit code 4 when one differs, is missing or was added.
    """
    from kvslim.export.manifest import verify as problems_of

    problems = problems_of(artifact)
    if as_json:
        console.print_json("verify", {"ok": not problems, "problems": problems})
    if problems:
        error = ArtifactError("; ".join(problems), where=str(artifact), fix="compress or download it again")
        console.print_error(error)
        return error.exit_code
    if not as_json:
        console.print_text(f"{artifact}: every file is as it was written\n")
    return 0
