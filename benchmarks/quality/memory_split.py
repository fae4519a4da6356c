"""One budget of memory for weights and cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.contract import MIB, WeightType
from kvslim.devices.peak import RUNTIME_BYTES
from kvslim.errors import GateError
from kvslim.pipeline import compress
from kvslim.recipe import load_recipe
from kvslim.settings import Budget
from kvslim.types import KVLayout, Manifest, Plan
from kvslim.validation.measure import file_mib
from kvslim.weight_format import WeightFormat

# What is told of time and recall is not looked at.
BRIEF = (
    "validation.recall_items=8",
    "validation.repeats=3",
    "validation.prompts=[16]",
    "validation.contexts=[16]",
)
QUICK = (*BRIEF, "calibration.samples=8", "calibration.length=128", "validation.samples=2", "validation.length=64")
TABLE = Table(
    (
        Column("limit", "weights and cache, MiB", ".1f"),
        Column("file", "weights, MiB", ".1f"),
        Column("cache", "cache, MiB", ".2f"),
        Column("kl", "KL to fp32", ".2g"),
        Column("int4", "int4, and the cache takes the rest", ".2g"),
        Column("int8", "int8, and the cache takes the rest", ".2g"),
    )
)


BUDGETS = Table(
    (
        Column("limit", "memory, MiB"),
        Column("peak", "measured", ".0f"),
        Column("file", "weights, MiB", ".1f"),
        Column("cache", "cache, MiB", ".1f"),
        Column("kl", "KL to fp32", ".2g"),
        Column("int4", "int4, and the cache takes the rest", ".2g"),
        Column("int4_peak", "measured", ".0f"),
        Column("int8", "int8, and the cache takes the rest", ".2g"),
        Column("int8_peak", "measured", ".0f"),
    )
)


@benchmark("demo", "books", table=TABLE, quick={"sizes": (("int8", 1),), "overrides": QUICK, "context": 128})
def memory_split(
    source: Source,
    *,
    sizes: tuple[tuple[str, float], ...] = (("int4", 8), ("int4", 4), ("int8", 8), ("int8", 4)),
    context: int = 2048,
    overrides: tuple[str, ...] = BRIEF,
) -> Iterator[Values]:
    """What weights and cache lose together within a budget of memory, split by measurement or by rule.

    Budgets are those that weights in one format and a cache so many times smaller than plain take.
    """
    texts = f"calibration.source={source.calibration}", f"validation.source={source.validation}"
    settings = (*overrides, *texts, f"calibration.context={context}", "gates={}")
    whole = {kind: _made(source, kind, settings, Budget(kv_ratio=4)) for kind in ("int4", "int8")}
    for kind, ratio in sizes:
        spec = whole[kind].manifest.spec
        limit = whole[kind].file + KVLayout.of(spec, Plan.identity(spec)).bytes_at(context) / ratio / MIB
        made = _made(source, "int4", settings, Budget(memory_mib=limit + RUNTIME_BYTES / MIB, context=context))
        row = {"limit": limit, "file": made.file, "cache": made.cache(context), "kl": made.kl}
        rests = {name: _rest(source, name, settings, limit - one.file, context) for name, one in whole.items()}
        yield row | {name: None if rest is None else rest.kl for name, rest in rests.items()}


@benchmark("smollm2", table=BUDGETS, quick={"limits": (200,), "overrides": QUICK, "context": 128, "kinds": ("int4",)})
def memory_budget(
    source: Source,
    *,
    limits: tuple[int, ...] = (250, 350, 500),
    kinds: tuple[WeightType, ...] = ("int4", "int8"),
    context: int = 8192,
    overrides: tuple[str, ...] = (*BRIEF, "calibration.samples=8", "validation.samples=4"),
) -> Iterator[Values]:
    """What weights and cache lose together within MiB of memory, split by measurement or by rule, and measured peaks.

    A rule's cache takes what the plain graph's file leaves; codes that fold into matrices may make its file larger.
    """
    texts = f"calibration.source={source.calibration}", f"validation.source={source.validation}"
    timed = f"calibration.context={context}", f"validation.contexts=[{context}]"
    settings = (*overrides, *texts, *timed, "gates={}")
    files = {kind: _plain_file(source, kind) for kind in kinds}
    for limit in limits:
        made = _made(source, "int4", settings, Budget(memory_mib=limit, context=context))
        row = {"limit": limit, "file": made.file, "cache": made.cache(context), "kl": made.kl, "peak": made.peak}
        for kind, file in files.items():
            rest = _rest(source, kind, settings, limit - RUNTIME_BYTES / MIB - file, context)
            row |= {} if rest is None else {kind: rest.kl, f"{kind}_peak": rest.peak}
        yield row


class _Made(NamedTuple):
    """An artifact, and the size of its graph and weights in MiB."""

    manifest: Manifest
    file: float

    @property
    def kl(self) -> float | None:
        """What weights and cache lose together."""
        return None if self.manifest.report is None else self.manifest.report.artifact.kl_to_original

    @property
    def peak(self) -> float | None:
        """MiB of a process that decodes with a full cache."""
        return None if self.manifest.report is None else self.manifest.report.artifact.peak_rss_mib

    def cache(self, context: int) -> float:
        """MiB of the cache."""
        return self.manifest.kv_layout.bytes_at(context) / MIB


def _made(source: Source, kind: str, settings: Sequence[str], budget: Budget) -> _Made:
    folder = Path(tempfile.mkdtemp(dir=source.folder)) / "artifact"
    recipe = load_recipe("small", [*settings, f"weights={kind}"]).within(budget)
    return _Made(compress(source.model, recipe, folder), file_mib(folder))


def _plain_file(source: Source, kind: WeightType) -> float:
    """MiB of the plain graph with its weights in one format."""
    model = OpenModel(source, LITTLE, weights=WeightFormat(type=kind))
    folder = model.export()
    model.release()
    return file_mib(folder)


def _rest(source: Source, kind: str, settings: Sequence[str], mib: float, context: int) -> _Made | None:
    """Weights in one format, and the rest of a limit for the cache; None where nothing fits."""
    try:
        return _made(source, kind, settings, Budget(kv_mib=mib, context=context)) if mib > 0 else None
    except GateError:
        return None
