"""The text of an encoder: sentences to fit on, to choose by, and to validate on."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from kvslim.calibrate.corpus import CALIBRATION_SHARE, VALIDATION_SHARE, WHOLE
from kvslim.calibrate.sentences import Sentences, mask_tokens, sentences, tokenised
from kvslim.contract import ModelSpec
from kvslim.errors import ModelError, UsageError
from kvslim.settings import Calibration, Validation
from kvslim.token_ids import check_ids, knows_more

LEAST_SENTENCES = 8  # of calibration: three quarters to fit on, one to choose by


class SentenceSource:
    """Sentences from the sources that a recipe names.

    Args:
        tokenizer: The model's.
        spec: Its shape.
        folder: Its files, for errors.
        calibration: The text that choices come from.
        validation: The text that artifacts are measured on.
    """

    def __init__(
        self, tokenizer: Any, spec: ModelSpec, folder: Path, calibration: Calibration, validation: Validation
    ) -> None:
        self.tokenizer, self.spec, self.folder = tokenizer, spec, folder
        self.calibration, self.validation = calibration, validation
        # One text that serves both is split.
        self.is_shared = calibration.source != "self" and calibration.source == validation.source

    def check(self) -> None:
        """Refuses text with tokens that the model does not know, and such a mask token; needs no weights.

        Raises:
            KvslimError: As `validated`, or naming the token.
        """
        tokenizer = self.tokenizer
        if not knows_more(tokenizer, self.spec.vocab_size):
            return
        parts = ((self.calibration, CALIBRATION_SHARE, False), (self.validation, VALIDATION_SHARE, True))
        for settings, share, held_out in parts:
            ids = list(chain(*self._texts(settings, share, held_out=held_out)))
            if self.spec.task == "fill-mask":
                ids.append(self._mask_id)
            check_ids(ids, self.spec.vocab_size, tokenizer.convert_ids_to_tokens, settings.source)

    def fitting_and_held_out(self) -> tuple[Sentences, Sentences]:
        """Sentences of the calibration to fit on, and the last quarter to choose by; the validation has none of them.

        Raises:
            KvslimError: As `validated`, or there are too few.
        """
        settings = self.calibration
        texts = self._texts(settings, CALIBRATION_SHARE, held_out=False)
        known = set(map(tuple, self._texts(self.validation, VALIDATION_SHARE, held_out=True)))
        texts = [text for text in texts if tuple(text) not in known]
        if len(texts) < LEAST_SENTENCES:
            raise UsageError(
                f"{len(texts)} sentences are too few to choose heads by",
                where="recipe: calibration",
                fix="give a text of some hundred sentences, with --set calibration.samples=256",
            )
        part = len(texts) - len(texts) // 4
        return self._sentences(texts[:part], settings.seed), self._sentences(texts[part:], settings.seed)

    def validated(self) -> Sentences:
        """The sentences of the validation, masked too where the model fills masks.

        Raises:
            KvslimError: The source cannot be read, or the tokenizer of a model that fills masks has no mask token.
        """
        settings = self.validation
        return self._sentences(self._texts(settings, VALIDATION_SHARE, held_out=True), settings.seed)

    def _texts(self, settings: Calibration | Validation, share: tuple[float, float], held_out: bool) -> list[list[int]]:
        """Token ids of sentences."""
        share = share if self.is_shared else WHOLE
        found = sentences(settings.source, samples=settings.samples, share=share, held_out=held_out)
        return tokenised(found, self.tokenizer, min(settings.length, self.spec.max_context))

    def _sentences(self, texts: list[list[int]], seed: int) -> Sentences:
        """The texts, masked too where the model fills masks."""
        if self.spec.task != "fill-mask":
            return Sentences(texts, (), ())
        return mask_tokens(texts, self._mask_id, set(self.tokenizer.all_special_ids), seed)

    @property
    def _mask_id(self) -> int:
        """The id that stands for a masked token."""
        mask: int | None = self.tokenizer.mask_token_id
        if mask is None:
            raise ModelError(
                "the tokenizer has no mask token", where=str(self.folder), fix="add mask_token to its config"
            )
        return mask
