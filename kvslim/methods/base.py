"""What a compression method is, and the registry that recipes, the command line and the docs read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from kvslim.contract import ModelSpec
from kvslim.errors import UsageError, suggestion
from kvslim.types import Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.transform.edits import LayerEdit

METHODS: dict[str, type[Method]] = {}


class Method(BaseModel):
    """A method is its own recipe entry: its fields are its options, one file holds all of it.

    `check` uses the config alone and runs before weights are loaded; `decide` and `apply` are pure. Methods run by
    `order`, whatever the order of the recipe: what changes the cached coordinates comes before what rounds them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    summary: ClassVar[str]
    order: ClassVar[int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        METHODS[cls.name] = cls

    def check(self, spec: ModelSpec) -> None:
        """Refuses options that this model cannot take.

        Raises:
            UsageError: An option is impossible for a model of this spec.
        """

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """The plan with this method's decisions, their scores and reasons filled in."""
        raise NotImplementedError

    def apply(
        self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: tuple[LayerEdit, ...]
    ) -> tuple[LayerEdit, ...]:
        """The edit of every layer after this method, given those of the methods before it."""
        raise NotImplementedError


def method_class(name: str, where: str) -> type[Method]:
    """The registered method of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}", where=where, fix=suggestion(name, METHODS))
    return METHODS[name]
