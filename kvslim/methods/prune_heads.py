"""`prune_heads`: attention without the heads that a task needs least.

A head that goes is replaced by its mean output, a bias (An et al., "Fluctuation-based Adaptive Structured Pruning for
Large Language Models", 2023, section 3.3), so what it costs is how much its output varies: the variance of what it adds
to the hidden states (their fluctuation metric, section 3.2, without a gradient). `calibrate.taylor` has the score by
gradients. Whole kv groups save cache and time; query heads inside groups save time, one from every group of a layer, so
that groups stay equal. Each head of an encoder is a group, and without a cache it saves time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kvslim.contract import ModelSpec
from kvslim.errors import UsageError
from kvslim.methods.base import Conflict, Method, check_layers
from kvslim.progress import Progress, Silent
from kvslim.transform.edits import Codes, KeptHeads, LayerEdit
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import HeadStatistics
    from kvslim.prepared.trials import Trials
    from kvslim.recipe import Recipe

Heads = tuple[int, ...]
Loss = Callable[[int, Heads], float]


class PruneHeads(Method):
    """Query heads and kv heads removed, named or chosen by score or by measured KL."""

    name: ClassVar[str] = "prune_heads"
    order: ClassVar[int] = 5
    summary: ClassVar[str] = "attention without the heads that matter least; whole kv groups take their cache along"
    supports_encoders: ClassVar[bool] = True
    either: ClassVar[tuple[str, ...]] = ("groups", "queries", "heads")

    groups: int | None = Field(
        None, ge=1, description="kv heads to remove, over all layers, with their query heads; of an encoder, heads"
    )
    queries: int | None = Field(None, ge=1, description="layers' times to remove one query head of every kv head")
    heads: dict[int, tuple[int, ...]] | None = Field(None, description="query heads to remove, by layer")
    score: Literal["kl", "fluctuation", "taylor"] = Field(
        "kl",
        description="measured loss of each removal alone (KL, of embeddings 1 - cosine), a statistic, or gradients",
    )

    @property
    def is_measured(self) -> bool:
        """Whether the choice needs the model itself."""
        return self.heads is None and self.score != "fluctuation"

    def check(self, spec: ModelSpec) -> None:
        """Refuses heads that the model does not have, unequal groups, and to remove everything."""
        where = "recipe: methods.prune_heads"
        if self.groups is None and self.queries is None and not self.heads:
            raise UsageError("it says not what to remove", where=where, fix="give groups, queries or heads")
        if spec.is_encoder and self.score == "taylor":
            raise UsageError(
                "the Taylor score needs the loss of next tokens", where=f"{where}.score", fix="use kl or fluctuation"
            )
        check_layers(self.heads or (), spec, f"{where}.heads")
        for layer, gone in (self.heads or {}).items():
            check_heads(kept(gone, spec), spec, f"{where}.heads: layer {layer}")
        most = {"groups": spec.layers * spec.kv_heads - 1, "queries": spec.layers * (spec.group_size - 1)}
        for name, limit in most.items():
            if (getattr(self, name) or 0) > limit:
                fix = f"use at most {limit}" if limit else "use groups; each kv head of this model has one query head"
                raise UsageError(f"{getattr(self, name)} are too many", where=f"{where}.{name}", fix=fix)

    @property
    def picks_heads(self) -> bool:
        """Whether it is to choose the heads."""
        return not self.heads

    def conflicts(self, others: Sequence[Method], recipe: Recipe) -> Iterator[Conflict]:
        """Heads to choose in layers that may lose them all."""
        for other in others:
            if self.picks_heads and other.takes_attention:
                message = f"prune_heads cannot count on the heads of layers that {other.name} may take"
                yield Conflict(message, "recipe: methods", "name the heads: prune_heads: {heads: {2: [0, 1]}}")

    def resolve(self, trials: Trials) -> PruneHeads:
        """The method with the heads that lose least, by the loss without each or by gradients."""
        if not self.is_measured:
            return self
        if self.score == "taylor":
            scores = trials.taylor
            return self.named_by(trials.spec, lambda layer, gone: float(scores[layer, list(gone)].sum()))

        def loss(layer: int, gone: Heads) -> float:
            return trials.divergence(PruneHeads(heads={layer: gone}))

        return self.named_by(trials.spec, loss, trials.progress)

    def named_by(self, spec: ModelSpec, loss: Loss, progress: Progress | None = None) -> PruneHeads:
        """The method with the heads that lose least.

        Args:
            spec: The model's shape.
            loss: Of removing some query heads of a layer, and nothing else.
            progress: Receives the progress.
        """
        removed: dict[int, Heads] = {}
        losses: dict[tuple[int, Heads], float] = {}
        for layer in (progress or Silent()).track(range(spec.layers), "layers to lose heads"):
            removed[layer] = ()
            losses |= {(layer, gone): loss(layer, gone) for gone in self._steps(spec, ())}
        for _ in range(self.groups or self.queries or 0):
            layer, gone = min(losses, key=losses.__getitem__)
            removed[layer] = tuple(sorted((*removed[layer], *gone)))
            known = {heads: losses.pop((where, heads)) for where, heads in list(losses) if where == layer}
            for heads in self._steps(spec, removed[layer]):
                losses[layer, heads] = known[heads] if heads in known else loss(layer, heads)
        named = {layer: gone for layer, gone in removed.items() if gone}
        return self.model_copy(update={"groups": None, "queries": None, "heads": named})

    def decide(self, spec: ModelSpec, statistics: HeadStatistics, plan: Plan) -> Plan:
        """Sets the heads that stay, with the share of fluctuation that goes as score."""
        fluctuation = statistics.fluctuation
        method = self
        if self.heads is None:
            method = self.named_by(spec, lambda layer, gone: float(fluctuation[layer, list(gone)].sum()))
        layers = []
        for layer in plan.layers:
            gone = list((method.heads or {}).get(layer.layer, ()))
            share = float(fluctuation[layer.layer, gone].sum() / fluctuation[layer.layer].sum())
            layers.append(_without(layer, kept(gone, spec), spec, share) if gone and layer.heads is None else layer)
        return plan.model_copy(update={"layers": tuple(layers)})

    def apply(self, spec: ModelSpec, statistics: HeadStatistics, plan: Plan, edits: Codes) -> Codes:
        """Adds the kept heads of each layer, and the mean output that stands for the others.

        `prune_layers` carries out what leaves a layer without any.
        """
        return tuple(
            without_heads(edit, layer, spec, statistics) if layer.heads else edit
            for layer, edit in zip(plan.layers, edits, strict=True)
        )

    def _steps(self, spec: ModelSpec, gone: Heads) -> Iterator[Heads]:
        """The query heads of each removal that is possible next in a layer."""
        left = kept(gone, spec)
        groups = [[head for head in left if head // spec.group_size == kv] for kv in range(spec.kv_heads)]
        if self.groups is not None:
            yield from (tuple(group) for group in groups if group)
        elif len(groups[0]) > 1:
            yield from zip(*groups, strict=True)


def kept(gone: Iterable[int], spec: ModelSpec) -> Heads:
    """The query heads that stay."""
    removed = set(gone)
    return tuple(head for head in range(spec.q_heads) if head not in removed)


def check_heads(heads: Heads, spec: ModelSpec, where: str) -> None:
    """Refuses heads that the model does not have, or that leave groups of different sizes.

    Raises:
        UsageError: Naming `where` they stand.
    """
    if list(heads) != sorted(set(heads) & set(range(spec.q_heads))):
        raise UsageError(
            f"heads {list(heads)} are not some of the model's {spec.q_heads}, in order",
            where=where,
            fix=f"name heads from 0 to {spec.q_heads - 1}, each once",
        )
    sizes = {sum(head // spec.group_size == kv for head in heads) for kv in range(spec.kv_heads)} - {0}
    if len(sizes) > 1:
        raise UsageError(
            f"kv heads would be read by {' or '.join(map(str, sorted(sizes)))} query heads",
            where=where,
            fix=f"leave as many of each group of {spec.group_size} that is left at all",
        )


def without_heads(edit: LayerEdit, layer: LayerPlan, spec: ModelSpec, statistics: HeadStatistics) -> LayerEdit:
    """A layer's edit with the heads alone that its plan keeps."""
    mean = statistics.output_mean[layer.layer]
    return replace(edit, heads=KeptHeads(layer.heads or (), layer.kv_heads(spec), mean))


def _without(layer: LayerPlan, heads: Heads, spec: ModelSpec, share: float) -> LayerPlan:
    update: dict[str, object] = {"heads": heads, "score": 1 - share}
    layer = layer.model_copy(update=update)
    count = spec.q_heads - len(heads)
    cached = f", {len(layer.kv_heads(spec))} of {spec.kv_heads} kv heads left" if heads else ", the cache with them"
    cached = "" if spec.is_encoder else cached
    reason = f"{count} of {spec.q_heads} heads removed with {share:.1%} of the layer's fluctuation{cached}"
    return layer.model_copy(update={"reason": reason})
