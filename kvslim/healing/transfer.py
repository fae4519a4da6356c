"""Attention transfer: the features of a state learn to give what softmax attention over all tokens gives.

Each layer for itself, on the queries, keys and values of the model as it is, minimises the squared error of its
attention output (Zhang et al., "LoLCATs: On Low-Rank Linearizing of Large Language Models", 2024, section 3.2). One
pass over a text trains all layers with a state, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvslim.caches import LinearCache
from kvslim.caches.attention.base import BLOCK, States, attended
from kvslim.caches.attention.linear import FeatureMaps, StateAttention, attended_blocks
from kvslim.caches.attention.window import Ring
from kvslim.healing.changes import Changes
from kvslim.healing.schedule import rate_of
from kvslim.loading.architecture import Architecture
from kvslim.progress import Progress
from kvslim.transform.attention import Observed
from kvslim.transform.device import where
from kvslim.transform.edits import Array, Codes, Features, LayerEdit
from kvslim.transform.projections import projection
from kvslim.transform.scoring import Scoring
from kvslim.transform.surgery import attention_modules, slim_modules

VISITS, STEPS = 8, 20  # passes over a text each, and the steps of a layer in each of them
BLOCKS = 4  # of queries in a step
RATE = 0.03  # as a share of a number's usual size
BETAS = 0.9, 0.99
NAMES = tuple(each.name for each in fields(Features))


def transferred(
    model: Any, architecture: Architecture, codes: Sequence[LayerEdit], windows: Array, progress: Progress
) -> Codes:
    """The codes with the features of all states trained.

    Args:
        model: The prepared model, without codes.
        architecture: Where its parts live.
        codes: One entry per layer.
        windows: [n, length] token ids.
        progress: Receives the progress.
    """
    slims, attentions = slim_modules(model, architecture), attention_modules(model, architecture)
    learners = {
        layer: _Learner(
            code.features, code.cache, projection(attentions[layer], architecture, "output")[0], model.device
        )
        for layer, code in enumerate(codes)
        if code.features is not None and isinstance(code.cache, LinearCache)
    }
    try:
        for layer, learner in learners.items():
            slims[layer].observer = learner
        with where(model), torch.no_grad():
            for visit in progress.track(range(VISITS), "passes that train states"):
                tokens = torch.from_numpy(windows[visit % len(windows)][None]).to(model.device)
                model.base_model(input_ids=tokens, use_cache=False)
    finally:
        for slim in slims:
            slim.observer = None
    return tuple(
        replace(code, features=learners[layer].features) if layer in learners else code
        for layer, code in enumerate(codes)
    )


class _Learner:
    """The features of one layer, which it trains whenever the layer attends.

    Args:
        features: To begin with.
        cache: What the layer is to keep.
        output: [hidden, q_heads * head_dim], the output projection, behind which errors count.
        device: Where the layer computes.
    """

    def __init__(self, features: Features, cache: LinearCache, output: Array, device: torch.device) -> None:
        self.ring, self.output = Ring(cache.window, cache.sinks), torch.from_numpy(output).float().to(device)
        self.shapes = {name: getattr(features, name).shape for name in NAMES}
        rows = {name: torch.from_numpy(getattr(features, name)).float().flatten(0, 1).to(device) for name in NAMES}
        self.weights = {(0, name): part.requires_grad_() for name, part in rows.items()}
        self.changes = Changes(self.weights)
        self.optimizer = torch.optim.Adam(self.changes.values, betas=BETAS)
        self.random = np.random.default_rng(0)
        self.step = 0

    def __call__(self, seen: Observed) -> None:
        """Takes some steps on a text."""
        states = seen.query, seen.key, seen.value
        wanted = attended(*states, seen.scoring)
        with torch.enable_grad():
            for _ in range(STEPS):
                self._step(states, StateAttention(self.ring).scoring(seen.scoring), wanted)

    @property
    def features(self) -> Features:
        """As they are now."""
        return Features(
            **{name: self.weights[0, name].detach().cpu().numpy().reshape(self.shapes[name]) for name in NAMES}
        )

    def _step(self, states: States, scoring: Scoring, wanted: Tensor) -> None:
        starts = range(0, states[0].shape[2], BLOCK)
        picked = np.sort(self.random.choice(starts, min(BLOCKS, len(starts)), replace=False)).tolist()
        maps = FeatureMaps(**{name: part.reshape(self.shapes[name]) for (_, name), part in self.weights.items()})
        found = torch.cat(list(attended_blocks(states, maps, self.ring, scoring, frozenset(picked))), dim=1)
        target = torch.cat([wanted[:, start : start + BLOCK] for start in picked], dim=1)
        loss = ((found - target).flatten(2) @ self.output.T).square().mean()
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * rate_of(self.step, VISITS * STEPS)
        loss.backward()
        self.changes.take_gradients()
        self.optimizer.step()
        self.changes.apply()
        self.step += 1
