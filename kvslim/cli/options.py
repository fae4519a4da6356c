"""Options and arguments that verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def _recipes(typed: str) -> list[str]:
    """The shipped recipes, for shell completion."""
    from kvslim.recipe import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(typed)]


def _devices(typed: str) -> list[str]:
    """The shipped devices, for shell completion."""
    from kvslim.devices.profile import shipped_devices

    return [name for name in shipped_devices() if name.startswith(typed)]


def _gates(typed: str) -> list[str]:
    """The gates, for shell completion."""
    from kvslim.settings import Gates

    return [f"{name}=" for name in Gates.model_fields if name.startswith(typed)]


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
    typer.Option(
        "--recipe",
        "-r",
        autocompletion=_recipes,
        help="a shipped recipe or a file; default: balanced, or with a budget the gates of small",
    ),
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
WeightKind = Literal["fp32", "int8", "int4"]  # that of contract.py, whose import would slow down the help
WeightWord = Annotated[
    Literal["fp32", "int8", "int4", "stored"] | None,
    typer.Option("--weights", help="how weights are stored; stored: the blocks of a GGUF; default: the recipe's"),
]
DraftWord = Annotated[
    Literal["auto", "lookup", "window", "none"] | None,
    typer.Option("--draft", help="what proposes tokens, for faster text that stays the model's; default: the recipe's"),
]
FileMib = Annotated[
    float | None,
    typer.Option("--file-mib", help="pick bits and blocks of each matrix (int4 to int8) to lose least in such a file"),
]
FileRatio = Annotated[
    float | None, typer.Option("--file-ratio", help="the same, as how many times smaller than the export in fp32")
]
MemoryAt = Annotated[
    str | None,
    typer.Option(
        "--memory-mib",
        metavar="TOKENS=MIB",
        help="budget: MiB of memory at a context, such as 16k=300, shared by int4 weights and cache",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="SOURCE",
        help="text of your task: self, a .txt or .jsonl file, or hub:DATASET[:SPLIT]",
    ),
]
TargetContext = Annotated[
    str | None, typer.Option("--context", metavar="TOKENS", help="the context that it is for, such as 16k")
]
HeldOut = Annotated[
    str | None,
    typer.Option(
        "--validation",
        metavar="SOURCE",
        help="text to measure on: self, a .txt or .jsonl file, or hub:DATASET[:SPLIT]",
    ),
]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        autocompletion=_devices,
        help="budget: what this device has room for at --context (docs/devices.md), or a .yaml file",
    ),
]
Speed = Annotated[
    float | None,
    typer.Option("--tokens-per-second", min=0.001, help="budget: what decoding on --device is to reach at least"),
]
WorkerCount = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="measure in so many processes beside each other (extra `ray`)"),
]
RayAddress = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="the Ray cluster that they are on; default: this machine")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Healing = Annotated[
    str | None,
    typer.Option(
        "--heal", metavar="TIME", help="train weights to the compressed cache for so long: 10m, or a number of steps"
    ),
]
GateLimits = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="NAME=LIMIT",
        autocompletion=_gates,
        help="add a gate, or replace one of the recipe; repeatable",
    ),
]
Junit = Annotated[Path | None, typer.Option(help="write the gates to this file as JUnit XML")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of one operator; default: onnxruntime's choice")]
