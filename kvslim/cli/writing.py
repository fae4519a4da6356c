"""Options of the verbs that write text."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Context = Annotated[
    str | None,
    typer.Option(metavar="TOKENS", help="capacity of the cache, such as 16k; default: what the artifact is for"),
]
Temperature = Annotated[float, typer.Option(min=0, help="0 always takes the most likely token")]
TopK = Annotated[int, typer.Option(min=0, help="sample from this many tokens; 0 for all")]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="sample from the most likely tokens that together have this probability")
]
Seed = Annotated[int, typer.Option(min=0, help="seed of the sampling")]
RepetitionPenalty = Annotated[float, typer.Option(help="above 1, tokens of the text so far become less likely")]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="end the answer before this text; repeat it for more")
]
Speculative = Annotated[
    Literal["auto", "none"],
    typer.Option(help="auto: the artifact's draft, if it has one, proposes tokens where that saves time"),
]
