"""The recipe: everything that determines an artifact, apart from the model, as a typed YAML file."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, field_serializer, model_validator

from kvslim.contract import Frozen, Layout, ModelSpec
from kvslim.errors import NotFoundError, UsageError, fault_of, suggestion
from kvslim.methods import Method, method_class
from kvslim.overrides import at_fault, overridden
from kvslim.settings import Budget, Calibration, Gates, Heal, Validation, read_heal
from kvslim.types import DraftChoice
from kvslim.validation.spans import longest_distance
from kvslim.weight_format import WeightFormat, Weights
from kvslim.yaml_file import read_yaml

SHORT_CONTEXTS = (128, 1024)
SHORT_PROMPTS = (128, 512)
DEFAULT_POSITIONS = 32768
SIZES = ("max_kv_ratio", "max_kv_mib", "max_memory_mib")  # gates of which a budget in bytes takes the place


def _method(value: object) -> object:
    """`kv_quant` or `{kv_quant: {bits: 8}}` as a method."""
    if isinstance(value, Method):
        return value
    entry = {value: None} if isinstance(value, str) else value
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UsageError(
            f"a method must be a name or one `name: options` pair, not {value!r}",
            where="recipe: methods",
            fix="write `- kv_pca: {rank: 48}`",
        )
    ((name, options),) = entry.items()
    return method_class(str(name), "recipe: methods").model_validate(options or {})


Settings = TypeVar("Settings", bound=Frozen)
MethodEntry = Annotated[Method, BeforeValidator(_method)]


class Recipe(Frozen):
    """A named set of methods with their calibration, validation and gates."""

    name: str = Field(description="default: the file's name")
    description: str = Field("", description="one line for `kvslim recipes`")
    methods: tuple[MethodEntry, ...] = Field((), description="names, or `name: options` pairs; see below")
    budget: Budget | None = Field(
        None, description="limits for the planner, which then picks the methods; leave `methods` empty"
    )
    compensate: bool = Field(True, description="refit projections where that helps on held-out text")
    weights: Weights = WeightFormat()
    heal: Annotated[Heal | None, BeforeValidator(read_heal)] = Field(
        None,
        description="train weights to the codes (decoders): a time such as 10m, a number of steps, or the keys below",
    )
    keep_edits: bool = Field(
        False, description="put the plan with its fitted and trained numbers into the artifact, for `--plan`"
    )
    draft: DraftChoice = Field(
        "none", description="what proposes tokens to verify: lookup, window, auto for what pays at the target context"
    )
    layout: Layout = Field(
        "gqa", description="attention operators: gqa is fused and fast, attention24 is standard ONNX"
    )
    window_cache: bool = Field(True, description="give sliding-window layers a cache of their window's size")
    positions: int | None = Field(
        None, ge=8, description="longest context that the artifact takes; default: twice the target, at least 32,768"
    )
    calibration: Calibration = Calibration()
    validation: Validation = Validation()
    gates: Gates = Gates()

    @model_validator(mode="after")
    def _one_way(self) -> Recipe:
        if self.budget is not None and self.methods:
            raise ValueError("give methods or a budget, not both")
        if self.positions is not None and self.positions < (self.calibration.context or 0):
            raise ValueError("positions are fewer than calibration.context")
        return self

    @property
    def splits_memory(self) -> bool:
        """Whether weights and cache share a budget of memory."""
        return self.budget is not None and self.budget.memory_mib is not None

    @property
    def decides(self) -> bool:
        """Whether its methods or its budget decide anything about the cache."""
        return self.budget is not None or bool(self.methods)

    @property
    def is_calibrated(self) -> bool:
        """Whether anything is fitted to the calibration text, or trained on it."""
        return self.decides or self.weights.needs_text or self.heal is not None

    @property
    def ordered_methods(self) -> list[Method]:
        """The methods in the order they run."""
        return sorted(self.methods, key=lambda method: method.order)

    def timed_prompts(self, spec: ModelSpec) -> tuple[int, ...]:
        """Lengths of prompts that a decoder is timed at, or of texts that an encoder is timed at."""
        if self.validation.prompts is not None:
            return self.validation.prompts
        if spec.is_encoder:
            return tuple(length for length in SHORT_PROMPTS if length <= spec.max_context) or (spec.max_context,)
        return up_to(min(self.calibration.target(spec), spec.max_context), SHORT_PROMPTS)

    def timed_contexts(self, spec: ModelSpec) -> tuple[int, ...]:
        """Contexts that a token of a decoder is timed at; all positions mean the last token that fits."""
        last = spec.max_context - 1
        if self.validation.contexts is not None:
            return tuple(last if context == spec.max_context else context for context in self.validation.contexts)
        return up_to(min(self.calibration.target(spec), last), SHORT_CONTEXTS)

    def fitted(self, spec: ModelSpec) -> ModelSpec:
        """A decoder's shape with the positions that the artifact is to have; the graph stores RoPE of each."""
        if spec.is_encoder:
            return spec
        wanted = self.positions or max(DEFAULT_POSITIONS, 2 * self.calibration.target(spec))
        most = min(spec.max_context, wanted)
        windows = tuple(None if window is not None and window >= most else window for window in spec.windows)
        return spec.model_copy(update={"max_context": most, "windows": windows})

    def shortened_to(self, spec: ModelSpec) -> Recipe:
        """This recipe with the defaults that a model has positions for; what somebody set stays as it is."""
        most = spec.max_context
        reach = longest_distance(most)
        validation = shortened(self.validation, length=most, recall_distance=reach)
        return self.model_copy(
            update={"calibration": shortened(self.calibration, length=most), "validation": validation}
        )

    def settled(self, spec: ModelSpec, *, has_blocks: bool) -> Recipe:
        """This recipe with the weights' format decided where it is `auto`.

        Args:
            spec: The model's shape.
            has_blocks: Whether its files have blocks that the graph can hold.
        """
        weights = self.weights.settled(is_encoder=spec.is_encoder, has_blocks=has_blocks and not self.splits_memory)
        return self.model_copy(update={"weights": weights})

    def unsized(self, name: str) -> Recipe:
        """What this recipe asks of quality, under another name: without gates of sizes."""
        return self.model_copy(update={"name": name, "gates": self.gates.model_copy(update=dict.fromkeys(SIZES))})

    def within(self, budget: Budget) -> Recipe:
        """This recipe with the planner in place of its methods.

        Every limit of the budget is a gate. The gates of quality stay where the budget has no limit of its own, and a
        size in the budget takes the place of the recipe's. A limit in MiB counts at the target context.

        Raises:
            UsageError: The budget counts MiB at another context than the recipe's target.
        """
        limits = {
            "max_kl": budget.max_kl,
            "max_recall_drop": budget.max_recall_drop,
            "max_time_ratio": budget.time_ratio,
            "max_kv_ratio": None if budget.kv_ratio is None else 1 / budget.kv_ratio,
            "max_kv_mib": budget.kv_mib,
            "max_memory_mib": budget.memory_mib,
        }
        asked = {name: limit for name, limit in limits.items() if limit is not None}
        gates = self.gates if asked.keys().isdisjoint(SIZES) else self.gates.model_copy(update=dict.fromkeys(SIZES))
        target = self.calibration.context or budget.context
        if budget.context not in (None, target):
            raise UsageError(
                f"the budget counts bytes at {budget.context:,} tokens, and the target context is {target:,}",
                where=budget.place(budget.size or "context"),
                fix="give one context for both",
            )
        planned = {
            "methods": (),
            "budget": budget,
            "gates": gates.model_copy(update=asked),
            "calibration": self.calibration.model_copy(update={"context": target}),
        }
        return self.model_copy(update=planned).described()

    def described(self) -> Recipe:
        """This recipe with a description that says no more than what it asks for."""
        if self.budget is not None:
            text = f"Chosen by the planner: {self.budget}."
        elif self.methods:
            text = f"By {', '.join(method.name for method in self.methods)}."
        else:
            text = f"Weights in {self.weights}, and no other change."
        return self.model_copy(update={"description": text})

    def gated(self, gates: Gates) -> Recipe:
        """This recipe; gates that are set replace its own."""
        return self.model_copy(update={"gates": self.gates.model_copy(update=gates.model_dump(exclude_none=True))})

    @field_serializer("methods")
    def _dump_methods(self, methods: tuple[Method, ...]) -> list[dict[str, Any]]:
        return [{method.name: method.model_dump(mode="json")} for method in methods]


