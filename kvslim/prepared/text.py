"""The text of a decoder: windows to calibrate and to validate on, which of their tokens count, and recall questions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvslim.calibrate import cache
from kvslim.calibrate.corpus import (
    CALIBRATION_SHARE,
    VALIDATION_SHARE,
    WHOLE,
    check_tokens,
    loss_mask,
    text_beginning,
    text_windows,
)
from kvslim.calibrate.own_text import OwnText, self_windows, start_token
from kvslim.calibrate.text_source import source_digest
from kvslim.demo.world import recall_questions
from kvslim.healing.text import Text, check_count
from kvslim.loading.config import model_config
from kvslim.settings import Calibration, TextUse, Validation
from kvslim.token_ids import start_of_text
from kvslim.validation.recall import RecallItem, repeated_spans
from kvslim.validation.spans import FAR_SPANS, SPAN

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder

BEYOND = 4  # the text goes on by one part in so many behind the target context
REST = 1 + 2 * SPAN  # tokens of a recall question besides those between its two copies: their own, and a start token


class TextSource:
    """Text from the sources that a recipe names; the model may be one of them.

    Args:
        prepared: The model.
        calibration: The text that statistics come from.
        validation: The text that artifacts are measured on.
        made_for: The text that the artifact was measured on when it was made; None for the same.
    """

    def __init__(
        self,
        prepared: PreparedDecoder,
        calibration: Calibration,
        validation: Validation,
        made_for: Validation | None = None,
    ) -> None:
        self.prepared, self.calibration, self.validation = prepared, calibration, validation
        # One text that serves both is split. Weights that were fitted to a part of it are fitted to that part again.
        serves = [settings.source == calibration.source != "self" for settings in (made_for or validation, validation)]
        self._calibration_share = CALIBRATION_SHARE if serves[0] else WHOLE
        self._validation_share = VALIDATION_SHARE if serves[1] else WHOLE
        self._own: dict[str, np.ndarray] = {}

    def check(self, uses: Collection[TextUse]) -> None:
        """Refuses text with tokens that the model does not know, or that is too short for its use; needs no weights.

        Args:
            uses: Those of the texts that will be read.

        Raises:
            UsageError: Naming the token, or the length.
        """
        for source in dict.fromkeys((self.calibration.source, self.validation.source)):
            check_tokens(source, self.prepared.tokenizer, self.prepared.spec.vocab_size)
        for use in uses:
            if self._is_needed(use) and not self._is_written(getattr(self, use)):
                _ = self.calibration_windows if use == "calibration" else self.held_out_windows  # read, so checked
        heal = self.prepared.recipe.heal
        if heal is not None and "calibration" in uses:
            is_written = self._is_written(self.calibration)
            check_count(self.calibration.samples if is_written else len(self.healing_windows(heal.samples).windows))

    def is_missing(self, uses: Collection[TextUse]) -> bool:
        """Whether the model must still write one of these texts."""
        return any(self._stored(settings) is None for settings in self._to_write(uses))

    def write(self, uses: Collection[TextUse]) -> None:
        """Has the model write those of these texts that it is the source of, at once. They are kept on the disk."""
        self._write([settings for settings in self._to_write(uses) if self._stored(settings) is None])

    @property
    def identity(self) -> tuple[Any, ...]:
        """What decides the calibration text, as far as the model does not."""
        settings = self.calibration
        source = source_digest(settings.source) or settings.source
        return settings.model_dump(exclude={"source"}), source, self._calibration_share

    @cached_property
    def calibration_windows(self) -> np.ndarray:
        """[n, length] token ids."""
        return self._windows(self.calibration, self._calibration_share)

    def calibration_mask(self) -> np.ndarray | None:
        """[n, length] bool, the tokens of the calibration windows that count; None for all."""
        settings = self.calibration
        if settings.source == "self":
            return None
        return loss_mask(
            settings.source,
            self.prepared.tokenizer,
            samples=settings.samples,
            length=settings.length,
            share=self._calibration_share,
        )

    def healing_windows(self, most: int) -> Text:
        """The windows of the calibration's source, up to `most`; of what the model writes, those of the calibration."""
        settings = self.calibration
        if settings.source == "self":
            return Text(self.calibration_windows, None)
        windows, mask = (
            part(
                settings.source,
                self.prepared.tokenizer,
                samples=most,
                length=settings.length,
                share=self._calibration_share,
            )
            for part in (text_windows, loss_mask)
        )
        return Text(windows, mask)

    @cached_property
    def held_out_windows(self) -> np.ndarray:
        """[n, length] token ids that calibration never sees."""
        return self._windows(self.validation, self._validation_share)

    def long_text(self, windows: np.ndarray) -> np.ndarray | None:
        """[n] token ids of one text up to the target context; None where that is no longer than two of the windows.

        It has at most as many tokens as all windows together, so that to measure it takes about as long. Where it
        reaches the target context and the model has more positions, a quarter of it comes on top, to tell what happens
        beyond. What the model writes itself is put end to end.

        Args:
            windows: The held-out windows, [n, length].
        """
        length = windows.shape[1]
        context, spec = self.prepared.context, self.prepared.spec
        longest = windows.size if windows.size < context else min(context + context // BEYOND, spec.max_context)
        if self._is_written(self.validation):
            found = windows.reshape(-1)[:longest]
        else:
            source, tokenizer = self.validation.source, self.prepared.tokenizer
            found = text_beginning(source, tokenizer, longest, self._validation_share)
        whole = len(found) // length
        return found[: whole * length] if whole > 2 else None

    def held_out_items(self, windows: np.ndarray, long_text: np.ndarray | None) -> list[RecallItem]:
        """The recall questions of the validation; those of a model other than the demo are made of the text."""
        settings = self.validation
        near = self._recall_items(windows, settings.recall_items, settings.recall_distance, settings.seed)
        if long_text is None:
            return near
        return [*self._far_items(windows, FAR_SPANS, min(len(long_text), self.prepared.context), settings.seed), *near]

    def recall_items(self, windows: np.ndarray, most: int) -> list[RecallItem]:
        """Recall questions other than those of the validation."""
        settings = self.validation
        count = min(settings.recall_items, most)
        return self._recall_items(windows, count, settings.recall_distance, settings.seed + 1)

    def far_items(self, windows: np.ndarray, most: int, spread: float) -> list[RecallItem]:
        """Recall questions other than those of the validation, of one text as long as the target context.

        Args:
            windows: Text to make them of, [n, length] token ids.
            most: Questions at most.
            spread: Share of the text that what they ask for is spread over.
        """
        return self._far_items(windows, most, self.prepared.context, self.validation.seed + 1, spread)

    def _is_written(self, settings: Calibration | Validation) -> bool:
        """Whether the model writes the text itself; the demo is judged on stories instead."""
        judges_demo = self.prepared.snapshot.is_demo and isinstance(settings, Validation)
        return settings.source == "self" and not judges_demo

    def _windows(self, settings: Calibration | Validation, share: tuple[float, float]) -> np.ndarray:
        prepared, samples, length = self.prepared, settings.samples, settings.length
        if not self._is_written(settings):
            key = "calibration.length" if isinstance(settings, Calibration) else "validation.length"
            return text_windows(
                settings.source, prepared.tokenizer, samples=samples, length=length, share=share, key=key
            )
        return self._own_windows(settings)

    def _to_write(self, uses: Collection[TextUse]) -> list[Calibration | Validation]:
        found: list[Calibration | Validation] = [getattr(self, use) for use in uses if self._is_needed(use)]
        return [settings for settings in found if self._is_written(settings)]

    def _is_needed(self, use: TextUse) -> bool:
        return use == "validation" or self.prepared.recipe.is_calibrated

    def _own_windows(self, settings: Calibration | Validation) -> np.ndarray:
        """[n, length] token ids that the model writes, or has written in an earlier run."""
        if (windows := self._stored(settings)) is not None:
            return windows
        self._write([settings])
        return self._own[self._key(settings)]

    def _write(self, uses: Sequence[Calibration | Validation]) -> None:
        prepared, snapshot = self.prepared, self.prepared.snapshot
        start = start_token(model_config(snapshot.config(), str(snapshot.config_file)))
        texts = [OwnText(settings.samples, settings.length, settings.seed) for settings in uses]
        for settings, windows in zip(
            uses, self_windows(prepared.original, start, texts, prepared.progress), strict=True
        ):
            self._own[self._key(settings)] = windows
            cache.store_windows(self._key(settings), windows)

    def _stored(self, settings: Calibration | Validation) -> np.ndarray | None:
        key = self._key(settings)
        if key not in self._own and (found := cache.load_windows(key)) is not None:
            self._own[key] = found
        return self._own.get(key)

    def _key(self, settings: Calibration | Validation) -> str:
        return cache.content_key("own text", self.prepared.digest, settings.samples, settings.length, settings.seed)

    def _recall_items(self, windows: np.ndarray, count: int, distance: int, seed: int) -> list[RecallItem]:
        if not self.prepared.snapshot.is_demo:
            return list(repeated_spans(windows, count=count, distance=distance, seed=seed, starts=self._starts))
        questions = recall_questions(count, distance, lambda text: len(self._ids(text)), seed)
        return [RecallItem(self._ids(item.prompt), self._ids(item.answer, start=False), distance) for item in questions]

    def _far_items(
        self, windows: np.ndarray, most: int, length: int, seed: int, spread: float = 0.5
    ) -> list[RecallItem]:
        """Questions of one text of so many tokens; none where that is too short. The demo knows only its stories."""
        count = min(most, self.validation.recall_items, length // (4 * SPAN))
        if not count or self.prepared.snapshot.is_demo:
            return []
        distance = length - REST - (count - 1) * SPAN  # later questions stand behind earlier ones
        found = repeated_spans(
            windows, count=count, distance=distance, seed=seed, spans=most, spread=spread, starts=self._starts
        )
        return list(found)

    @property
    def _starts(self) -> tuple[int, ...]:
        """The tokens that a text may start with."""
        return *start_of_text(self.prepared.tokenizer)[:1].tolist(), self.prepared.tokenizer.bos_token_id

    def _ids(self, text: str, start: bool = True) -> tuple[int, ...]:
        encoded: Any = self.prepared.tokenizer(text, add_special_tokens=start, verbose=False)
        return tuple(encoded.input_ids)


def split(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Calibration text to fit on, and the last quarter to measure on; one window serves both."""
    held_out = max(1, len(windows) // 4)
    return windows[: max(1, len(windows) - held_out)], windows[-held_out:]


def joined(windows: np.ndarray, length: int) -> np.ndarray:
    """Windows put end to end, to rows of so many tokens or of all there are; as they are where they are as long."""
    longest = min(length, windows.size)
    if longest <= windows.shape[1]:
        return windows
    rows = windows.size // longest
    return windows.reshape(-1)[: rows * longest].reshape(rows, longest)
