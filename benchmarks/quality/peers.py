"""What the cache types of llama.cpp and onnxruntime-genai cost on the same model, next to KVSlim's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.quality.codecs import CODECS
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Plot, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF

TEXT = {
    "calibration": {"samples": 16, "length": 512},
    "validation": {"samples": 8, "length": 512},
}
GGML: dict[str, dict[str, Any]] = {
    "llama.cpp f16": {"key": "F16", "value": "F16"},
    "llama.cpp q8_0": {"key": "Q8_0", "value": "Q8_0"},
    "llama.cpp q8_0, q4_0": {"key": "Q8_0", "value": "Q4_0"},
    "llama.cpp q5_0": {"key": "Q5_0", "value": "Q5_0"},
    "llama.cpp q5_0, q4_0": {"key": "Q5_0", "value": "Q4_0"},
    "llama.cpp q4_0": {"key": "Q4_0", "value": "Q4_0"},
    "rotated q5_0": {"key": "Q5_0", "value": "Q5_0", "rotated": True},
    "rotated q4_0": {"key": "Q4_0", "value": "Q4_0", "rotated": True},
}
STATIC = {
    "genai int8": CODECS["minmax int8"],
    "genai int4": CODECS["minmax int4"],
    "KVSlim `kv_quant` int8": CODECS["`kv_quant` int8"],
    "KVSlim `kv_hdc` int8": CODECS["`kv_hdc` int8, one step"],
    "KVSlim `kv_hdc` int4": CODECS["`kv_hdc` int4, per channel"],
}
TABLE = Table(
    (
        Column("codec", "cache (keys, values)"),
        Column("bytes", "bytes per token", ",.0f"),
        Column("fp32_ratio", "smaller than fp32", ".2f"),
        Column("fp16_ratio", "than fp16", ".2f"),
        Column("kl", "KL", ".2g"),
    )
)
PLOT = Plot(
    x=("bytes", "bytes per token"),
    ys={"kl": "mean KL, nats per token"},
    name="codec",
    styles={"llama.cpp": "s", "rotated": "d", "genai": "x", "KVSlim": "^", "planner": ".-"},
    logarithmic=frozenset({"kl"}),
)


@benchmark("smollm2", table=TABLE, plot=PLOT, quick={"text": BRIEF, "ratios": (8,)})
def peers(
    source: Source,
    *,
    text: Mapping[str, Any] = TEXT,
    ratios: tuple[float, ...] = (16 / 3, 8, 32 / 3, 16),
) -> Iterator[Values]:
    """What cache types of llama.cpp and of onnxruntime-genai cost on the same model: KL by bytes per token.

    In torch, on held-out text of another domain than the calibration text. llama.cpp's types scale every block of 32
    numbers anew, KVSlim's and genai's steps are fixed by calibration. "rotated" turns keys and values by a Hadamard
    matrix first. Rows of the planner refit output projections where that pays.
    """
    model = OpenModel(source, text)
    whole = model.size(model.identity)

    def row(codec: str, size: float, kl: float) -> Values:
        return {"codec": codec, "bytes": size, "fp32_ratio": whole / size, "fp16_ratio": whole / 2 / size, "kl": kl}

    for name, kept in GGML.items():
        size, codes = model.in_ggml(**kept)
        yield row(name, size, model.kl(codes))
    for name, methods in STATIC.items():
        plan = model.decided(*methods)
        yield row(name, model.size(plan), model.kl(model.codes(plan)))
    for ratio in ratios:
        plan, _ = model.compensated(model.planner.planned(ratio).plan)
        yield row(f"planner, {ratio:.4g} times", model.size(plan), model.kl(model.codes(plan)))
