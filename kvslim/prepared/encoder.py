"""An encoder in memory: prepared with the slim attention, edited, exported."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from kvslim import stages
from kvslim.calibrate.heads import collect_heads
from kvslim.calibrate.sentences import Sentences
from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.contract import ModelSpec
from kvslim.export.encoder import build_encoder_graph
from kvslim.export.encoder_weights import quantise_encoder
from kvslim.export.graph import save_graph
from kvslim.loading.encoders import ENCODERS, encoder_inputs
from kvslim.loading.model import load_encoder, load_tokenizer
from kvslim.loading.snapshot import Snapshot
from kvslim.prepared.base import PreparedModel
from kvslim.prepared.encoder_trials import EncoderTrials
from kvslim.prepared.sentences import SentenceSource
from kvslim.progress import Progress
from kvslim.recipe import Recipe
from kvslim.transform.edits import Codes
from kvslim.transform.encoding import prepare_encoder
from kvslim.transform.surgery import install, layer_modules
from kvslim.types import KVLayout, Plan
from kvslim.validation.encoder import EncoderEvaluation
from kvslim.weights.blocks import SMALLEST_BLOCK, quantise
from kvslim.weights.choice import chosen_matrices
from kvslim.weights.rows import QuantisedRows


class PreparedEncoder(PreparedModel):
    """A model that reads a whole text at once, and has no cache.

    Attributes:
        text: What it is calibrated and measured on.
    """

    def __init__(self, snapshot: Snapshot, spec: ModelSpec, recipe: Recipe, progress: Progress) -> None:
        super().__init__(snapshot, spec, recipe, progress)
        self.tokenizer = load_tokenizer(snapshot)
        self.architecture = ENCODERS[spec.model_type]
        self.text = SentenceSource(self.tokenizer, spec, snapshot.path, recipe.calibration, recipe.validation)
        self.text.check()
        self.model = load_encoder(snapshot, spec)
        prepare_encoder(self.model, self.architecture)

    @cached_property
    def calibration(self) -> tuple[Sentences, Sentences]:
        """Sentences to fit on, and others to choose by."""
        self.progress.stage(stages.CALIBRATE)
        return self.text.fitting_and_held_out()

    @cached_property
    def statistics(self) -> CalibrationStatistics:
        """Means and fluctuations of attention outputs, on sentences as the model is used to them."""
        fitting, _ = self.calibration
        texts = fitting.masked or fitting.texts
        found = collect_heads(self.model.base_model, self.architecture, self.spec, texts, self.progress)
        # Methods that support encoders read no more than `HeadStatistics`.
        return cast(CalibrationStatistics, found)

    def trials(self) -> EncoderTrials:
        """Trials on sentences that nothing is fitted to."""
        return EncoderTrials(self)

    def evaluation(self) -> EncoderEvaluation:
        """Held-out sentences."""
        lengths = self.recipe.timed_prompts(self.spec)
        return EncoderEvaluation(
            self.text.validated(), self.spec, lengths, self.recipe.validation.repeats, self.recipe.gates
        )

    def install(self, codes: Codes) -> None:
        """Puts codes into the model, for good."""
        install(self.model.base_model, self.architecture, codes)

    @property
    def weights_identity(self) -> tuple[Any, ...]:
        """Nothing: the graph alone has other weights than the files."""
        return ()

    def build_plain(self, folder: Path) -> None:
        """Exports the graph of the model as it is, in fp32."""
        save_graph(build_encoder_graph(self.model, self.spec), folder)

    def export(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        """Writes the graph of the model as it is, with the recipe's weights; its inputs."""
        graph = build_encoder_graph(self.model, self.spec)
        if self.recipe.weights.is_quantised:
            graph = quantise_encoder(graph, self.recipe.weights, self._rows())
        save_graph(graph, folder)
        return encoder_inputs(self.spec)

    def _rows(self) -> QuantisedRows:
        """The rows of the model's matrices in the recipe's weights."""
        layers, weights = layer_modules(self.model.base_model, self.architecture), self.recipe.weights
        weights = weights.model_copy(update={"block": weights.block or SMALLEST_BLOCK})
        rows = QuantisedRows()
        for entry in chosen_matrices(self.model, layers, self.architecture, weights).values():
            matrix = entry.module.weight.detach().numpy()
            rows.add(matrix, quantise(matrix, entry.to, weights.method))
        return rows

    def write_companions(self, folder: Path, layout: KVLayout, inputs: tuple[str, ...]) -> None:
        """Writes the tokenizer and the config."""
        self.tokenizer.save_pretrained(folder)
        config = json.dumps(self.snapshot.config(), indent=2) + "\n"
        (folder / "config.json").write_text(config, encoding="utf-8")
