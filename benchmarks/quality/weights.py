"""Formats of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, USUAL
from kvslim.runtime.session import DecodeSession
from kvslim.validation.measure import file_mib
from kvslim.validation.quality import measure_all, measure_floor, measure_quality
from kvslim.weight_format import WeightFormat

FORMATS: dict[str, WeightFormat] = {
    str(format_): format_
    for format_ in (
        WeightFormat(),
        WeightFormat(type="int8", block=32),
        WeightFormat(type="int8"),
        WeightFormat(type="int4", method="rtn"),
        WeightFormat(type="int4", block=128),
        WeightFormat(type="int4"),
        WeightFormat(type="int4", method="gptq", block=128),
        WeightFormat(type="int4", method="gptq"),
        WeightFormat(type="int4", method="gptq", mixed=True),
        WeightFormat(type="stored"),
    )
}
PICKED = ("int4 (k_quant)", "int4 (gptq, mixed)")  # whose sizes are limits
TABLE = Table(
    (
        Column("weights", "weights"),
        Column("mib", "MiB", ".1f"),
        Column("kl", "KL", ".2g"),
        Column("kl_p99", "KL p99", ".2g"),
        Column("kl_as_run", "KL as it runs", ".2g"),
        Column("top1", "same top token", ".3f"),
        Column("perplexity", "perplexity", ".3f"),
    )
)
CACHE_TABLE = Table(
    (
        Column("weights", "weights"),
        Column("kl", "KL", ".2g"),
        Column("kl_as_run", "KL as it runs", ".2g"),
        Column("floor", "floor", ".2g"),
    )
)


@benchmark(
    "demo",
    "books",
    "smollm2",
    table=TABLE,
    quick={"text": BRIEF, "formats": ("fp32", "int4 (gptq)"), "picked": ("fp32",)},
)
def weights(
    source: Source,
    *,
    text: Mapping[str, Any] = USUAL,
    formats: tuple[str, ...] = tuple(FORMATS),
    picked: tuple[str, ...] = PICKED,
) -> Iterator[Values]:
    """What weight formats cost: plain graphs against the float32 one, on held-out text.

    Measured through the cache, with activations in float32 and once more with activations as onnxruntime rounds them.
    The last rows have bits and blocks picked by measurement, within the size of an earlier row.
    """
    source = source._replace(recall=None)
    original = OpenModel(source, text)
    sizes = {}
    for name in formats:
        if name != "stored" or source.model.endswith(".gguf"):
            row = cost(source, text, FORMATS[name], original)
            sizes[name] = row["mib"]
            yield row
    for name in picked:
        yield cost(source, text, WeightFormat(type="int4", method="gptq", file_mib=round(sizes[name], 1)), original)


def cost(source: Source, text: Mapping[str, Any], weights: WeightFormat, original: OpenModel) -> dict[str, Any]:
    """What the plain graph of a model with its weights in a format loses against that of the original."""
    model = OpenModel(source, text, weights=weights)
    folder = model.export()
    model.release()
    found, as_run = (
        measure_quality(original.plain, _opened(folder, original.windows, floats), original.windows)
        for floats in (True, False)
    )
    return {
        "weights": str(weights),
        "mib": file_mib(folder),
        "kl": found.kl_mean,
        "kl_p99": found.kl_p99,
        "kl_as_run": as_run.kl_mean,
        "top1": found.top1_agreement,
        "perplexity": found.perplexity,
    }


@benchmark(
    "smollm2", table=CACHE_TABLE, quick={"text": BRIEF, "formats": ("int4 (k_quant)",), "methods": ("kv_quant",)}
)
def weights_and_cache(
    source: Source,
    *,
    text: Mapping[str, Any] = USUAL,
    formats: tuple[str, ...] = ("fp32", "int4 (k_quant)", "int4 (gptq)", "stored"),
    methods: tuple[str, ...] = ("kv_quant", "kv_hdc"),
) -> Iterator[Values]:
    """What an int8 cache costs on top of quantised weights: artifact against the plain graph with the same weights.

    The floor is that plain graph against itself token by token.
    """
    source = source._replace(recall=None)
    for name in formats:
        model = OpenModel(source, text, weights=FORMATS[name])
        plain = model.export()
        for method in methods:
            folder = model.export(model.decided(method))
            found, as_run = (
                measure_all(*(_opened(graph, model.windows, floats) for graph in (plain, folder)), model.windows)
                for floats in (True, False)
            )
            floor = measure_floor(_opened(plain, model.windows, False), model.windows)
            yield {
                "weights": f"{name}, {method}",
                "kl": found.artifact.kl_mean,
                "kl_as_run": as_run.artifact.kl_mean,
                "floor": floor.kl_mean,
            }
        model.release()


def _opened(folder: Path, windows: np.ndarray, float_activations: bool) -> DecodeSession:
    return DecodeSession(folder, capacity=windows.shape[1], all_positions=True, float_activations=float_activations)
