"""One model in memory, prepared with the slim attention, and all that the pipeline makes of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvslim.calibrate import cache
from kvslim.calibrate.corpus import (
    CALIBRATION_SHARE,
    VALIDATION_SHARE,
    WHOLE,
    counted_windows,
    self_windows,
    source_digest,
    text_windows,
)
from kvslim.calibrate.recorder import collect
from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.calibrate.taylor import taylor_scores
from kvslim.contract import ModelSpec
from kvslim.demo.world import recall_questions
from kvslim.export.genai import end_tokens, genai_config
from kvslim.export.graph import build_graph, save_graph, token_inputs
from kvslim.export.transformers_js import with_transformers_js_config
from kvslim.export.weights import quantise_weights
from kvslim.load.architecture import architecture_of
from kvslim.load.model import load_model, load_tokenizer
from kvslim.load.source import Snapshot
from kvslim.methods import ClusterHeads, KvWindow, Method, PruneHeads, PruneLayers, ShareKv
from kvslim.methods.fitting import fit
from kvslim.methods.share_kv import distances
from kvslim.plan.analyze import Analysis, analyze
from kvslim.plan.candidates import SINKS
from kvslim.plan.choose import Chosen, choose
from kvslim.plan.decode_time import DecodeTime
from kvslim.plan.lazy import laziest
from kvslim.plan.planner import Planner
from kvslim.plan.probes import FORMAT as PROBES_FORMAT
from kvslim.plan.probes import Probes
from kvslim.plan.probing import Prober
from kvslim.plan.refit import refit_as_planned, refit_where_it_pays
from kvslim.plan.trials import PlanTrials
from kvslim.plan.windows import WindowTrials
from kvslim.progress import Progress
from kvslim.recipe import Budget, Calibration, Recipe, Validation
from kvslim.transform.compensate import refitted
from kvslim.transform.edits import LayerEdit
from kvslim.transform.judge import Judge, RecallTrials, judged_windows, probe_windows
from kvslim.transform.surgery import install, layer_modules, prepare
from kvslim.types import KVLayout, Plan
from kvslim.validate.measure import Evaluation
from kvslim.validate.recall import RecallItem, repeated_spans

REFIT_TOKENS = 4_096, 12_288  # for many layers, for few
TAYLOR_TOKENS = 8_192
RECALL_ITEMS, LAZY_ITEMS = 50, 8


class Workshop:
    """Holds a model; see the methods for what is made from it.

    Attributes:
        snapshot: The model's files.
        spec: Its shape.
        recipe: What is to be made.
        digest: SHA-256 of the model's files.
    """

    def __init__(self, snapshot: Snapshot, spec: ModelSpec, recipe: Recipe, progress: Progress) -> None:
        self.snapshot, self.spec, self.recipe, self.progress = snapshot, spec, recipe, progress
        self.architecture = architecture_of(spec.model_type)
        self.tokenizer = load_tokenizer(snapshot)
        self.digest = snapshot.sha256()
        self.model = load_model(snapshot)
        self.original = prepare(self.model, self.architecture, spec)

    def statistics(self) -> CalibrationStatistics:
        """Statistics of the calibration text, from the disk when they were gathered before."""
        settings = self.recipe.calibration
        context = settings.target(self.spec)
        share = CALIBRATION_SHARE if self._shared_text() else WHOLE
        key = cache.content_key(self.digest, settings.model_dump(), source_digest(settings.source), context, share)
        statistics = cache.load_statistics(key)
        if statistics is None:
            windows = self._windows(settings, share)
            statistics = collect(
                self.model,
                self.architecture,
                self.spec,
                windows,
                context=context,
                seed=settings.seed,
                progress=self.progress,
                loss_mask=self._loss_mask(settings, share),
            )
            cache.store_statistics(key, statistics)
        return statistics

    def _loss_mask(self, settings: Calibration, share: tuple[float, float]) -> np.ndarray | None:
        """Which tokens of the calibration windows count; None for all."""
        if settings.source == "self":
            return None
        return counted_windows(
            settings.source, self.tokenizer, samples=settings.samples, length=settings.length, share=share
        )

    def codes(self, statistics: CalibrationStatistics, plan: Plan) -> tuple[LayerEdit, ...]:
        """What a plan puts into the model, one entry per layer."""
        codes = fit(self.spec, statistics, plan, self.recipe.methods)
        return refit_as_planned(plan, codes, lambda codes: self.refitted(statistics, codes))

    def chosen(self, statistics: CalibrationStatistics, held_out: Judge, budget: Budget) -> Chosen:
        """The planner's choice for a budget."""
        planner = self.planner(statistics, held_out, budget.context, budget.time_ratio)
        trials = self._recall_trials(statistics, held_out, RECALL_ITEMS)
        return choose(planner, budget, lambda planned: trials.drop(self.codes(statistics, planned.plan)))

    def held_out_judge(self, statistics: CalibrationStatistics) -> Judge:
        """The judge on that part of the calibration text which nothing is fitted to."""
        windows, counted = (
            judged_windows(_split(array)[1], self.spec.vocab_size)
            for array in (statistics.windows, statistics.loss_mask)
        )
        return Judge(self.model, self.architecture, windows, counted, probing=True)

    def planner(
        self,
        statistics: CalibrationStatistics,
        held_out: Judge,
        context: int | None = None,
        time_ratio: float | None = None,
    ) -> Planner:
        """A planner of what was probed; bytes and time count at a context, by default the target."""
        context = context or self.recipe.calibration.target(self.spec)
        probes = self.probes(statistics, held_out, context, timed=time_ratio is not None)
        time = self.decode_time(context)
        return Planner(self.spec, statistics, self._identity(), time, probes, held_out.kl, time_ratio)

    def probes(self, statistics: CalibrationStatistics, held_out: Judge, context: int, *, timed: bool) -> Probes:
        """What was measured of the layers at a context, from the disk when they were probed before."""
        key = self._probes_key(statistics, held_out, context, timed=timed)
        probes = cache.load_probes(key)
        if probes is None:
            probes = self._prober(statistics, held_out, context, key, timed=timed).probe(self.progress)
            cache.store_probes(probes)
        return probes

    def _probes_key(self, statistics: CalibrationStatistics, held_out: Judge, context: int, *, timed: bool) -> str:
        """Hash of all that decides what probes measure; of a budget only its context and whether it limits time."""
        recipe, asked = self.recipe, {"seed", "recall_items", "recall_distance"}
        made = recipe.weights.type, recipe.layout, recipe.window_cache, recipe.validation.model_dump(include=asked)
        of = self.digest, statistics.digest(), held_out.length, context, timed
        return cache.content_key("probes", PROBES_FORMAT, *of, *made)

    def _prober(
        self, statistics: CalibrationStatistics, held_out: Judge, context: int, key: str, *, timed: bool
    ) -> Prober:
        windows, loss_mask = (
            probe_windows(_split(array)[0], self.spec.layers) for array in (statistics.windows, statistics.loss_mask)
        )
        judge = Judge(self.model, self.architecture, windows, loss_mask, probing=True)
        seen = min(held_out.length, 2 * (self.recipe.validation.recall_distance - SINKS))
        recall = self._recall_trials(statistics, held_out, LAZY_ITEMS)
        return Prober(
            self.spec,
            statistics,
            self.decode_time(context),
            judge.kl,
            WindowTrials(seen, held_out.kl, recall.drop),
            PlanTrials(
                self._identity(),
                lambda plan: judge.kl(fit(self.spec, statistics, plan)),
                lambda plan: recall.drop(fit(self.spec, statistics, plan)),
            ),
            timed,
            key,
        )

    def decode_time(self, context: int) -> DecodeTime:
        """What a token costs after so many others."""
        layers = layer_modules(self.model, self.architecture)
        attention = tuple(_matrix_numbers(layer.get_submodule(self.architecture.attention)) for layer in layers)
        others = tuple(_matrix_numbers(layer) - own for layer, own in zip(layers, attention, strict=True))
        head = self.spec.vocab_size * self.spec.hidden_size
        return DecodeTime(self.spec, context, self.recipe.weights.type, attention, others, head)

    def measured_recipe(self, statistics: CalibrationStatistics, held_out: Judge) -> Recipe:
        """The recipe with the layers that windows go to, and the heads that go, where it leaves them to measuring."""
        methods = tuple(self._measured(method, statistics, held_out) for method in self.recipe.methods)
        return self.recipe.model_copy(update={"methods": methods})

    def _measured(self, method: Method, statistics: CalibrationStatistics, held_out: Judge) -> Method:
        """A method with what it leaves to measuring filled in."""
        if isinstance(method, KvWindow) and method.lazy:
            trials = self._recall_trials(statistics, held_out, LAZY_ITEMS)
            return laziest(method, self.spec, held_out.kl, trials.drop, self.progress)
        if isinstance(method, PruneHeads) and method.score == "taylor" and method.is_measured:
            scores = self.taylor(statistics)
            return method.chosen(self.spec, lambda layer, gone: float(scores[layer, list(gone)].sum()))
        if isinstance(method, PruneHeads) and method.is_measured:
            return method.chosen(
                self.spec,
                lambda layer, gone: held_out.kl(self.without(statistics, PruneHeads(heads={layer: gone}))),
                lambda layers: self.progress.track(layers, "layers to lose heads"),
            )
        if isinstance(method, ClusterHeads) and method.count:
            return method.chosen(
                self.spec,
                statistics,
                lambda clusters: held_out.kl(self.without(statistics, clusters)),
                lambda layers: self.progress.track(layers, "layers to cluster heads in"),
            )
        if isinstance(method, PruneLayers) and method.is_measured:
            return method.chosen(
                self.spec,
                lambda gone: held_out.kl(self.without(statistics, PruneLayers(layers=dict(gone)))),
                lambda steps: self.progress.track(steps, "parts of layers to go"),
            )
        if isinstance(method, ShareKv) and method.layers:
            near = distances(self.spec, statistics, self._identity())
            return method.chosen(
                {pair: distance.key + distance.value for pair, distance in near.items()},
                lambda sources: held_out.kl(self.without(statistics, ShareKv(sources=sources))),
                lambda layers: self.progress.track(layers, "layers to lose their cache"),
            )
        return method

    def without(
        self, statistics: CalibrationStatistics, method: PruneHeads | PruneLayers | ClusterHeads | ShareKv
    ) -> tuple[LayerEdit, ...]:
        """Codes of the model without the heads, layers or caches that a method takes, and else as it is."""
        return fit(self.spec, statistics, method.decide(self.spec, statistics, self._identity()))

    def _identity(self) -> Plan:
        """The plan that changes nothing."""
        return Plan.identity(self.spec, self.recipe.layout, self.recipe.window_cache)

    def taylor(self, statistics: CalibrationStatistics) -> np.ndarray:
        """Taylor scores of query heads, on some of the text that serves for fitting; see `taylor_scores`."""
        windows, counted = (_split(array)[0] for array in (statistics.windows, statistics.loss_mask))
        count = max(1, TAYLOR_TOKENS // windows.shape[1])
        return taylor_scores(self.model, self.architecture, self.spec, windows[:count], counted[:count], self.progress)

    def analysis(self, statistics: CalibrationStatistics) -> Analysis:
        """What the calibration text needs of the model."""
        held_out = self.held_out_judge(statistics)
        return analyze(
            self.spec,
            statistics,
            self.taylor(statistics),
            self.recipe.calibration.source,
            lambda method: held_out.kl(self.without(statistics, method)),
            self.progress,
        )

    def compensated(self, statistics: CalibrationStatistics, held_out: Judge, plan: Plan) -> tuple[Plan, float]:
        """The plan with its projections fitted again where that pays, and its divergence on held-out text."""
        codes = self.codes(statistics, plan)
        if not self.recipe.compensate:
            return plan, held_out.kl(codes)
        return refit_where_it_pays(plan, codes, held_out.kl, lambda codes: self.refitted(statistics, codes))

    def refitted(self, statistics: CalibrationStatistics, codes: tuple[LayerEdit, ...]) -> tuple[LayerEdit, ...]:
        """The codes with projections fitted to them, on some of the text that serves for fitting."""
        fitting, _ = _split(statistics.windows)
        tokens = min(max(REFIT_TOKENS[0], 2**17 // self.spec.layers), REFIT_TOKENS[1])
        count = max(1, tokens // fitting.shape[1])
        layers = lambda layers: self.progress.track(layers, "layers refitted")  # noqa: E731
        return refitted(self.model, self.architecture, codes, fitting[:count], layers)

    def _recall_trials(self, statistics: CalibrationStatistics, judge: Judge, count: int) -> RecallTrials:
        """Recall questions other than those of the validation."""
        settings = self.recipe.validation
        fewer = {"seed": settings.seed + 1, "recall_items": min(settings.recall_items, count)}
        return RecallTrials(judge, self._recall_items(statistics.windows, settings.model_copy(update=fewer)))

    def install(self, codes: tuple[LayerEdit, ...]) -> None:
        """Puts codes into the model, for good."""
        install(self.model, self.architecture, codes)

    def export(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        """Writes the graph of the model as it is, which `plan` describes; its inputs other than the cache."""
        graph = build_graph(self.model, self.architecture, KVLayout.of(self.spec, plan))
        quantise_weights(graph, self.recipe.weights)
        save_graph(graph, folder)
        return token_inputs(graph)

    def write_companions(self, folder: Path, layout: KVLayout, inputs: tuple[str, ...]) -> None:
        """Writes tokenizer, configs and, where it can open the graph, what onnxruntime-genai needs."""
        # transformers.js finds a chat template in tokenizer_config.json alone, the other clients there or beside it.
        self.tokenizer.save_pretrained(folder, save_jinja_files=False)
        config_json = with_transformers_js_config(self.snapshot.path / "config.json")
        (folder / "config.json").write_text(config_json, encoding="utf-8")
        generation = self._generation_config()
        generation.save_pretrained(folder)
        if layout.needs_own_runtime or not layout.is_even:
            return
        config = genai_config(self.spec, layout, generation.to_dict(), inputs=inputs)
        (folder / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def release(self) -> None:
        """Frees the model's memory; nothing more can be made from it."""
        del self.model, self.original

    def _generation_config(self) -> Any:
        """The model's generation config, with every token that ends a text."""
        generation = copy.deepcopy(self.model.generation_config)
        ends = end_tokens(generation.eos_token_id, self.tokenizer.eos_token_id, self.spec.vocab_size)
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
        return generation

    def evaluation(self) -> Evaluation:
        """Held-out windows and recall questions; the model must not have codes yet, as it may write them itself."""
        settings = self.recipe.validation
        windows = self._windows(settings, VALIDATION_SHARE if self._shared_text() else WHOLE)
        return Evaluation(windows, self._recall_items(windows, settings))

    def _shared_text(self) -> bool:
        """Whether calibration and validation read one text, which is then split."""
        source = self.recipe.calibration.source
        return source != "self" and source == self.recipe.validation.source

    def _windows(self, settings: Calibration | Validation, share: tuple[float, float]) -> np.ndarray:
        held_out_stories = self.snapshot.is_demo and isinstance(settings, Validation)
        if settings.source != "self" or held_out_stories:
            return text_windows(
                settings.source,
                self.tokenizer,
                samples=settings.samples,
                length=settings.length,
                share=share,
            )
        with self.original.restored():
            return self_windows(
                self.model,
                samples=settings.samples,
                length=settings.length,
                seed=settings.seed,
                batches=lambda batches: self.progress.track(batches, "the model's own samples"),
            )

    def _recall_items(self, windows: np.ndarray, settings: Validation) -> list[RecallItem]:
        count, distance, seed = settings.recall_items, settings.recall_distance, settings.seed
        if not self.snapshot.is_demo:
            return list(repeated_spans(windows, count=count, distance=distance, seed=seed))
        questions = recall_questions(count, distance, lambda text: len(self._ids(text)), seed)
        return [RecallItem(self._ids(item.prompt), self._ids(item.answer, start=False)) for item in questions]

    def _ids(self, text: str, start: bool = True) -> tuple[int, ...]:
        encoded: Any = self.tokenizer(text, add_special_tokens=start, verbose=False)
        return tuple(encoded.input_ids)


def _matrix_numbers(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def _split(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Calibration text to fit on, and the last quarter to judge on; one window serves both."""
    held_out = max(1, len(windows) // 4)
    return windows[: max(1, len(windows) - held_out)], windows[-held_out:]
