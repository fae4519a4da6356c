"""What `kvslim analyze` shows: tables, what their words mean, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import yaml

from kvslim.contract import Part
from kvslim.planning.analyze import RECENT, Analysis, LayerAnalysis
from kvslim.report.tables import NONE, Table

TOLERABLE = 0.01  # mean KL, nats per token: the limit of the recipe `balanced`
LAZY = 0.99  # least share of attention on sinks and recent tokens where a window fits
NEAR = 0.1  # most of the scores and of the outputs that may be missed where a layer reads another's cache
WORDS = {
    "KL": "nats per token, to the model as it is, with one part alone left out; the recipe balanced allows 0.01",
    "both": "the layer's attention and MLP",
    "influence": "how much the layer turns the hidden states: 1 - mean cosine of before and after",
    "rank K, V": "dimensions that hold 99 % of the scores, and of what attention adds",
    "recent": f"attention on the first tokens and the last {RECENT}, of the head that looks back most",
    "source": "the earlier layer whose cache stands best for this one's, and what it misses of scores and outputs",
    "clusters": "groups of query heads that attend alike",
    "fluctuation": "of each query head: how much what it adds varies; its mean can stand for the rest",
    "Taylor": "of each query head: how steeply the loss changes with it, nats per token",
}


class Removal(NamedTuple):
    """A part or a kv head that could go, and the KL without it alone."""

    kl: float
    layer: int
    part: Part | None = None
    kv_head: int | None = None

    def __str__(self) -> str:
        named = {"attention": "the attention", "mlp": "the MLP"}.get(self.part or "", f"kv head {self.kv_head}")
        return f"{named} of layer {self.layer}"


def parts_table(analysis: Analysis) -> Table:
    """How important the parts of each layer are for a text, and what its cache needs."""
    header = ("layer", "KL without attention", "MLP", "both", "influence", "rank K", "rank V", "recent", "source: K, V")
    rows = tuple(
        (
            str(layer.layer),
            *(f"{kl:.2g}" for kl in layer.part_kl),
            f"{layer.block_influence:.2g}",
            str(layer.key_rank),
            str(layer.value_rank),
            f"{layer.recent_attention:.0%}",
            NONE
            if layer.source is None
            else f"{layer.source.layer}: {layer.source.key_distance:.0%}, {layer.source.value_distance:.0%}",
        )
        for layer in analysis.layers
    )
    return Table(header, rows)


def heads_table(analysis: Analysis) -> Table:
    """How important the heads of each layer are for a text. With many heads the numbers wrap over several lines."""
    rows = tuple(
        (
            str(layer.layer),
            str(layer.clusters),
            *(_row(scores) for scores in (layer.kv_head_kl, layer.fluctuation, layer.taylor)),
        )
        for layer in analysis.layers
    )
    return Table(("layer", "clusters", "KL without each kv head", "fluctuation", "Taylor"), rows, words=True)


def words() -> Iterator[str]:
    """What the words of the tables mean, a line each."""
    width = max(map(len, WORDS))
    return (f"{word:<{width}}  {meaning}" for word, meaning in WORDS.items())


def conclusions(analysis: Analysis) -> Iterator[str]:
    """What follows for a model that serves this text, a sentence each."""
    yield _on_removals(analysis)
    yield _on_windows(analysis)
    yield _on_ranks(analysis)
    yield _on_sources(analysis)


def spare(analysis: Analysis, most: float) -> tuple[Removal, ...]:
    """What can go at once, cheapest first, for `most` KL together; one thing at most from each layer.

    What they cost together is taken for the sum of what each costs alone, as the planner does.
    """
    found: list[Removal] = []
    for removal in sorted(_removals(analysis.layers), key=_kl):
        if sum(other.kl for other in found) + removal.kl > most:
            break
        if all(removal.layer != other.layer for other in found):
            found.append(removal)
    return tuple(found)


def without(analysis: Analysis, removals: Sequence[Removal]) -> str:
    """The value of `methods` in a recipe that removes these, and rounds the cache of what stays to 8 bits."""
    first = analysis.layers[0]
    group = len(first.fluctuation) // len(first.kv_head_kl)
    parts = {removal.layer: removal.part for removal in sorted(removals, key=_layer) if removal.part}
    heads = {
        removal.layer: list(range(removal.kv_head * group, (removal.kv_head + 1) * group))
        for removal in sorted(removals, key=_layer)
        if removal.kv_head is not None
    }
    methods = [
        *([{"prune_layers": {"layers": parts}}] if parts else []),
        *([{"prune_heads": {"heads": heads}}] if heads else []),
        "kv_quant",
    ]
    return str(yaml.safe_dump(methods, default_flow_style=True, width=10**6)).strip()


def _removals(layers: Sequence[LayerAnalysis]) -> Iterator[Removal]:
    for layer in layers:
        yield Removal(layer.attention_kl, layer.layer, "attention")
        yield Removal(layer.mlp_kl, layer.layer, "mlp")
        if len(layer.kv_head_kl) > 1:
            yield from (Removal(kl, layer.layer, kv_head=head) for head, kl in enumerate(layer.kv_head_kl))


def _kl(removal: Removal) -> float:
    return removal.kl


def _layer(removal: Removal) -> int:
    return removal.layer


def _on_removals(analysis: Analysis) -> str:
    found = spare(analysis, TOLERABLE)
    if not found:
        least = min(_removals(analysis.layers), key=_kl)
        return f"No part can go for a KL of {TOLERABLE}; the cheapest is {least}, for {least.kl:.2g}."
    together = sum(removal.kl for removal in found)
    return f"For a KL of about {together:.2g} together, these can go: {', '.join(map(str, found))}."


def _on_windows(analysis: Analysis) -> str:
    if analysis.length < 2 * RECENT:
        return f"Texts of {analysis.length} tokens are too short to say who looks back further than {RECENT}."
    lazy = [layer.layer for layer in analysis.layers if layer.recent_attention >= LAZY]
    if not lazy:
        return f"No layer keeps 99 % of its attention within {RECENT} tokens: a window would cost."
    named = f"layer{'s' if len(lazy) > 1 else ''} {', '.join(map(str, lazy))}"
    return f"A window of {RECENT} tokens (kv_window) leaves 99 % of the attention of {named}."


def _on_ranks(analysis: Analysis) -> str:
    keys, values = ([getattr(layer, name) for layer in analysis.layers] for name in ("key_rank", "value_rank"))
    half = [side for side, ranks in (("keys", keys), ("values", values)) if 2 * max(ranks) <= analysis.head_dim]
    spare_half = f"half of the dimensions of {' and '.join(half)} can go (kv_pca)"
    follows = spare_half if half else "half of them would be too few, so take fewer bits first"
    return (
        f"Of {analysis.head_dim} dimensions keys need {min(keys)} to {max(keys)} and values {min(values)} to "
        f"{max(values)} for 99 %: {follows}."
    )


def _on_sources(analysis: Analysis) -> str:
    sources = {layer.layer: layer.source for layer in analysis.layers if layer.source is not None}
    near = [
        f"layer {layer} that of layer {source.layer}"
        for layer, source in sources.items()
        if max(source.key_distance, source.value_distance) <= NEAR
    ]
    if near:
        return f"Caches to share (share_kv): {', '.join(near)}."
    return "No layer can read another's cache (share_kv): each misses more than 10 % of scores or outputs."


def _row(scores: Sequence[float]) -> str:
    return " ".join(f"{score:.1g}" for score in scores)
