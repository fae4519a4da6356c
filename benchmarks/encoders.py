"""How benchmarks open an encoder, remove what methods say, export and judge."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.models import Codes
from benchmarks.subjects import Source
from benchmarks.texts import Text, recipe_of
from kvslim.loading.source import read_spec, resolve
from kvslim.progress import Silent
from kvslim.types import Plan
from kvslim.validation.encoder import answers


class OpenEncoder:
    """An encoder with its calibration and its plain export.

    Args:
        source: The model and its texts.
        text: How much of them; settings of a recipe's calibration and validation.
    """

    def __init__(self, source: Source, text: Text) -> None:
        from kvslim.prepared.encoder import PreparedEncoder

        snapshot = resolve(source.model)
        self._prepared = PreparedEncoder(snapshot, read_spec(snapshot), recipe_of(source, text), Silent())
        self.folder, self.spec = source.folder, self._prepared.spec
        self.held_out = self._prepared.text.validated()
        self._trials = self._prepared.trials()
        self.statistics = self._trials.statistics
        self.plain = self._export(())
        self.reference = answers(self.plain, self.held_out, batch=1)

    def loss(self, method: Any) -> float:
        """What the model loses without what a method removes, on calibration sentences."""
        return self._trials.divergence(method)

    def export(self, method: Any, *, refitted: bool = False) -> Path:
        """The graph of the encoder without what a method removes."""
        codes = self._trials.codes_of(method)
        return self._export(self._trials.refitted(codes) if refitted else codes)

    def _export(self, codes: Codes) -> Path:
        from kvslim.transform.surgery import trial

        folder, plan = Path(tempfile.mkdtemp(dir=self.folder)), Plan.identity(self.spec)
        if not codes:
            self._prepared.export(plan, folder)
            return folder
        with trial(self._prepared.model.base_model, self._prepared.architecture, codes):
            self._prepared.export(plan, folder)
        return folder
