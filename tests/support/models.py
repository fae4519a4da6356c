"""Opening a model folder the way the pipeline does, for tests that look at one stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvslim.checks import check_plan
from kvslim.loading.source import read_spec, resolve
from kvslim.methods import Method
from kvslim.planning.decide import decide
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Silent
from kvslim.recipe import Recipe
from kvslim.runtime.opening import layout_of, open_session
from kvslim.runtime.session import DecodeSession
from kvslim.settings import Calibration, TextUse, Validation
from kvslim.types import KVLayout, Plan
from kvslim.weight_format import WeightFormat

CALIBRATION = Calibration(samples=4, length=48)
VALIDATION = Validation(
    samples=2, length=48, recall_items=2, recall_distance=16, prompts=(16,), contexts=(32,), repeats=3
)

# Settings that make a whole run of a tiny model take seconds.
SHORT = (
    *("calibration.samples=4", "calibration.length=48", "validation.samples=2", "validation.length=48"),
    *("validation.recall_items=2", "validation.recall_distance=16", "validation.prompts=[16]"),
    *(
        "validation.contexts=[32]",
        "validation.repeats=3",
        "weights=fp32",
        "gates.max_kl=null",
        "gates.max_recall_drop=null",
    ),
)


def recipe_of(methods: Sequence[Method] = (), weights: str | WeightFormat = "fp32") -> Recipe:
    return Recipe(name="test", methods=tuple(methods), weights=weights, calibration=CALIBRATION, validation=VALIDATION)


def open_prepared(model: Path | str, recipe: Recipe, *texts: TextUse) -> PreparedDecoder:
    snapshot = resolve(str(model))
    return PreparedDecoder(snapshot, read_spec(snapshot), recipe, Silent(), texts=texts)


def export_slim(prepared: PreparedDecoder, folder: Path) -> Plan:
    """Fits the prepared model's recipe, installs it and writes the graph to a new `folder`."""
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    prepared.install(prepared.codes(plan))
    folder.mkdir()
    prepared.export(plan, folder)
    return plan


def tokens_of(prepared: PreparedDecoder, count: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, prepared.spec.vocab_size, count)


def original_logits(model: Path, tokens: np.ndarray) -> np.ndarray:
    """[n, vocab] logits of a model folder as transformers computes them, without any of KVSlim."""
    import torch
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: np.ndarray = original(torch.from_numpy(tokens[None])).logits[0].numpy()
    return logits


def torch_logits(prepared: PreparedDecoder, tokens: np.ndarray) -> np.ndarray:
    """[n, vocab] logits of the prepared model's model as it is now, in one forward pass."""
    import torch

    with torch.inference_mode():
        logits: np.ndarray = prepared.model(torch.from_numpy(tokens[None])).logits[0].numpy()
    return logits


def cached_logits(folder: Path, tokens: np.ndarray, steps: int = 8) -> np.ndarray:
    """[n, vocab] logits through the cache: one prefill, then `steps` single tokens."""
    first = len(tokens) - steps
    return in_chunks(DecodeSession(folder, capacity=len(tokens), all_positions=True), tokens, [first, *[1] * steps])


def in_chunks(session: DecodeSession, tokens: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
    """[n, vocab] logits of tokens that come in chunks of these sizes, again and again."""
    logits, start = [], 0
    while start < len(tokens):
        size = chunks[len(logits) % len(chunks)]
        logits.append(session.step(tokens[start : start + size]))
        start += size
    return np.concatenate(logits)


def exported(prepared: PreparedDecoder, plan: Plan, folder: Path) -> np.ndarray:
    """Logits in torch of a plan that is now installed, its graph in `folder`."""
    check_plan(plan, prepared.spec)
    prepared.install(prepared.codes(plan))
    folder.mkdir()
    prepared.export(plan, folder)
    assert layout_of(open_session(folder)) == KVLayout.of(prepared.spec, plan)
    return torch_logits(prepared, tokens_of(prepared))
