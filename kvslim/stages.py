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
TEXT, CALIBRATE, PLAN, ANALYZE = "calibration text", "calibrate", "plan", "analyze"
HELD_OUT, SLIM = "held-out text", "export the slim graph"
VALIDATE, RECALL, TIME = "validate", "validate: recall", "validate: time and memory"

# Seconds of a model of 135M parameters on two cores.
SECONDS: Stages = {
    LOAD: 6,
    PLAIN: 36,
    QUANTISE: 30,
    TEXT: 40,
    CALIBRATE: 24,
    PLAN: 60,
    ANALYZE: 60,
    HELD_OUT: 20,
    SLIM: 26,
    VALIDATE: 100,
    RECALL: 45,
    TIME: 25,
}
# What a stage does in turn by the labels of its steps, and the share of its time that each part takes. Labels
# in parentheses stand for what has no steps.
PARTS: Mapping[str, Stages] = {
    PLAIN: {"steps of the export": 4, "(files)": 1},
    PLAN: {"layers probed": 6, "sizes planned": 3, "(recall)": 2, "layers refitted": 2, "(loss)": 1},
    SLIM: {"steps of the export": 4, "(files)": 1},
    VALIDATE: {"held-out text": 6, "numerical floor": 1},
    TIME: {"prompts timed": 3, "contexts timed": 3, "(memory)": 1},
}


def begin(verb: str, spec: ModelSpec, recipe: Recipe, progress: Progress, *, planned: bool = False) -> None:
    """Tells what is to come, and begins with the first stage. Arguments as for `expected`."""
    progress.expect(expected(verb, spec, recipe, planned=planned))
    progress.stage(LOAD)


def expected(verb: str, spec: ModelSpec, recipe: Recipe, *, planned: bool = False) -> Stages:
    """The stages of `compress`, `plan`, `analyze` or `validate`; `planned` says that the plan is given."""
    loading = (LOAD, QUANTISE) if recipe.weights.is_quantised and not spec.is_encoder else (LOAD,)
    reading = (CALIBRATE,) if spec.is_encoder else (TEXT, CALIBRATE)
    validating = (VALIDATE,) if spec.is_encoder else (VALIDATE, RECALL, TIME)
    decides = recipe.budget is not None or bool(recipe.methods)
    deciding = (*reading, *(() if planned else (PLAN,))) if decides or planned else ()
    names = {
        "compress": (PLAIN, *deciding, HELD_OUT, SLIM, *validating),
        "plan": deciding,
        "analyze": (*reading, ANALYZE),
        "validate": (PLAIN, HELD_OUT, *validating),
    }
    return {name: SECONDS[name] for name in (*loading, *names[verb])}
