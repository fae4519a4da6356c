"""What a compression method is, and the registry that recipes, the command line and the docs read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, model_validator

from kvslim.contract import ModelSpec
from kvslim.errors import UsageError, suggestion
from kvslim.types import Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.trials import Trials
    from kvslim.recipe import Recipe
    from kvslim.transform.edits import Codes

METHODS: dict[str, type[Method]] = {}


class Conflict(NamedTuple):
    """What a method cannot stand beside: a message, where the recipe has it, and how to fix it."""

    message: str
    where: str
    fix: str


class Method(BaseModel):
    """A method is its own recipe entry: its fields are its options, one file holds all of it.

    `check` and `conflicts` use config and recipe alone and run before weights are loaded; `resolve` may measure the
    model; `decide` and `apply` are pure. Methods run by `order`, whatever the order of the recipe: what changes the
    cached coordinates comes before what rounds them.

    Attributes:
        supports_encoders: Whether it works without a cache, from `HeadStatistics` alone.
        needs_gqa: What it needs that layout attention24 does not have; empty for nothing.
        stores_cache: Whether it chooses how the cache is stored.
        either: Options of which one may be given; empty where all go together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    summary: ClassVar[str]
    order: ClassVar[int]
    supports_encoders: ClassVar[bool] = False
    needs_gqa: ClassVar[str] = ""
    stores_cache: ClassVar[bool] = False
    either: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        METHODS[cls.name] = cls

    @model_validator(mode="after")
    def _gives_either(self) -> Self:
        given = [option for option in self.either if getattr(self, option) is not None]
        if len(given) > 1:
            raise ValueError(f"give {' or '.join(given)}, not both")
        return self

    def check(self, spec: ModelSpec) -> None:
        """Refuses options that this model cannot take.

        Raises:
            UsageError: An option is impossible for a model of this spec.
        """

    def conflicts(self, others: Sequence[Method], recipe: Recipe) -> Iterator[Conflict]:
        """What it cannot stand beside in a recipe: other methods, the layout, lengths of text.

        Args:
            others: The other methods of the recipe.
            recipe: All of it.
        """
        if self.needs_gqa and recipe.layout == "attention24":
            yield Conflict(
                f"layout attention24 has no {self.needs_gqa}", f"recipe: methods.{self.name}", "use layout gqa"
            )

    def resolve(self, trials: Trials) -> Method:
        """The method with what it leaves open measured, each choice alone on the model as it is.

        Raises:
            KvslimError: No choice is good enough.
        """
        return self

    def keeps_weights(self, *, refits: bool) -> bool:
        """Whether the matrices of the model stay as they are; of rounded ones, changed rows are stored in 8 bits.

        Args:
            refits: Whether output projections are fitted again where that pays.
        """
        return False

    @property
    def packs_cache(self) -> bool:
        """Whether it packs codes of tokens that leave a window."""
        return False

    @property
    def takes_attention(self) -> bool:
        """Whether any layer may lose its whole attention."""
        return False

    @property
    def picks_heads(self) -> bool:
        """Whether it takes heads that it chooses among all layers."""
        return False

    @property
    def windowed_layers(self) -> tuple[int, ...] | None:
        """Layers that forget the tokens behind a window; None where that may be any."""
        return ()

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """The plan with this method's decisions, their scores and reasons filled in."""
        raise NotImplementedError

    def apply(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: Codes) -> Codes:
        """The edit of every layer after this method, given those of the methods before it."""
        raise NotImplementedError


def check_layers(layers: Iterable[int], spec: ModelSpec, where: str) -> None:
    """Refuses layers that the model does not have.

    Raises:
        UsageError: Naming `where` they stand.
    """
    beyond = next((layer for layer in layers if not 0 <= layer < spec.layers), None)
    if beyond is not None:
        message = f"the model has {spec.layers} layers, not a layer {beyond}"
        raise UsageError(message, where=where, fix=f"use 0 to {spec.layers - 1}")


def method_class(name: str, where: str) -> type[Method]:
    """The registered method of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}", where=where, fix=suggestion(name, METHODS))
    return METHODS[name]
