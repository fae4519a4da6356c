"""`kvslim generate`: continues a text, or completes a file of prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from kvslim.cli.options import Artifact, Json, Threads
from kvslim.cli.writing import RepetitionPenalty, Seed, Speculative, Stop, Temperature, TopK, TopP
from kvslim.errors import UsageError


def generate(
    artifact: Artifact,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="the text to continue")] = None,
    file: Annotated[
        str | None, typer.Option(help='JSON lines, {"prompt": ...} or {"messages": [...]}; - for stdin')
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="send the prompt through the chat template")] = False,
    system: Annotated[str | None, typer.Option(help="the system message; implies --chat")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="generate at most this many tokens")
    ] = 128,
    context: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="capacity of the cache, such as 16k; default: what is needed")
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="complete this many prompts of --file at once")] = 1,
    threads: Threads = None,
    speculative: Speculative = "auto",
    as_json: Json = False,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", hidden=True)] = False,
) -> int:
    """Continue a text, or complete a file of prompts.

    Text is printed as it is generated, then counts and speed on stderr. A file of prompts gives one JSON object per
    line; a line that cannot be completed gives its error, and the exit code is 2 at the end.
    """
    from kvslim.cli.completions import Generation, Options, complete
    from kvslim.cli.lengths import read_length
    from kvslim.cli.prompt_file import complete_file
    from kvslim.runtime.generate import Sampling
    from kvslim.runtime.stops import checked_stops

    if interactive:
        fix = f"`kvslim chat {artifact}`"
        raise UsageError("conversations have a verb of their own", where="--interactive", fix=fix)
    options = Options(
        chat=chat,
        system=system,
        max_new_tokens=max_new_tokens,
        context=None if context is None else read_length(context, "--context"),
        sampling=Sampling(temperature, top_k, top_p, seed, repetition_penalty),
        stops=checked_stops(stop or ()),
        threads=threads,
        speculative=speculative,
        as_json=as_json,
    )
    _check_sources(prompt, file, batch)
    generation = Generation(artifact, options)
    return complete_file(generation, file, batch) if file is not None else complete(generation, prompt or "")


def _check_sources(prompt: str | None, file: str | None, batch: int) -> None:
    if (prompt is None) == (file is None):
        raise UsageError("there is nothing to continue", where="generate", fix="give one of --prompt and --file")
    if prompt == "":
        raise UsageError("the prompt is empty", where="--prompt", fix="give some text to continue")
    if batch > 1 and file is None:
        raise UsageError("a batch needs a file of prompts", where="--batch", fix="give --file, or leave out --batch")
