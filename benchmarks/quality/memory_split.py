"""One budget of memory for weights and cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.models import OpenModel
from benchmarks.planners import branch_mib
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.contract import MIB, WeightType
from kvslim.devices.peak import open_bytes
from kvslim.devices.stored_weights import artifact_weights
from kvslim.errors import GateError
from kvslim.pipeline import compress
from kvslim.recipe import load_recipe
from kvslim.settings import Budget
from kvslim.types import Manifest
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
        Column("rule", "weights, and the cache against plain"),
        Column("rule_kl", "KL to fp32", ".2g"),
        Column("limit", "in memory, MiB", ".2f"),
        Column("file", "split within as much: weights, MiB", ".2f"),
        Column("cache", "cache, MiB", ".2f"),
        Column("used", "in memory, MiB", ".2f"),
        Column("kl", "KL to fp32", ".2g"),
    )
)
BUDGETS = Table(
    (
        Column("limit", "memory, MiB"),
        Column("how", "weights, and the rest for the cache"),
        Column("peak", "measured, MiB", ".0f"),
        Column("file", "weights, MiB", ".1f"),
        Column("cache", "cache, MiB", ".1f"),
        Column("kl", "KL to fp32", ".2g"),
    )
)


@benchmark("demo", "books", table=TABLE, quick={"sizes": (("int8", 4),), "overrides": QUICK, "context": 128})
def memory_split(
    source: Source,
    *,
    sizes: tuple[tuple[str, float], ...] = (("int4", 8), ("int4", 4), ("int8", 8), ("int8", 4)),
    context: int = 2048,
    overrides: tuple[str, ...] = BRIEF,
) -> Iterator[Values]:
    """What weights and cache lose together in the same memory, split by measurement or by rule.

    A rule takes weights in one format and a cache so many times smaller than plain. Memory is that of weights, cache
    and the branches that read it, as it is predicted: of models so small a measured peak says little.
    """
    settings = _settings(source, overrides, context)
    for kind, ratio in sizes:
        rule = _made(source, kind, settings, Budget(kv_ratio=ratio))
        opened = open_bytes(rule.manifest.spec.layers) / MIB
        limit = rule.memory(context)
        made = _made(source, "int4", settings, Budget(memory_mib=limit + opened, context=context))
        row = {"rule": f"{kind}, {ratio:g} times smaller", "rule_kl": rule.kl, "limit": limit}
        yield row | {"file": made.file, "cache": made.cache(context), "used": made.memory(context), "kl": made.kl}


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

    A rule's cache takes what the plain graph leaves. Codes, and matrices that they fold into, come on top: where the
    peak is above the limit then, the rule is made again, with a cache that is so much smaller.
    """
    settings = (*_settings(source, overrides, context), f"validation.contexts=[{context}]")
    for limit in limits:
        made = _made(source, "int4", settings, Budget(memory_mib=limit, context=context))
        yield {"limit": limit, "how": "split by measurement", **made.measured(context)}
        for kind in kinds:
            mib = limit - _plain_memory(source, kind)
            rule = _rule(source, kind, settings, mib, context)
            if rule is not None and rule.peak is not None and rule.peak > limit:
                yield {"limit": limit, "how": f"{kind}, above the limit", **rule.measured(context)}
                rule = _rule(source, kind, settings, rule.cache(context) - (rule.peak - limit), context)
            if rule is not None:
                yield {"limit": limit, "how": kind, **rule.measured(context)}


def _settings(source: Source, overrides: Sequence[str], context: int) -> tuple[str, ...]:
    texts = f"calibration.source={source.calibration}", f"validation.source={source.validation}"
    return (*overrides, *texts, f"calibration.context={context}", "gates={}")


class _Made(NamedTuple):
    """An artifact, the size of its graph and weights in MiB, and what its weights take in memory."""

    manifest: Manifest
    file: float
    weights: float

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

    def memory(self, context: int) -> float:
        """MiB of weights, cache and branches in memory."""
        return self.weights + self.cache(context) + branch_mib(self.manifest.plan)

    def measured(self, context: int) -> Values:
        """What a row tells of it."""
        return {"peak": self.peak, "file": self.file, "cache": self.cache(context), "kl": self.kl}


def _made(source: Source, kind: str, settings: Sequence[str], budget: Budget) -> _Made:
    folder = Path(tempfile.mkdtemp(dir=source.folder)) / "artifact"
    recipe = load_recipe("small", [*settings, f"weights={kind}"]).within(budget)
    manifest = compress(source.model, recipe, folder)
    weights = artifact_weights(folder, manifest.spec, kind, 0).decoding + manifest.spec.rope_bytes  # as a budget counts
    return _Made(manifest, file_mib(folder), weights / MIB)


def _plain_memory(source: Source, kind: WeightType) -> float:
    """MiB of a process that has the plain graph open, with its weights in one format, but for its cache."""
    model = OpenModel(source, LITTLE, weights=WeightFormat(type=kind))
    folder = model.export()
    model.release()
    return (artifact_weights(folder, model.spec, kind, 0).decoding + open_bytes(model.spec.layers)) / MIB


def _rule(source: Source, kind: str, settings: Sequence[str], mib: float, context: int) -> _Made | None:
    """Weights in one format, and so many MiB for the cache; None where nothing fits."""
    try:
        return _made(source, kind, settings, Budget(kv_mib=mib, context=context)) if mib > 0 else None
    except GateError:
        return None
