"""`kvslim generate`: continues a text, holds a conversation, or completes a file of prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from kvslim.cli.options import Artifact, Json, Threads
from kvslim.errors import UsageError


def generate(
    artifact: Artifact,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="the text to continue")] = None,
    file: Annotated[
        str | None, typer.Option(help='JSON lines, {"prompt": ...} or {"messages": [...]}; - for stdin')
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="hold a conversation; Ctrl-D ends it")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="send the prompt through the chat template")] = False,
    system: Annotated[str | None, typer.Option(help="the system message; implies --chat")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="generate at most this many tokens")] = 128,
    context: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="capacity of the cache, such as 16k; default: what is needed")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the most likely token")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="sample from this many tokens; 0 for all")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="sample from the most likely tokens that together have this probability")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="seed of the sampling")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="above 1, tokens of the text so far become less likely")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="end the answer before this text; repeat it for more")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="complete this many prompts of --file at once")] = 1,
    threads: Threads = None,
    as_json: Json = False,
) -> int:
    """Continue a text, hold a conversation, or complete a file of prompts.

    Text is printed as it is generated, then counts and speed on stderr. A file of prompts gives one JSON object per
    line; a line that cannot be completed gives its error, and the exit code is 2 at the end.
    """
    from kvslim.cli.completions import Generation, Options, complete
    from kvslim.cli.conversation import converse
    from kvslim.cli.inputs import read_length
    from kvslim.cli.prompt_file import complete_file
    from kvslim.runtime.generate import Sampling
    from kvslim.runtime.stops import checked_stops

    options = Options(
        chat=chat or system is not None,
        system=system,
        max_new_tokens=max_new_tokens,
        context=None if context is None else read_length(context, "--context"),
        sampling=Sampling(temperature, top_k, top_p, seed, repetition_penalty),
        stops=checked_stops(stop or ()),
        batch=batch,
        threads=threads,
        as_json=as_json,
    )
    _check_sources(prompt, file, interactive, batch)
    generation = Generation(artifact, options)
    if prompt is not None:
        return complete(generation, prompt)
    return converse(generation) if file is None else complete_file(generation, file)


def _check_sources(prompt: str | None, file: str | None, interactive: bool, batch: int) -> None:
    if sum((prompt is not None, file is not None, interactive)) != 1:
        raise UsageError(
            "there is nothing to continue", where="generate", fix="give one of --prompt, --file and --interactive"
        )
    if prompt == "":
        raise UsageError("the prompt is empty", where="--prompt", fix="give some text to continue")
    if batch > 1 and file is None:
        raise UsageError("a batch needs a file of prompts", where="--batch", fix="give --file, or leave out --batch")
