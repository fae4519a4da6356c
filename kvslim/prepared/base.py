"""A model in memory, ready to be measured, edited and exported: what the pipeline asks of every kind of model."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvslim.contract import ModelSpec
from kvslim.errors import UnsupportedError, UsageError
from kvslim.export.manifest import MANIFEST
from kvslim.loading.architecture import Architecture
from kvslim.loading.snapshot import Snapshot
from kvslim.measures import Report
from kvslim.memory import give_back
from kvslim.progress import Progress
from kvslim.recipe import Recipe, parse_recipe
from kvslim.settings import TextUse
from kvslim.types import Healing, KVLayout, Plan
from kvslim.workers.base import Workers

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.trials import Trials
    from kvslim.transform.edits import Codes, FittedPlan


class Evaluation(Protocol):
    """Held-out material, and how artifacts are measured on it."""

    def measure(self, plain: Path, artifact: Path) -> Report:
        """What an artifact costs and saves next to the plain export of its model, gates judged."""


class PreparedModel(ABC):
    """A model with the slim attention, which computes what the original does until it is edited.

    Attributes:
        snapshot: The model's files.
        spec: Its shape.
        recipe: What is to be made.
        progress: Receives the progress.
        digest: SHA-256 of the model's files.
        model: The model in torch.
        architecture: Where its parts live.
        tokenizer: Its tokenizer.
    """

    model: Any
    architecture: Architecture
    tokenizer: Any

    def __init__(self, snapshot: Snapshot, spec: ModelSpec, recipe: Recipe, progress: Progress) -> None:
        self.snapshot, self.spec = snapshot, spec
        self.recipe = recipe
        self.progress = progress
        self.digest = snapshot.sha256

    @cached_property
    @abstractmethod
    def statistics(self) -> CalibrationStatistics:
        """Statistics of the calibration text, gathered when they are first asked for."""

    def codes(self, plan: Plan) -> Codes:
        """What a plan puts into the model, one entry per layer; no text is read for one that changes nothing."""
        from kvslim.transform.edits import LayerEdit

        if plan.changes_nothing:
            return tuple(LayerEdit() for _ in plan.layers)
        return self.trials().codes(plan)

    @property
    def context(self) -> int:
        """The target context in tokens."""
        return self.recipe.calibration.target(self.spec)

    @property
    def made_for(self) -> str:
        """SHA-256 of the model's files and of how its weights are stored: what fitted numbers go with."""
        from kvslim.calibrate.cache import content_key

        return content_key("made for", self.digest, self.weights_identity)

    def check_given(self, plan: Plan | FittedPlan | None) -> None:
        """Refuses numbers that were fitted for another model.

        Raises:
            UsageError: Naming the plan.
        """
        if plan is not None and not isinstance(plan, Plan) and plan.made_for != self.made_for:
            raise UsageError(
                "its numbers were fitted for another model, or for weights that are stored in another way",
                where="--plan",
                fix="give that model and the same weights (with a limit of the file, the same recipe), or a plan.json",
            )

    def fitted(self, plan: Plan) -> FittedPlan:
        """A plan with its codes."""
        from kvslim.transform.edits import FittedPlan

        return FittedPlan(plan, self.codes(plan), self.made_for)

    def healed(self, fitted: FittedPlan) -> tuple[FittedPlan, Healing | None]:
        """The plan with weights trained to its codes, where the recipe asks for that and there is anything to heal."""
        return fitted, None

    def keep(self, fitted: FittedPlan, folder: Path) -> None:
        """Writes the plan with its numbers into an artifact, where the recipe asks for that."""
        if self.recipe.keep_edits:
            from kvslim.transform.edit_file import NAME, save_fitted

            save_fitted(folder / NAME, fitted)

    @abstractmethod
    def trials(self) -> Trials:
        """Trials of the model on calibration text; they hold on to what they measured."""

    @abstractmethod
    def evaluation(self) -> Evaluation:
        """Held-out material; the model must not be edited yet, as it may write the text itself."""

    @abstractmethod
    def install(self, codes: Codes) -> None:
        """Edits the model, for good."""

    def export_plain(self, folder: Path) -> None:
        """Writes the graph that artifacts are compared with, or fetches it from the disk; the model must be unedited.

        Args:
            folder: An empty folder.
        """
        from kvslim.export.stored import fetch_graph, graph_key, store_graph

        key = graph_key(self.digest, self.spec.model_dump(), *self.weights_identity)
        if not fetch_graph(key, folder):
            self.build_plain(folder)
            store_graph(key, folder)

    @property
    @abstractmethod
    def weights_identity(self) -> tuple[Any, ...]:
        """What decides the numbers that the model computes with now, as far as its files do not; JSON-able."""

    @abstractmethod
    def build_plain(self, folder: Path) -> None:
        """Exports the graph that artifacts are compared with."""

    @abstractmethod
    def export(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        """Writes the graph of the model as it is, which `plan` describes; its inputs other than the cache."""

    @abstractmethod
    def write_companions(self, folder: Path, layout: KVLayout, inputs: tuple[str, ...]) -> None:
        """Writes what clients read beside the graph: tokenizer and configs."""

    def release(self) -> None:
        """Frees the model's memory; nothing more can be made from it."""
        vars(self).pop("statistics", None)
        self.free()

    def free(self) -> None:
        """Gives the memory of the model's weights back to the system."""
        vars(self).pop("model", None)
        gc.collect()  # modules and the hooks on them refer to each other
        give_back()


def texts_for(plan: Plan | FittedPlan | None, recipe: Recipe) -> tuple[TextUse, ...]:
    """The texts that an artifact needs: where numbers are given, none to fit them to, but one to train them on."""
    is_fitted = plan is not None and not isinstance(plan, Plan)
    return ("validation",) if is_fitted and recipe.heal is None else ("calibration", "validation")


def prepare(
    snapshot: Snapshot,
    spec: ModelSpec,
    recipe: Recipe,
    progress: Progress,
    workers: Workers | None = None,
    texts: tuple[TextUse, ...] = (),
    made_as: dict[str, Any] | None = None,
) -> PreparedModel:
    """The model in memory, of the kind that its spec says.

    Args:
        snapshot: Its files.
        spec: Its shape.
        recipe: What is to be made.
        progress: Receives the progress.
        workers: Who does what can be done in pieces; None for this process.
        texts: Which texts a decoder shall write now, where it is their source.
        made_as: The recipe of the artifact that is measured again, maybe on another text; None for this one.

    Raises:
        ModelError: Weights or tokenizer cannot be read.
        UnsupportedError: There are workers, and the model is an encoder.
    """
    if spec.is_encoder:
        if workers is not None and workers.are_apart:
            raise UnsupportedError(
                f"{spec.model_type} is an encoder, and workers share the work of decoders alone",
                where="--workers",
                fix="leave it out",
            )
        from kvslim.prepared.encoder import PreparedEncoder

        return PreparedEncoder(snapshot, spec, recipe, progress)
    from kvslim.prepared.decoder import PreparedDecoder

    made_for = None if made_as is None else parse_recipe(made_as, where=MANIFEST).validation
    return PreparedDecoder(snapshot, spec, recipe, progress, workers, texts, made_for)
