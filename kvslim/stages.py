"""The stages of each long function, with the share of its time that each is expected to take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvslim.contract import ModelSpec
    from kvslim.progress import Progress
    from kvslim.recipe import Recipe

Stages = Mapping[str, float]

LOAD, QUANTISE, PLAIN = "load", "quantise the weights", "export the plain baseline"
PROBE_WEIGHTS, PROBE_CACHE = "probe the weights", "probe the cache"
TEXT, CALIBRATE, ANALYZE = "write text", "calibrate", "analyze"
PLAN, DECIDE = "plan", "decide"  # with a budget, and with methods
HEAL = "heal"
DRAFTS = "texts with and without drafts"
HELD_OUT, SLIM = "held-out text", "export the slim graph"
VALIDATE, RECALL, TIME = "validate", "validate: recall", "validate: time and memory"

# Seconds of a model of 135M parameters on two cores.
SECONDS: Stages = {
    LOAD: 6,
    PLAIN: 36,
    PROBE_WEIGHTS: 60,
    PROBE_CACHE: 120,
    QUANTISE: 30,
    TEXT: 80,
    CALIBRATE: 24,
    PLAN: 240,
    DECIDE: 60,
    ANALYZE: 60,
    HELD_OUT: 20,
    SLIM: 26,
    VALIDATE: 100,
    RECALL: 45,
    TIME: 55,
}
STEP = 5  # of a step of healing
# What a stage does in turn by the labels of its steps, and the share of its time that each part takes. Labels
# in parentheses stand for what has no steps.
PARTS: Mapping[str, Stages] = {
    TEXT: {"steps of the export": 1, "the model's own text": 1},
    PLAIN: {"steps of the export": 4, "(files)": 1},
    PROBE_CACHE: {
        "windows": 2,
        "layers probed": 6,
        "kinds of changes asked for recall": 6,
        "sizes planned": 6,
    },
    PLAN: {
        "layers probed": 6,
        "kinds of changes asked for recall": 6,
        "sizes planned": 6,
        "shares of windows tried": 4,
        "passes that train states": 3,
        "(recall)": 2,
        "layers refitted": 2,
        "(loss)": 1,
    },
    DECIDE: {
        "(methods)": 2,
        "sizes priced": 4,
        "passes that train states": 2,
        "layers refitted": 2,
        "(loss)": 1,
    },
    SLIM: {"steps of the export": 4, "(files)": 1},
    VALIDATE: {"held-out text": 6, "numerical floor": 1},
    RECALL: {"recall questions": 5, "sample answers": 1},
    DRAFTS: {"the model's own text": 1, "contexts with a draft": 4},
    TIME: {"prompts timed": 12, "contexts timed": 2, "(memory)": 1},
}


def begin(verb: str, spec: ModelSpec, recipe: Recipe, progress: Progress, *, planned: bool = False) -> None:
    """Tells what is to come, and begins with the first stage. Arguments as for `expected`."""
    progress.expect(expected(verb, spec, recipe, planned=planned))
    progress.stage(LOAD)


def expected(verb: str, spec: ModelSpec, recipe: Recipe, *, planned: bool = False) -> Stages:
    """The stages of `compress`, `plan`, `analyze` or `validate`; `planned` says that the plan is given."""
    writing = (TEXT,) if not spec.is_encoder and _writes(verb, recipe) else ()
    rounding = _of_weights(recipe) if recipe.weights.is_quantised and not spec.is_encoder else ()
    loading = (LOAD, *writing, *rounding)
    validating = (VALIDATE,) if spec.is_encoder else (VALIDATE, RECALL, TIME)
    choosing = PLAN if recipe.budget is not None else DECIDE
    deciding = (CALIBRATE, *(() if planned else (choosing,))) if recipe.decides or planned else ()
    healing = (HEAL,) if deciding and recipe.heal is not None else ()
    names = {
        "compress": (PLAIN, *deciding, *healing, HELD_OUT, SLIM, *validating),
        "plan": deciding,
        "analyze": (CALIBRATE, ANALYZE),
        "validate": (PLAIN, HELD_OUT, *validating),
    }
    return {name: _seconds(name, recipe) for name in (*loading, *names[verb])}


def _writes(verb: str, recipe: Recipe) -> bool:
    """Whether the model itself is a source of text."""
    sources = [recipe.calibration.source] if recipe.is_calibrated and verb != "validate" else []
    sources += [recipe.validation.source] if verb in {"compress", "validate"} else []
    return "self" in sources


def _seconds(name: str, recipe: Recipe) -> float:
    if name != HEAL or recipe.heal is None:
        return SECONDS[name]
    return 60 * recipe.heal.minutes if recipe.heal.minutes is not None else STEP * (recipe.heal.steps or 0)


def _of_weights(recipe: Recipe) -> tuple[str, ...]:
    probing = (PROBE_WEIGHTS,) * (recipe.splits_memory or recipe.weights.picks) + (PROBE_CACHE,) * recipe.splits_memory
    return (*probing, QUANTISE)
