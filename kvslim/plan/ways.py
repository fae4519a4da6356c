"""The ways to keep a layer: what each takes in bytes and in time, and what it is expected to lose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvslim.caches.coded import rank_step
from kvslim.contract import ModelSpec
from kvslim.methods.prune_layers import GONE
from kvslim.plan.allocate import Option, hull
from kvslim.plan.cost import STEP, SideCosts, bundled, choices
from kvslim.plan.probes import Price
from kvslim.types import KVLayout, LayerPlan, Plan

Way = tuple[Option, LayerPlan]


class Change(NamedTuple):
    """What may be done to a layer besides coding its cache.

    Attributes:
        update: Of the layer's plan.
        loss: Divergence that it makes.
        share: Of what the codes of the cache lose, the part that is still lost; 0 where no cache is left to code.
    """

    update: dict[str, object]
    loss: float
    share: float = 1.0


@dataclass(frozen=True)
class Ways:
    """Makes ways.

    Attributes:
        spec: The model's shape.
        base: The plan that changes nothing.
        context: Target context in tokens, at which bytes and time are counted.
        time: Of a layer for one token at that context.
        timed: Whether time is limited too.
    """

    spec: ModelSpec
    base: Plan
    context: int
    time: Callable[[LayerPlan], float]
    timed: bool

    def coded(
        self, layer: LayerPlan, costs: tuple[SideCosts, SideCosts], priced: tuple[Price, Price], bits: int
    ) -> list[Way]:
        """The best codes of a layer's cache in each size."""
        window = self.spec.windows[layer.layer]
        ways: list[Way] = []
        for width in range(rank_step(window), (2 if bits == 4 else 1) * self.spec.head_dim + 1, STEP):
            possible = list(choices(self.spec, window, width, bits))
            if not possible:
                continue
            (key_loss, key), (value_loss, value) = (
                min((price.of(cost.cost(choice, bits)), choice) for choice in possible)
                for price, cost in zip(priced, costs, strict=True)
            )
            ways.append(self._way(bundled(layer, key, value, bits), key_loss + value_loss, len(ways)))
        return ways

    def changed(self, ways: Sequence[Way], changes: Iterable[Change]) -> list[Way]:
        """The ways of a layer, and behind them each with each of the changes."""
        found = list(ways)
        for change in changes:
            bare = self.base.layers[ways[0][1].layer]
            before = ways if change.share else [(ways[0][0], bare)]
            for option, layer in before:
                stored = layer.model_copy(update=change.update)
                found.append(self._way(stored, change.share * option.loss + change.loss, len(found)))
        return found

    def pays(self, ways: Sequence[Way], change: Change) -> bool:
        """Whether a change is the best choice at any price of bytes or time, and loses less than the least rank."""
        both = [option for option, _ in self.changed(ways, [change])]
        most = max(option.loss for option in both[: len(ways)])
        taken = hull(both)
        if self.timed:
            taken += hull([option._replace(size=option.time) for option in both])
        return any(option.name >= len(ways) and option.loss < most for option in taken)

    def _way(self, layer: LayerPlan, loss: float, name: int) -> Way:
        tensors = KVLayout.of(self.spec, self.base.model_copy(update={"layers": (layer,)})).tensors
        size = sum(tensor.bytes_per_token * tensor.rows(self.context) for tensor in tensors)
        return Option(size, loss, name, self.time(layer)), layer.model_copy(update={"score": loss})


def words(layer: LayerPlan, spec: ModelSpec) -> str:
    """What a way is, for people."""
    cost = f"expected to cost {layer.score:.1e} nats"
    if layer.heads == ():
        return f"{GONE['attention' if layer.mlp else 'block']}; {cost}"
    if layer.source is not None:
        return f"{layer.cache.describe(spec)}; {cost}"
    heads = "" if layer.heads is None else f", {len(layer.heads)} of {spec.q_heads} heads"
    mlp = "" if layer.mlp else f"; {GONE['mlp']}"
    return f"{layer.cache.describe(spec)}{heads}{mlp}; {cost}"
