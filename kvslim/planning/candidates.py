"""The candidates to keep a layer: what each takes in bytes and in time, and what it is expected to lose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import ConfigDict

from kvslim.caches import FullCache, SharedCache
from kvslim.caches.coded import rank_step
from kvslim.contract import Frozen, ModelSpec
from kvslim.methods.kv_window import windowed
from kvslim.methods.prune_layers import GONE
from kvslim.planning.allocate import Option, hull
from kvslim.planning.cost import STEP, SideCosts, bundled, choices
from kvslim.planning.decode_time import DecodeTime
from kvslim.planning.prices import Price
from kvslim.types import KVLayout, LayerPlan, Plan

SINKS = 4
DEARER = 2  # several alterations lose more than each alone, and codes are expected to lose twice what they turn out to


class Alteration(Frozen):
    """What may be done to a layer besides coding its cache.

    Attributes:
        heads: Query heads that stay, none to remove the attention; None to leave them alone.
        mlp: Whether the feed-forward part stays.
        width: Channels of it that stay; None for all.
        window: Recent tokens that are kept, beside sinks; None for all.
        source: Earlier layer whose cache is read instead of its own; None to keep its own.
        loss: Divergence that it makes, nats per token.
        share: Of what the codes of the cache lose, the part that is still lost; 0 where no cache is left to code.
    """

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    heads: tuple[int, ...] | None = None
    mlp: bool = True
    width: int | None = None
    window: int | None = None
    source: int | None = None
    loss: float = 0.0
    share: float = 1.0


class Candidate(Frozen):
    """One way to keep a layer.

    Attributes:
        layer: The plan of the layer.
        size: Bytes at the target context.
        time: Work of one token at the target context; see `DecodeTime`.
        loss: Divergence that it is expected to make, nats per token.
    """

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    layer: LayerPlan
    size: float
    time: float
    loss: float


@dataclass(frozen=True)
class CandidateMaker:
    """Makes candidates.

    Attributes:
        spec: The model's shape.
        base: The plan that changes nothing.
        time: Of a layer for one token, at the target context, at which bytes are counted too.
        timed: Whether time is limited too.
    """

    spec: ModelSpec
    base: Plan
    time: DecodeTime
    timed: bool

    def coded(
        self, layer: LayerPlan, costs: tuple[SideCosts, SideCosts], prices: tuple[Price, Price], bits: int
    ) -> list[Candidate]:
        """The best codes of a layer's cache in each size."""
        window = self.spec.windows[layer.layer]
        candidates: list[Candidate] = []
        for width in range(rank_step(window), (2 if bits == 4 else 1) * self.spec.head_dim + 1, STEP):
            possible = list(choices(self.spec, window, width, bits))
            if not possible:
                continue
            (key_loss, key), (value_loss, value) = (
                min((price.of(cost.cost(choice, bits)), choice) for choice in possible)
                for price, cost in zip(prices, costs, strict=True)
            )
            candidates.append(self._candidate(bundled(layer, key, value, bits), key_loss + value_loss))
        return candidates

    def altered(self, candidates: Sequence[Candidate], alterations: Iterable[Alteration]) -> list[Candidate]:
        """The candidates of a layer, and behind them each with each of the alterations."""
        found = list(candidates)
        for alteration in alterations:
            if alteration.share:
                found += [self._altered(each.layer, alteration, alteration.share * each.loss) for each in candidates]
            else:
                found.append(self._altered(self.base.layers[candidates[0].layer.layer], alteration, 0.0))
        return found

    def pays(self, candidates: Sequence[Candidate], alteration: Alteration) -> bool:
        """Whether an alteration is the best at any price of bytes or time, and loses less than the least rank."""
        both = options(self.altered(candidates, [alteration]))
        most = max(option.loss for option in both[: len(candidates)])
        taken = hull(both)
        if self.timed:
            taken += hull([option._replace(size=option.time) for option in both])
        return any(option.name >= len(candidates) and option.loss < most for option in taken)

    def _altered(self, layer: LayerPlan, alteration: Alteration, loss: float) -> Candidate:
        """An altered layer, where its codes lose so much."""
        return self._candidate(altered(layer, alteration), loss + DEARER * alteration.loss)

    def _candidate(self, layer: LayerPlan, loss: float) -> Candidate:
        tensors = KVLayout.of(self.spec, self.base.model_copy(update={"layers": (layer,)})).tensors
        size = sum(tensor.bytes_per_token * tensor.rows(self.time.context) for tensor in tensors)
        scored = layer.model_copy(update={"score": loss})
        return Candidate(layer=scored, size=size, time=self.time.of_layer(layer), loss=loss)


def options(candidates: Sequence[Candidate]) -> list[Option]:
    """What an allocation needs to know of the candidates, each named by its place."""
    return [Option(each.size, each.loss, place, each.time) for place, each in enumerate(candidates)]


def altered(layer: LayerPlan, alteration: Alteration) -> LayerPlan:
    """A layer's plan with an alteration; what that leaves alone stays."""
    update: dict[str, object] = {}
    if alteration.heads is not None:
        update["heads"] = alteration.heads
    if not alteration.mlp:
        update["mlp"] = False
    if alteration.width is not None and layer.mlp:
        update["mlp_width"] = alteration.width
    if alteration.window is not None and isinstance(layer.cache, FullCache):
        update["cache"] = windowed(layer.cache, alteration.window, SINKS)
    if alteration.source is not None:
        update["cache"] = SharedCache(source=alteration.source)
    return layer.model_copy(update=update)


def reason_of(layer: LayerPlan, spec: ModelSpec) -> str:
    """What is done to a layer, in words, and what that is expected to cost."""
    parts = [GONE["attention" if layer.mlp else "block"] if layer.heads == () else layer.cache.describe(spec)]
    if layer.heads and layer.source is None:
        parts[0] += f", {len(layer.heads)} of {spec.q_heads} heads"
    if not layer.mlp and layer.heads != ():
        parts.append(GONE["mlp"])
    if layer.mlp_width is not None:
        parts.append(f"{layer.mlp_width:,} channels of the feed-forward part")
    return "; ".join([*parts, f"expected to cost {layer.score:.1e} nats"])
