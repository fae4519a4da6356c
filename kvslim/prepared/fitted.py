"""What is fitted and trained for a decoder's plan, kept on disk by the hash of everything that decides it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvslim.calibrate import cache
from kvslim.errors import ArtifactError
from kvslim.export.stored import graph_key
from kvslim.healing.distil import healed
from kvslim.healing.schedule import LEAST_STEPS
from kvslim.healing.text import parts_of
from kvslim.healing.transfer import transferred
from kvslim.transform.edit_file import digest_of, load_fitted, save_fitted
from kvslim.transform.edits import Codes, FittedPlan, LayerEdit
from kvslim.types import Healing, Plan

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder
    from kvslim.settings import Heal

TRIAL = 8  # of a training, one part in so many serves to compare plans


def refitted_before(prepared: PreparedDecoder, plan: Plan, fit: Callable[[Plan], Codes]) -> Codes:
    """A plan's codes, projections fitted again included: from the disk, or made by `fit` and stored."""
    methods = [{method.name: method.model_dump(mode="json")} for method in prepared.recipe.methods]
    return _before(prepared, plan, lambda: fit(plan), "edits", plan.model_dump(mode="json"), methods)


def transferred_before(prepared: PreparedDecoder, plan: Plan, codes: Codes, windows: np.ndarray) -> Codes:
    """Codes with the features of their states trained: these from the disk, or trained on `windows` and stored."""
    untrained = tuple(LayerEdit(cache=code.cache, features=code.features) for code in codes)

    def train() -> Codes:
        return transferred(prepared.device_model, prepared.architecture, untrained, windows, prepared.progress)

    found = _before(prepared, plan, train, "states", windows.shape, digest_of(untrained))
    return tuple(replace(code, features=state.features) for code, state in zip(codes, found, strict=True))


def _before(prepared: PreparedDecoder, plan: Plan, fit: Callable[[], Codes], kind: str, *decides: object) -> Codes:
    """Codes of a plan, from the disk or else made by `fit` and stored; `decides` is what they depend on."""
    key = graph_key(kind, prepared.made_for, prepared.statistics.digest(), *decides)
    path = cache.cache_folder() / "edits" / f"{key}.safetensors"
    with suppress(ArtifactError):
        return load_fitted(cache.used(path)).codes
    codes = fit()
    with suppress(OSError):  # a cache that cannot be written is no reason to fail
        path.parent.mkdir(parents=True, exist_ok=True)
        save_fitted(path, FittedPlan(plan, codes, prepared.made_for))
        cache.evict(path.parent.name)
    return codes


def heal(prepared: PreparedDecoder, fitted: FittedPlan, settings: Heal) -> tuple[FittedPlan, Healing]:
    """A plan with weights trained to its codes; a training that was killed goes on where it was.

    Raises:
        UsageError: The text has too few windows.
    """
    texts = parts_of(prepared.text.healing_windows(settings.samples))
    seed, identity = prepared.recipe.calibration.seed, prepared.text.identity
    decides = prepared.made_for, identity, settings.model_dump(mode="json"), digest_of(fitted.codes)
    folder = cache.cache_folder() / "healing" / cache.content_key("healing", *decides)
    of = prepared.device_model, prepared.architecture, fitted.codes
    codes, healing = healed(*of, texts, settings, seed, folder, prepared.progress)
    cache.used(folder)
    cache.evict(folder.parent.name)
    return fitted._replace(codes=codes), healing


def shortened(settings: Heal) -> Heal:
    """A training of a share of its length, by which plans are compared."""
    if settings.minutes is not None:
        return settings.model_copy(update={"minutes": settings.minutes / TRIAL})
    return settings.model_copy(update={"steps": max(LEAST_STEPS, (settings.steps or 0) // TRIAL)})
