"""One encoder in memory, and all that the pipeline makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from kvslim.calibrate.corpus import CALIBRATION_SHARE, VALIDATION_SHARE, WHOLE
from kvslim.calibrate.heads import collect_heads
from kvslim.calibrate.sentences import Sentences, mask_tokens, sentences, tokenised
from kvslim.calibrate.statistics import HeadStatistics
from kvslim.contract import ModelSpec
from kvslim.errors import ModelError, UsageError
from kvslim.export.encoder import build_encoder_graph
from kvslim.export.encoder_weights import quantise_encoder
from kvslim.export.graph import save_graph
from kvslim.load.encoders import ENCODERS
from kvslim.load.model import load_encoder, load_tokenizer
from kvslim.load.source import Snapshot
from kvslim.methods import Method, PruneHeads, PruneLayers
from kvslim.plan.refit import refit_as_planned, refit_where_it_pays
from kvslim.progress import Progress
from kvslim.recipe import Calibration, Recipe, Validation
from kvslim.transform.compensate import refitted
from kvslim.transform.edits import LayerEdit
from kvslim.transform.encoder_judge import EncoderJudge
from kvslim.transform.encoding import prepare_encoder
from kvslim.transform.surgery import install
from kvslim.types import Plan

Codes = tuple[LayerEdit, ...]
LEAST_SENTENCES = 8  # of calibration: three quarters to fit on, one to judge on


class EncoderWorkshop:
    """Holds an encoder; see the methods for what is made from it.

    Attributes:
        snapshot: The model's files.
        spec: Its shape.
        recipe: What is to be made.
        digest: SHA-256 of the model's files.
    """

    def __init__(self, snapshot: Snapshot, spec: ModelSpec, recipe: Recipe, progress: Progress) -> None:
        self.snapshot, self.spec, self.recipe, self.progress = snapshot, spec, recipe, progress
        self.tokenizer = load_tokenizer(snapshot)
        self.digest = snapshot.sha256()
        self.architecture = ENCODERS[spec.model_type]
        self.model = load_encoder(snapshot, spec)
        prepare_encoder(self.model, self.architecture)

    def calibration(self) -> tuple[Sentences, Sentences]:
        """Sentences to fit on, and the last quarter to judge on; none of them is held out.

        Raises:
            KvslimError: As `held_out`, or there are too few.
        """
        settings = self.recipe.calibration
        texts = self._texts(settings, CALIBRATION_SHARE, held_out=False)
        known = set(map(tuple, self._texts(self.recipe.validation, VALIDATION_SHARE, held_out=True)))
        texts = [text for text in texts if tuple(text) not in known]
        if len(texts) < LEAST_SENTENCES:
            raise UsageError(
                f"{len(texts)} sentences are too few to choose heads by",
                where="recipe: calibration",
                fix=f"give {LEAST_SENTENCES} or more, better some hundred (--set calibration.samples=256)",
            )
        part = len(texts) - len(texts) // 4
        return self._sentences(texts[:part], settings.seed), self._sentences(texts[part:], settings.seed)

    def held_out(self) -> Sentences:
        """Held-out sentences, masked too where the model fills masks.

        Raises:
            KvslimError: The source cannot be read, or the tokenizer of a model that fills masks has no mask token.
        """
        settings = self.recipe.validation
        return self._sentences(self._texts(settings, VALIDATION_SHARE, held_out=True), settings.seed)

    def statistics(self, fitting: Sentences) -> HeadStatistics:
        """Means and fluctuations of attention outputs, on sentences as the model is used to them."""
        texts = fitting.masked or fitting.texts
        return collect_heads(self.model.base_model, self.architecture, self.spec, texts, self.progress)

    def planned(self, fitting: Sentences, statistics: HeadStatistics, judge: EncoderJudge) -> tuple[Plan, float]:
        """The plan of the recipe's methods, and its loss on sentences that nothing is fitted to."""
        plan = Plan.identity(self.spec)
        for method in self.recipe.ordered_methods:
            plan = self._measured(method, statistics, judge).decide(self.spec, statistics, plan)
        return self.compensated(fitting, statistics, judge, plan)

    def compensated(
        self, fitting: Sentences, statistics: HeadStatistics, judge: EncoderJudge, plan: Plan
    ) -> tuple[Plan, float]:
        """The plan with its output projections fitted again where that pays, and its loss."""
        codes = self.codes(fitting, statistics, plan)
        if not self.recipe.compensate:
            return plan, judge.loss(codes)
        refit = lambda codes: self.refitted(fitting, codes)  # noqa: E731
        return refit_where_it_pays(plan, codes, judge.loss, refit, name="loss")

    def without(self, statistics: HeadStatistics, method: PruneHeads | PruneLayers) -> Codes:
        """Codes of the model without the heads or layers that a method names, and else as it is."""
        return self._pruned(statistics, method.decide(self.spec, statistics, Plan.identity(self.spec)))

    def codes(self, fitting: Sentences, statistics: HeadStatistics, plan: Plan) -> Codes:
        """What a plan puts into the model, one entry per layer."""
        codes = self._pruned(statistics, plan)
        return refit_as_planned(plan, codes, lambda codes: self.refitted(fitting, codes))

    def refitted(self, fitting: Sentences, codes: Codes) -> Codes:
        """The codes with output projections fitted to them."""
        windows = [np.asarray(text) for text in fitting.masked or fitting.texts]
        layers = lambda layers: self.progress.track(layers, "layers refitted")  # noqa: E731
        return refitted(self.model.base_model, self.architecture, codes, windows, layers)

    def judge(self, held_out: Sentences) -> EncoderJudge:
        """The judge on some sentences; the model must not have codes yet."""
        return EncoderJudge(self.model, self.architecture, held_out)

    def install(self, codes: Codes) -> None:
        """Puts codes into the model, for good."""
        install(self.model.base_model, self.architecture, codes)

    def export(self, plain: Path, folder: Path | None = None, codes: Codes = ()) -> None:
        """Writes the graph in fp32 to `plain`, and with codes and the recipe's weights to `folder` where one is given.

        The model keeps the codes.
        """
        graph = build_encoder_graph(self.model, self.spec)
        save_graph(graph, plain)
        if folder and codes:
            self.install(codes)
            graph = build_encoder_graph(self.model, self.spec)
        if folder:
            save_graph(quantise_encoder(graph, self.recipe.weights), folder)

    def write_companions(self, folder: Path) -> None:
        """Writes the tokenizer and the config."""
        self.tokenizer.save_pretrained(folder)
        shutil.copyfile(self.snapshot.path / "config.json", folder / "config.json")

    def _measured(self, method: Method, statistics: HeadStatistics, judge: EncoderJudge) -> PruneHeads | PruneLayers:
        """A method with what it leaves to measuring filled in."""
        track = lambda layers: self.progress.track(layers, "layers tried")  # noqa: E731
        if isinstance(method, PruneHeads) and method.is_measured:
            loss = lambda layer, gone: judge.loss(self.without(statistics, PruneHeads(heads={layer: gone})))  # noqa: E731
            return method.chosen(self.spec, loss, track)
        if isinstance(method, PruneLayers) and method.is_measured:
            lost = lambda gone: judge.loss(self.without(statistics, PruneLayers(layers=dict(gone))))  # noqa: E731
            return method.chosen(self.spec, lost, track)
        assert isinstance(method, PruneHeads | PruneLayers)  # check_task refuses the others
        return method

    def _pruned(self, statistics: HeadStatistics, plan: Plan) -> Codes:
        codes: Codes = tuple(LayerEdit() for _ in plan.layers)
        for method in (PruneLayers(), PruneHeads()):
            codes = method.apply(self.spec, statistics, plan, codes)
        return codes

    def _texts(self, settings: Calibration | Validation, share: tuple[float, float], held_out: bool) -> list[list[int]]:
        """Token ids of sentences; where both settings name one text, of that share of it."""
        source = settings.source
        shared = source != "self" and self.recipe.calibration.source == self.recipe.validation.source
        found = sentences(source, samples=settings.samples, share=share if shared else WHOLE, held_out=held_out)
        return tokenised(found, self.tokenizer, min(settings.length, self.spec.max_context))

    def _sentences(self, texts: list[list[int]], seed: int) -> Sentences:
        """The texts, masked too where the model fills masks."""
        if self.spec.task != "fill-mask":
            return Sentences(texts, (), ())
        if self.tokenizer.mask_token_id is None:
            raise ModelError(
                "the tokenizer has no mask token", where=str(self.snapshot.path), fix="add mask_token to its config"
            )
        return mask_tokens(texts, self.tokenizer.mask_token_id, set(self.tokenizer.all_special_ids), seed)