def shortened(settings: Settings, **limits: int) -> Settings:
    """Settings with defaults no longer than their limits; of several lengths those that fit, or else the limit."""
    found: dict[str, Any] = {}
    for name in limits.keys() - settings.model_fields_set:
        value, limit = getattr(settings, name), limits[name]
        several = isinstance(value, tuple)
        shorter = tuple(length for length in value if length <= limit) or (limit,) if several else min(value, limit)
        if shorter != value:
            found[name] = shorter
    return settings.model_copy(update=found)


def up_to(target: int, shorter: Iterable[int]) -> tuple[int, ...]:
    """A length to measure at, behind those of some others that are shorter."""
    return (*(length for length in shorter if length < target), target)


def recipe_folder() -> Path:
    """The shipped recipes: in the wheel beside the code, in a checkout at the top level."""
    packaged = Path(str(resources.files("kvslim"))) / "recipes"
    return packaged if packaged.is_dir() else packaged.parent.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with KVSlim, by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """A shipped recipe by name or a recipe file by path, with `--set key.path=value` overrides applied.

    Raises:
        NotFoundError: There is no such recipe.
        UsageError: It is not YAML, or a key or value is wrong.
    """
    shipped = shipped_recipes()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise NotFoundError(f"no recipe {name!r}", where="--recipe", fix=suggestion(name, shipped))
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UsageError(
            "a recipe must be a mapping of keys to values", where=str(path), fix="start from `kvslim recipes balanced`"
        )
    data = {"name": path.stem, **data}
    changes = tuple(overrides)
    try:
        recipe = parse_recipe(overridden(data, changes), where=str(path))
    except UsageError as error:
        parse_recipe(data, where=str(path))  # raises if the file alone is at fault
        blamed = at_fault(data, changes, partial(parse_recipe, where=str(path)))
        where = " ".join(f"--set {override}" for override in blamed)
        raise UsageError(error.message, where=where, fix=error.fix) from error
    changed = {change.partition("=")[0].partition(".")[0] for change in changes}
    told = {"methods", "budget"} if recipe.decides else {"methods", "budget", "weights"}
    return recipe.described() if changed & told and "description" not in changed else recipe


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """Plain data as a typed recipe.

    Raises:
        UsageError: A key is unknown or a value out of range; the error names all of them.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(_fault(fault, data) for fault in error.errors())
        raise UsageError(
            faults, where=where, fix="see `kvslim recipes` and docs/recipes.md for keys and ranges"
        ) from error


def _fault(fault: Any, data: dict[str, Any]) -> str:
    parts = list(fault["loc"])
    if parts[:1] == ["methods"] and len(parts) > 2:  # the name of a method says more than its place in the list
        entry = data["methods"][parts[1]]
        parts[1] = entry if isinstance(entry, str) else next(iter(entry))
    return fault_of({**fault, "loc": parts}, "recipe")
