"""A real model under the shipped recipes, as `kvslim compress` measures it, beside onnxruntime-genai's int8 cache."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence

from benchmarks.quality.codecs import CODECS
from benchmarks.quality.recipes import SHORT, flattened
from benchmarks.registry import Values, benchmark
from benchmarks.render import cell, markdown
from benchmarks.rows import Row
from benchmarks.subjects import Source
from kvslim.pipeline import compress
from kvslim.recipe import Recipe, load_recipe, parse_recipe

CONTEXT = 8192
LINES = {
    "kv_bytes_per_token": ("KV cache, bytes per token", ",.0f"),
    "mib_at_8k": (f"KV cache at {CONTEXT:,} tokens, MiB", ".1f"),
    "kl_mean": ("KL to plain, mean", ".2g"),
    "kl_by_position.4096": ("KL of tokens 2,049 to 4,096", ".2g"),
    "top1_agreement": ("Same most likely token", ".1%"),
    "perplexity": ("Perplexity", ".2f"),
    "recall": ("Recall", ".1%"),
    "recall_lost": ("Recall lost to plain, of the same questions", ".1%"),
    "tpot_ms.128": ("ms per token, context of 128", ".1f"),
    "ratio.tpot_ms.128": ("to plain", ".2f"),
    "tpot_ms.2048": ("ms per token, context of 2,048", ".1f"),
    "ratio.tpot_ms.2048": ("to plain", ".2f"),
    "tpot_ms.8000": ("ms per token, context of 8,000", ".1f"),
    "ratio.tpot_ms.8000": ("to plain", ".2f"),
    "ttft_ms.512": ("ms to the first token, prompt of 512", ".0f"),
    "ratio.ttft_ms.512": ("to plain", ".2f"),
    "ttft_ms.4096": ("ms to the first token, prompt of 4,096", ".0f"),
    "ratio.ttft_ms.4096": ("to plain", ".2f"),
    "minutes": ("Minutes to compress and validate", ".1f"),
}
TIMED = ("validation.contexts=[128,2048,8000]",)


def table(rows: Sequence[Row]) -> str:
    """One line per measure, one column per row."""
    columns = [row.values for row in rows]
    body = [[title, *(cell(column.get(key), format_) for column in columns)] for key, (title, format_) in LINES.items()]
    return markdown(["", *(str(column["column"]) for column in columns)], body)


@benchmark("smollm2", table=table, quick={"names": ("lossless",), "own_text": (), "overrides": SHORT})
def real(
    source: Source,
    *,
    names: tuple[str, ...] = ("lossless", "balanced", "small"),
    own_text: tuple[str, ...] = ("small",),
    overrides: tuple[str, ...] = TIMED,
) -> Iterator[Values]:
    """A real model, calibrated and judged on texts of two domains: shipped recipes beside genai's int8 calibration.

    Recipes of `own_text` are calibrated once more on what the model writes itself, as they are where no text is named.

    `genai int8` is static per-channel calibration by the largest value, as onnxruntime-genai does it, in the same graph
    and measured the same way. Times are medians; ratios are to plain, in turns in the same run.
    """
    judged = *overrides, f"validation.source={source.validation}", "weights=fp32"
    texts = f"calibration.source={source.calibration}", *judged
    shipped = {f"`{name}`": load_recipe(name, texts) for name in names}
    shipped |= {f"`{name}`, own text": load_recipe(name, judged) for name in own_text}
    lossless = load_recipe("lossless", texts).model_dump(exclude={"methods", "gates"})
    minmax = {"name": "genai", "methods": CODECS["minmax int8"], "compensate": False}
    genai = parse_recipe({**lossless, **minmax}, where="benchmark")
    for place, (column, recipe) in enumerate({"genai int8": genai, **shipped}.items()):
        yield from _columns(source, column, recipe, with_plain=not place)


def _columns(source: Source, column: str, recipe: Recipe, *, with_plain: bool) -> Iterator[Values]:
    started = time.monotonic()
    folder = source.folder / re.sub("[^a-z0-9]+", "-", column)
    manifest = compress(source.model, recipe, folder)
    minutes = (time.monotonic() - started) / 60
    report = manifest.report
    assert report is not None
    plain = report.plain.kv_bytes_per_token or 0.0
    if with_plain:
        yield {"column": "plain", "mib_at_8k": plain * CONTEXT / 2**20, **flattened(report.plain)}
    yield {
        "column": column,
        "mib_at_8k": manifest.kv_layout.bytes_at(CONTEXT) / 2**20,
        "minutes": minutes,
        "passed": report.passed,
        "recall_lost": (report.plain.recall or 0.0) - (report.artifact.recall or 0.0),
        **{f"ratio.{name}": ratio for name, ratio in flattened(report.ratio).items()},
        **flattened(report.artifact),
    }
