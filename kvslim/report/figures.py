"""The figures of a report, each for one manifest or for several side by side."""

from __future__ import annotations

from kvslim.report.cost_figures import latency_figure, memory_figure
from kvslim.report.figure import Figure, Limits, Named
from kvslim.report.layer_map import layer_map, stored_bits
from kvslim.report.quality_figures import distance_figure, kl_figure, position_figure, recall_figure
from kvslim.types import Manifest

LATENCIES = (
    ("tpot", "tpot_ms", "Time per token", "context, tokens"),
    ("ttft", "ttft_ms", "Time to first token", "prompt, tokens"),
    ("latency", "latency_ms", "Latency of a text", "text, tokens"),
)


def figures(manifests: Named, limits: Limits = ()) -> tuple[Figure, ...]:
    """All figures that the manifests have the numbers for.

    Args:
        manifests: By the name in the legend.
        limits: Devices with their memory in GiB.
    """
    drawn = (
        kl_figure(manifests),
        recall_figure(manifests),
        position_figure(manifests),
        distance_figure(manifests),
        *(latency_figure(manifests, *latency) for latency in LATENCIES),
        memory_figure(manifests, limits),
        *(_layers(name, manifest, len(manifests) > 1) for name, manifest in manifests.items()),
    )
    return tuple(figure for figure in drawn if figure is not None)


def _layers(name: str, manifest: Manifest, several: bool) -> Figure | None:
    if manifest.spec.is_encoder:
        return None
    legend = tuple((f"b{bits} block", "fp32" if bits == 32 else f"{bits} bits") for bits in stored_bits(manifest))
    title = f"The cache, layer by layer: {name}" if several else "The cache, layer by layer"
    return Figure("layers", title, layer_map(manifest), _LAYERS_CAPTION, legend)


_LAYERS_CAPTION = (
    "A box is a kv head, filled by the share of its dimensions that is kept; an empty box is a removed head. At the "
    "right: cached numbers per head and token (more than its dimensions if some are stored twice), their type, and the "
    "window, if there is one (sinks + recent tokens)."
)
