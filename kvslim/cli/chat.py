"""`kvslim chat`: holds a conversation."""

from __future__ import annotations

from typing import Annotated

import typer

from kvslim.cli.options import Artifact, Threads
from kvslim.cli.writing import Context, RepetitionPenalty, Seed, Speculative, Stop, Temperature, TopK, TopP


def chat(
    artifact: Artifact,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", min=1, help="tokens of an answer at most; default: no limit"),
    ] = None,
    context: Context = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    threads: Threads = None,
    speculative: Speculative = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per answer, on a line")] = False,
) -> int:
    """Hold a conversation.

    Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists what else there is. Where stdin is no terminal,
    each of its lines is a message.
    """
    from kvslim.cli.completions import Generation, Options
    from kvslim.cli.conversation import converse
    from kvslim.cli.lengths import read_length
    from kvslim.runtime.generate import Sampling
    from kvslim.runtime.stops import checked_stops

    options = Options(
        chat=False,
        system=system,
        max_new_tokens=max_new_tokens,
        context=None if context is None else read_length(context, "--context"),
        sampling=Sampling(temperature, top_k, top_p, seed, repetition_penalty),
        stops=checked_stops(stop or ()),
        threads=threads,
        speculative=speculative,
        as_json=as_json,
    )
    return converse(Generation(artifact, options))
