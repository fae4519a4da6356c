"""The types of what commands print with `--json`, and their JSON Schemas."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import BaseModel, Field, create_model

from kvslim.bundle.archive import Bundle
from kvslim.cli.console import schema_id
from kvslim.cli.machine import Check
from kvslim.contract import Frozen
from kvslim.devices.limits import Limits
from kvslim.devices.profile import Device
from kvslim.errors import NotFoundError, suggestion
from kvslim.measures import GateResult, Report
from kvslim.planning.analyze import Analysis
from kvslim.planning.decide import PlanSummary
from kvslim.recipe import Recipe
from kvslim.report.compare import Comparison, Regression
from kvslim.report.memory import CacheMemory
from kvslim.runtime.completion import Usage
from kvslim.sweep.outcomes import Failure, Outcomes
from kvslim.validation.bench import BenchResult
from kvslim.validation.tasks import TaskScores

DEVICES = "with --device: what it allows with the plain cache, and with this one"


class Compressed(Report):
    """The report of a new artifact."""

    artifact_folder: str
    devices: tuple[Limits, ...] = Field((), description=DEVICES)


class Planned(PlanSummary):
    """What `compress` would decide, and the cache it would give."""

    devices: tuple[Limits, ...] = Field((), description=DEVICES)


class Compared(Comparison):
    """Artifacts side by side, and what is worse than a baseline."""

    regressions: tuple[Regression, ...] | None = Field(description="null without a baseline")


class Benched(Frozen):
    """Timings, energy, bytes, memory and what drafts gain, by path."""

    artifacts: dict[str, BenchResult]


class Scored(Frozen):
    """Scores by task, and the gates on them."""

    passed: bool
    gates: tuple[GateResult, ...]
    tasks: dict[str, TaskScores]


class Generated(Usage):
    """A prompt, the text that follows it, and counts and times."""

    prompt: str
    completion: str


class Answered(Generated):
    """A message, the answer to it, and counts and times; an object for each message, on a line."""


class Verified(Frozen):
    """All differences between an artifact and what was written."""

    ok: bool
    problems: tuple[str, ...]


class MethodOptions(Frozen):
    """A method, and its options as JSON Schema."""

    summary: str
    options: dict[str, Any]


class Methods(Frozen):
    """The methods that a recipe can name."""

    methods: dict[str, MethodOptions]


class Recipes(Frozen):
    """Recipes in full, by name."""

    recipes: dict[str, Recipe]


class Examined(Frozen):
    """Whether this machine can run KVSlim."""

    ok: bool
    checks: tuple[Check, ...]
    device: Device | None = Field(description="this machine's profile, with --measure")


class Failed(Frozen):
    """An error, in place of a result."""

    error: Failure


OUTPUTS: dict[str, type[Frozen]] = {
    "compress": Compressed,
    "plan": Planned,
    "analyze": Analysis,
    "sweep": Outcomes,
    "validate": Report,
    "eval": Scored,
    "compare": Compared,
    "bench": Benched,
    "generate": Generated,
    "chat": Answered,
    "inspect": CacheMemory,
    "verify": Verified,
    "bundle": Bundle,
    "methods": Methods,
    "recipes": Recipes,
    "doctor": Examined,
    "error": Failed,
}


def output_type(name: str) -> type[BaseModel]:
    """The type of the whole object that a command prints, with its key `schema`.

    Raises:
        NotFoundError: There is no such command.
    """
    if name not in OUTPUTS:
        raise NotFoundError(f"no schema {name!r}", where="COMMAND", fix=suggestion(name, OUTPUTS))
    identity = schema_id(name)
    key: Any = (Literal[identity], Field(alias="schema"))
    return cast("type[BaseModel]", create_model(OUTPUTS[name].__name__, __base__=OUTPUTS[name], schema_id=key))


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema of what a command prints. It allows other keys, because later versions may add some.

    Raises:
        NotFoundError: There is no such command.
    """
    schema = output_type(name).model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": schema_id(name), **_open(schema)}


def _open(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _open(item) for key, item in value.items() if (key, item) != ("additionalProperties", False)}
    return [_open(item) for item in value] if isinstance(value, list) else value
