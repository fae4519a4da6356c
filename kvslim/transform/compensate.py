"""Projections fitted again, so that what a compressed model gives comes as near as can be to what it gave.

Layer by layer from the first, each sees what the compressed and refitted layers below it give, and a projection of it
becomes the ridge regression, in closed form and towards the projection it had:

- The output projection from its attention outputs there to what it gave in the uncompressed model; where the layer has
  lost its feed-forward part, to what the whole layer gave.
- The down projection, where it reads fewer channels, its layer has lost its attention or blocks behind it are gone, to
  the hidden states that the uncompressed model has behind all these (after Shopkhoev et al., "ReplaceMe: Network
  Simplification via Depth Pruning and Transformer Block Linearization", 2025, section 2.2, where the map is square and
  applied to its output). A norm behind it, as some families have, leaves nothing linear to fit; the mean outputs stay
  alone there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvslim.caches.attention.shared import SharedAttention
from kvslim.loading.architecture import Architecture
from kvslim.progress import Progress
from kvslim.transform.edits import Affine, Array, Codes, LayerEdit
from kvslim.transform.hooks import attached
from kvslim.transform.projections import parameters, shifted
from kvslim.transform.surgery import layer_modules, slim_modules, trial

RIDGE = 0.1  # of the inputs' mean power
Side = Literal["output", "down"]


def refitting(
    model: Any,
    architecture: Architecture,
    codes: Codes,
    windows: Iterable[Array],
    progress: Progress,
) -> Iterator[Codes]:
    """The codes with projections fitted to them, of one layer more each time, from the first.

    Of layers without codes those alone are fitted that blocks are gone behind.

    Args:
        model: The prepared model, without codes.
        architecture: Where its parts live.
        codes: One entry per layer.
        windows: [length] token ids each.
        progress: Receives the progress.
    """
    tokens = [torch.from_numpy(window[None]).to(model.device) for window in windows]
    plain: list[Any] = [None] * len(tokens)  # what the layer below gives, in the model as it is
    coded = plain  # and in the one with codes
    fitted = list(codes)
    shared: dict[int, list[Any]] = {}  # and what its caches give back to the layers that read them
    for first, last in runs_of(codes, progress):
        if all(code.is_empty for code in codes[first:]):
            break
        refit = _Refit(model, architecture, first, last, tokens, shared)
        wanted = list(refit.runs(plain))
        if not all(code.is_empty for code in codes[first : last + 1]):
            fitted[first] = refit.fitted(fitted, coded, wanted)
        is_read = any(code.source == first for code in codes)
        untouched = not is_read and all(code.is_empty for code in codes[: last + 1])
        found = wanted if untouched else list(refit.runs(coded, fitted))
        coded = [run.output for run in found]
        if is_read:
            shared[first] = [run.shared for run in found]
        plain = [run.output for run in wanted]
        yield tuple(fitted)


def runs_of(codes: Sequence[LayerEdit], progress: Progress) -> Iterator[tuple[int, int]]:
    """Indices of each layer, and of the last of the blocks behind it that are gone, itself if none is."""
    for first in progress.track(range(len(codes)), "layers refitted"):
        if first and codes[first].is_dropped:
            continue
        last = first
        while last + 1 < len(codes) and codes[last + 1].is_dropped:
            last += 1
        yield first, last


@dataclass
class _Refit:
    """One layer, with the blocks behind it that are gone.

    Attributes:
        model: The prepared model, without codes.
        architecture: Where its parts live.
        first: The layer.
        last: The last block behind it that is gone, or the layer itself.
        tokens: Windows, [1, length] each.
        shared: What the caches of layers below give back, by window, where others read them.
    """

    model: Any
    architecture: Architecture
    first: int
    last: int
    tokens: list[Tensor]
    shared: dict[int, list[Any]]

    def fitted(self, codes: Sequence[LayerEdit], before: list[Any], wanted: list[_Run]) -> LayerEdit:
        """The layer's code with what can be fitted of it.

        Args:
            codes: Of all layers, those below fitted already.
            before: What the layers below give, by window.
            wanted: What the layers do in the model as it is.
        """
        code, is_linear = codes[self.first], self.architecture.post_norms is None
        if code.has_attention and not code.is_empty:
            whole = is_linear and code.mlp_mean is not None
            weight, bias = self._solved("output", codes, before, wanted, whole=whole)
            code = replace(code, output=Affine(weight, bias))
        lacks = not code.has_attention or self.last > self.first or code.channels is not None
        if is_linear and code.mlp_mean is None and lacks:
            codes = [*codes[: self.first], code, *codes[self.first + 1 :]]
            weight, bias = self._solved("down", codes, before, wanted, whole=True)
            code = replace(code, down=Affine(weight, bias))
        return code

    def _solved(
        self, side: Side, codes: Sequence[LayerEdit], before: list[Any], wanted: list[_Run], *, whole: bool
    ) -> tuple[Array, Array]:
        """Weight and bias of a projection, fitted to what it gave, or to what the whole of the layers gave; float32."""
        multiplier, equations = self.architecture.multiplier(self.model.config), _Equations()
        for run, want in zip(self.runs(before, codes, side), wanted, strict=True):
            if whole:
                equations.add(run.read, (want.output - run.output) / multiplier, want.output)
            else:
                equations.add(run.read, want.projected - run.projected)
        with trial(self.model, self.architecture, self._alone(codes)):
            weight, bias = parameters(self._projection(side))
        change, shift = equations.solve()
        # As the model will have them: those of all layers together are as much as their projections.
        return (weight + change).astype(np.float32), shifted(bias, shift).astype(np.float32)

    def runs(
        self, before: list[Any], codes: Sequence[LayerEdit] | None = None, side: Side = "output"
    ) -> Iterator[_Run]:
        """What the layers do with what the layer below them gives, without codes or with, window by window.

        Args:
            before: What the layer below gives.
            codes: Of all layers.
            side: The projection of the first of them that is looked at.
        """
        with trial(self.model, self.architecture, self._alone(codes)):
            slim = slim_modules(self.model, self.architecture)[self.first]
            for place, (tokens, given) in enumerate(zip(self.tokens, before, strict=True)):
                if isinstance(slim.cache, SharedAttention):
                    slim.cache.read.states = self.shared[slim.cache.read.source][place]
                run = self._run(tokens, given, side)
                yield run if slim.shared is None else run._replace(shared=slim.shared.states)

    def _alone(self, codes: Sequence[LayerEdit] | None) -> Codes:
        """Codes of these layers and of those that read the cache of the first, and none of any other."""
        if codes is None:
            return (LayerEdit(),) * len(layer_modules(self.model, self.architecture))
        inside = range(self.first, self.last + 1)
        return tuple(
            code if at in inside or code.source == self.first else LayerEdit() for at, code in enumerate(codes)
        )

    def _projection(self, side: Side) -> Any:
        """The projection of the first layer, or None where it is gone."""
        output = f"{self.architecture.attention}.{self.architecture.output}"
        name = output if side == "output" else self.architecture.down
        found = dict(layer_modules(self.model, self.architecture)[self.first].named_modules()).get(name)
        return found if isinstance(found, torch.nn.Linear) else None

    def _run(self, tokens: Tensor, before: Any, side: Side) -> _Run:
        """One window through these layers; the others do nothing."""
        layers = layer_modules(self.model, self.architecture)
        others = [layer for at, layer in enumerate(layers) if not self.first <= at <= self.last]
        given: list[Any] = []
        seen: list[tuple[Tensor, Tensor]] = []
        hooks = [layers[self.last].register_forward_hook(lambda *call: given.append(call[2]))]
        projection = self._projection(side)
        if projection is not None:
            hooks.append(projection.register_forward_hook(lambda _, inputs, result: seen.append((inputs[0], result))))
        for layer in others:
            layer.forward = lambda *_, **__: given[0] if given else before
        try:
            with attached(hooks), torch.inference_mode():
                self.model.base_model(input_ids=tokens, use_cache=False)
        finally:
            for layer in others:
                del layer.forward
        return _Run(given[0], *(seen[0] if seen else (given[0], given[0])))


class _Run(NamedTuple):
    """What a layer, and the blocks behind it that are gone, did.

    Attributes:
        output: [1, length, hidden], what the last of them gives.
        read: [1, length, inputs], what the layer's projection read.
        projected: [1, length, hidden], what that gave.
        shared: Keys and values as its cache gives them back, where other layers read them.
    """

    output: Tensor
    read: Tensor
    projected: Tensor
    shared: Any = None


@dataclass
class _Equations:
    """Normal equations of a change to a projection.

    Attributes:
        moments: [inputs + 1, inputs + 1] of inputs with a one behind them.
        products: [hidden, inputs + 1] of what is missing and those inputs.
    """

    moments: Array | float = 0.0
    products: Array | float = 0.0

    def add(self, inputs: Tensor, missing: Tensor, scale: Tensor | None = None) -> None:
        """Adds [1, length, inputs] that a projection reads and the [1, length, hidden] that is missing behind it.

        Where `scale` is given, [1, length, hidden], errors count relative to its norm at each token: the norm of the
        next layer divides by that, and a few tokens with huge hidden states would else decide alone.
        """
        rows, wanted = (states.reshape(-1, states.shape[-1]).double().cpu().numpy() for states in (inputs, missing))
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        if scale is not None:
            norms = np.linalg.norm(scale.reshape(-1, scale.shape[-1]).double().cpu().numpy(), axis=1, keepdims=True)
            norms[norms == 0] = np.inf  # padding at a window's start
            rows, wanted = rows / norms, wanted / norms
        self.moments = self.moments + rows.T @ rows
        self.products = self.products + wanted.T @ rows

    def solve(self) -> tuple[Array, Array]:
        """Changes of weight and bias."""
        moments = np.array(self.moments)
        inputs = np.arange(len(moments) - 1)
        moments[inputs, inputs] += RIDGE * moments[inputs, inputs].mean() + np.finfo(np.float64).tiny
        change = np.linalg.solve(moments, np.asarray(self.products).T).T
        return change[:, :-1], change[:, -1]
