"""What is measured of a model before plans are searched, as a value: stored, merged and used for any budget.

Layers are probed apart from each other, so different machines may probe different layers of one model. What keeps
recall is asked of all layers together, once for each kind of change, when a plan first has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal, get_args

from pydantic import Field

from kvslim.contract import Frozen
from kvslim.errors import UsageError
from kvslim.planning.candidates import Alteration, Candidate
from kvslim.planning.prices import Price
from kvslim.planning.windows import Forgetting

FORMAT: Literal[9] = 9  # part of the key too; raised when what is measured or how it is stored changes
BITS = (8, 4)
FIX = "probe the layers again"
Change = Literal["windows", "removals", "sharing"]
CHANGES: tuple[Change, ...] = get_args(Change)


class LayerProbe(Frozen):
    """What was measured of one layer alone."""

    layer: int
    prices: tuple[Price, Price] = Field(description="of keys and of values")
    candidates: dict[int, tuple[Candidate, ...]] = Field(description="codes of a whole cache in each size, by bits")
    windows: tuple[Alteration, ...] = Field(description="windows that could be worth it")
    removals: tuple[Alteration, ...] = Field(description="parts that could be worth removing")
    narrowing: tuple[Alteration, ...] = Field(description="widths of the feed-forward part that could be worth it")
    sharing: Alteration | None = Field(description="the nearest earlier cache, where reading that could be worth it")


class RecallKept(Frozen):
    """The layers that can be altered together at no cost of recall; None where that was not asked."""

    windows: dict[int, Forgetting] | None = Field(None, description="which layers may have a window, by its length")
    removals: tuple[int, ...] | None = Field(None, description="layers whose parts may be removed")
    sharing: tuple[int, ...] | None = Field(None, description="layers that may read an earlier layer's cache")


class Probes(Frozen):
    """What was measured of a model at one target context; no limit of a budget decides it."""

    format: Literal[9] = FORMAT
    key: str = Field(description="hash of all that decides it: model, text, settings")
    context: int = Field(description="target context in tokens, at which bytes and time are counted")
    timed: bool = Field(description="whether what saves time alone was probed too")
    layers: tuple[LayerProbe, ...] = Field(description="the probed layers, in order")
    recall: RecallKept = Field(RecallKept(), description="what keeps recall, as far as it was asked")

    @classmethod
    def merge(cls, *parts: Probes) -> Probes:
        """The probes of different layers of one model as one value; recall is still to be asked.

        Raises:
            UsageError: There are no parts, they are of different models or settings, or two have the same layer.
        """
        if not parts:
            raise UsageError("there are no probes to merge", where="probes", fix="give at least one part")
        first = parts[0]
        if any((part.key, part.context, part.timed) != (first.key, first.context, first.timed) for part in parts):
            raise UsageError("the probes are of different models or settings", where="probes", fix=FIX)
        layers = sorted((layer for part in parts for layer in part.layers), key=lambda layer: layer.layer)
        for layer, following in pairwise(layers):
            if layer.layer == following.layer:
                raise UsageError(f"layer {layer.layer} is probed twice", where="probes", fix="give each layer once")
        return first.model_copy(update={"layers": tuple(layers), "recall": RecallKept()})

    @property
    def windowed(self) -> list[dict[int, tuple[Alteration, ...]]]:
        """The windows that may be taken: for each length, the longest first, by layer."""
        free: Mapping[int, Iterable[int]] = self.window_losses
        if (known := self.recall.windows) is not None:
            free = {length: each.layers[: each.kept] for length, each in known.items() if each.kept}
        return [
            {layer: tuple(each for each in self.layers[layer].windows if each.window == length) for layer in layers}
            for length, layers in free.items()
        ]

    @property
    def window_losses(self) -> dict[int, dict[int, float]]:
        """What each window loses in each layer where it could be worth it, the longest first."""
        lengths = {each.window for layer in self.layers for each in layer.windows if each.window is not None}
        return {
            length: {layer.layer: each.loss for layer in self.layers for each in layer.windows if each.window == length}
            for length in sorted(lengths, reverse=True)
        }

    def forgetting(self, share: float) -> Probes:
        """These probes with windows in a share of the layers where they could be worth it, whatever recall that costs.

        Layers whose window moves answers least come first.
        """
        more = {
            length: known.model_copy(update={"kept": max(known.kept, math.ceil(share * len(known.layers)))})
            for length, known in (self.recall.windows or {}).items()
        }
        return self.model_copy(update={"recall": self.recall.model_copy(update={"windows": more})})

    @property
    def removed(self) -> dict[int, tuple[Alteration, ...]]:
        """The removals that may be made, by layer."""
        found = {layer.layer: layer.removals for layer in self.layers if layer.removals}
        kept = self.recall.removals
        return found if kept is None else {layer: found[layer] for layer in kept}

    @property
    def narrowed(self) -> dict[int, tuple[Alteration, ...]]:
        """The widths that could be worth it, by layer."""
        return {layer.layer: layer.narrowing for layer in self.layers if layer.narrowing}

    @property
    def shared(self) -> dict[int, tuple[Alteration, ...]]:
        """The layers that may read an earlier layer's cache, with what that loses."""
        found = {layer.layer: layer.sharing for layer in self.layers if layer.sharing is not None}
        kept = self.recall.sharing
        return {layer: (found[layer],) for layer in (found if kept is None else kept)}

    @property
    def unasked(self) -> list[Change]:
        """The kinds of changes of which it is not known whether they keep recall."""
        return [change for change in CHANGES if getattr(self.recall, change) is None]

    def check_layers(self, layers: int) -> None:
        """Refuses probes that do not have all layers of a model.

        Raises:
            UsageError: Naming a layer that is not probed, or is not one of the model's.
        """
        probed = {layer.layer for layer in self.layers}
        if wrong := sorted(probed ^ set(range(layers))):
            lack = "not probed" if wrong[0] < layers else f"probed, and the model has {layers}"
            raise UsageError(f"layer {wrong[0]} is {lack}", where="probes", fix=FIX)
