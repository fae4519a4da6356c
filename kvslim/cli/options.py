"""Options and arguments that verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="demo, a model or LoRA folder, a .gguf file, or on the hub org/name or org/name:FILE.gguf, with @revision",
    ),
]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="a folder that `kvslim compress` wrote")]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="a shipped recipe or a file; default: balanced, or small with a budget"),
]
Ratio = Annotated[
    float | None, typer.Option("--kv-ratio", help="budget: how many times smaller than the plain fp32 cache")
]
MibAt = Annotated[
    str | None,
    typer.Option("--kv-mib-at", metavar="TOKENS=MIB", help="budget: MiB of the cache at a context, such as 16k=64"),
]
TimeRatio = Annotated[
    float | None, typer.Option("--time-ratio", help="budget: expected time per token as a share of plain, such as 0.7")
]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="budget: mean KL to the plain model, nats per token")]
MaxDrop = Annotated[float | None, typer.Option("--max-recall-drop", help="budget: recall lost, in percentage points")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a key of the recipe")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
GateLimits = Annotated[
    list[str] | None,
    typer.Option("--gate", metavar="NAME=LIMIT", help="add a gate, or replace one of the recipe; repeatable"),
]
Junit = Annotated[Path | None, typer.Option(help="write the gates to this file as JUnit XML")]
WeightKind = Literal["fp32", "int8", "int4"]  # the same as types.WeightType, whose import would slow down the help
Threads = Annotated[int | None, typer.Option(min=1, help="threads of one operator; default: onnxruntime's choice")]
