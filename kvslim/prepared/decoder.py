"""A decoder in memory: prepared with the slim attention, edited, exported."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np

from kvslim import stages
from kvslim.calibrate import cache
from kvslim.calibrate.recorder import Recorder
from kvslim.calibrate.recording import Recording, finish, merge
from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.contract import ModelSpec, WeightType
from kvslim.export.genai import end_tokens, genai_config
from kvslim.export.graph import build_graph, save_graph, token_inputs
from kvslim.export.opened import as_opened
from kvslim.export.prompts import branch_prompts
from kvslim.export.speculative import write_speculative_graph
from kvslim.export.transformers_js import with_transformers_js_config
from kvslim.export.weights import quantise_weights
from kvslim.loading.architecture import architecture_of
from kvslim.loading.model import load_model, load_tokenizer
from kvslim.loading.snapshot import Snapshot
from kvslim.memory import give_back
from kvslim.prepared.base import PreparedModel
from kvslim.prepared.decoder_trials import DecoderTrials
from kvslim.prepared.fitted import heal, refitted_before
from kvslim.prepared.limits import with_limits
from kvslim.prepared.text import TextSource
from kvslim.prepared.weights import changed, quantise
from kvslim.progress import Progress, Silent
from kvslim.recipe import Recipe
from kvslim.settings import TextUse, Validation
from kvslim.transform.copies import on_gpu
from kvslim.transform.edits import Codes, FittedPlan
from kvslim.transform.surgery import install, prepare
from kvslim.types import Healing, KVLayout, Plan
from kvslim.validation.measure import DecoderEvaluation
from kvslim.weight_format import WeightFormat
from kvslim.weights.rows import QuantisedRows
from kvslim.workers.base import Workers


@dataclass(frozen=True)
class WindowRecording:
    """The recording of one window after another of a calibration text.

    Attributes:
        windows: [n, length] token ids of the whole text.
        seed: Of sampled tokens.
    """

    windows: np.ndarray
    seed: int

    def open(self, prepared: PreparedDecoder) -> Callable[[int], Recording]:
        """What records the window at a place."""
        recorder = Recorder(prepared.device_model, prepared.architecture, prepared.spec, self.windows, self.seed)
        return lambda place: recorder.record(Silent(), range(place, place + 1))


class PreparedDecoder(PreparedModel):
    """A causal language model.

    Its weights are quantised first, so that whatever is fitted or measured later sees the numbers that the graph has.

    Attributes:
        text: What it is calibrated and measured on.
        workers: Who does what can be done in pieces.
        rows: What the rows of its matrices are stored as; None where that is as float32, and when it is released.
        is_quantised: Whether its weights are quantised by now.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        spec: ModelSpec,
        recipe: Recipe,
        progress: Progress,
        workers: Workers | None = None,
        texts: tuple[TextUse, ...] = (),
        made_for: Validation | None = None,
    ) -> None:
        super().__init__(snapshot, spec, recipe, progress)
        self.workers = workers or Workers()
        self.architecture = architecture_of(spec.model_type)
        self.tokenizer = load_tokenizer(snapshot)
        self.text = TextSource(self, recipe.calibration, recipe.validation, made_for)
        self.text.check(texts)
        self.rows: QuantisedRows | None = None
        self.is_quantised = False
        if self.text.is_missing(texts):
            progress.stage(stages.TEXT)
            _ = self.original
            self.free()  # onnxruntime has a copy of its own, and memory shall not hold two
            self.text.write(texts)
        if recipe.weights.is_quantised:
            _ = self.original  # while the model still is what its files say
            self.recipe = with_limits(self)
            self.rows = quantise(self)
            self.is_quantised = True
            vars(self).pop("device_model", None)  # a copy would have the numbers of before
            give_back()

    @cached_property
    def model(self) -> Any:
        """The model in torch, loaded when it is first needed."""
        model = load_model(self.snapshot)
        prepare(model, self.architecture, self.spec)
        return model

    @cached_property
    def device_model(self) -> Any:
        """The model that text passes through: a copy on a GPU where torch sees one with room, or the model itself."""
        return on_gpu(self.model, self.architecture)

    @cached_property
    def original(self) -> Path:
        """A folder with the graph of the model in float32; it is removed with the model."""
        folder = Path(tempfile.mkdtemp(prefix="kvslim-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.export_plain(folder)
        return folder

    @property
    def weights_identity(self) -> tuple[Any, ...]:
        """The recipe's format once the weights are quantised, with what else decides the formats that are picked."""
        weights = self.recipe.weights if self.is_quantised else WeightFormat()
        text = self.text.identity if weights.needs_text else None
        return weights.model_dump(), text, changed(self.recipe) if weights.picks else None

    @property
    def weights_like(self) -> WeightType:
        """The format whose products take about as long: that of most numbers."""
        if self.rows is None:
            return self.recipe.weights.like
        numbers = Counter[int]()
        for matrix in self.rows.matrices:
            numbers[matrix.bits] += matrix.codes.size * 8 // matrix.bits
        return "int8" if numbers[8] > numbers[4] else "int4"

    @cached_property
    def statistics(self) -> CalibrationStatistics:
        """Statistics of the calibration text, from the disk when they were gathered before."""
        settings = self.recipe.calibration
        context = settings.target(self.spec)
        key = cache.content_key(self.digest, context, *self.text.identity, *self.weights_identity)
        statistics = cache.load_statistics(key)
        if statistics is None:
            statistics = self._gathered(context, settings.seed)
            give_back()
            cache.store_statistics(key, statistics)
        return statistics

    def _gathered(self, context: int, seed: int) -> CalibrationStatistics:
        windows = self.text.calibration_windows
        self.progress.stage(stages.CALIBRATE)
        parts = self.workers.map(self, WindowRecording(windows, seed), range(len(windows)))
        tracked = self.progress.track(parts, "windows", len(windows))
        whole = replace(reduce(merge, tracked), windows=windows)  # what comes from another process cannot be written to
        return finish(whole, context=context, loss_mask=self.text.calibration_mask())

    def codes(self, plan: Plan) -> Codes:
        """What a plan puts into the model; what takes long to fit is taken from the disk when it was fitted before."""
        if not any(layer.refit for layer in plan.layers):
            return super().codes(plan)
        return refitted_before(self, plan, super().codes)

    def healed(self, fitted: FittedPlan) -> tuple[FittedPlan, Healing | None]:
        """The plan with weights trained to its codes, where the recipe asks for that."""
        if self.recipe.heal is None or all(code.is_empty for code in fitted.codes):
            return fitted, None
        self.progress.stage(stages.HEAL)
        return heal(self, fitted, self.recipe.heal)

    def trials(self) -> DecoderTrials:
        """Trials on the part of the calibration text that nothing is fitted to."""
        return DecoderTrials(self)

    def evaluation(self) -> DecoderEvaluation:
        """Held-out windows and recall questions."""
        windows = self.text.held_out_windows
        long_text = self.text.long_text(windows)
        return DecoderEvaluation(
            [*windows, *([] if long_text is None else [long_text])],
            self.text.held_out_items(windows, long_text),
            self.recipe.validation,
            self.recipe.gates,
            self.context,
            self.recipe.timed_prompts(self.spec),
            self.recipe.timed_contexts(self.spec),
            self.original if self.is_quantised else None,
            self.progress,
            self.recipe.draft,
            self.workers,
        )

    def install(self, codes: Codes) -> None:
        """Puts codes into the model, for good."""
        install(self.model, self.architecture, codes)

    def build_plain(self, folder: Path) -> None:
        """Exports the graph of the model as it is."""
        self.export(Plan.identity(self.spec), folder)

    def export(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        """Writes the graph of the model as it is, which `plan` describes; its inputs other than the cache."""
        graph = build_graph(self.model, self.architecture, KVLayout.of(self.spec, plan), self.progress, self.rows)
        branch_prompts(graph)  # takes sums of values into the branches, where they stay in float32
        if self.rows is not None:
            quantise_weights(graph, self.rows)
        as_opened(graph)
        save_graph(graph, folder)
        return token_inputs(graph)

    def release(self) -> None:
        """Frees the memory of the model and of its blocks."""
        self.rows = None
        super().release()

    def free(self) -> None:
        """Gives the memory of the model's weights back to the system."""
        vars(self).pop("device_model", None)
        super().free()

    def write_companions(self, folder: Path, layout: KVLayout, inputs: tuple[str, ...]) -> None:
        """Writes tokenizer, configs and, where it can open the graph, what onnxruntime-genai needs."""
        # transformers.js finds a chat template in tokenizer_config.json alone, the other clients there or beside it.
        self.tokenizer.save_pretrained(folder, save_jinja_files=False)
        config_json = with_transformers_js_config(self.snapshot.config())
        (folder / "config.json").write_text(config_json, encoding="utf-8")
        generation = self._generation_config()
        # `save_pretrained` refuses what models often have: numbers for sampling, and no `do_sample`.
        generation.to_json_file(folder / "generation_config.json")
        if self.recipe.draft != "none":
            write_speculative_graph(folder)
        if layout.needs_own_runtime or not layout.is_even:
            return
        config = genai_config(self.spec, layout, generation.to_dict(), inputs=inputs)
        (folder / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _generation_config(self) -> Any:
        """The model's generation config, with every token that ends a text."""
        generation = copy.deepcopy(self.model.generation_config)
        ends = end_tokens(generation.eos_token_id, self.tokenizer.eos_token_id, self.spec.vocab_size)
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
        return generation
