"""Shipped recipes, as `kvslim compress` measures them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.registry import Values, benchmark
from benchmarks.rows import Row
from benchmarks.subjects import Source
from kvslim.measures import Measures
from kvslim.pipeline import compress
from kvslim.recipe import load_recipe
from kvslim.report.tables import RATIO, measures_table

SHORT = (
    "validation.prompts=[16]",
    "validation.contexts=[16]",
    "validation.repeats=3",
    "validation.samples=2",
    "validation.length=48",
    "validation.recall_items=2",
    "validation.recall_distance=16",
    "calibration.samples=4",
    "calibration.length=48",
)
COLUMNS = ("plain", "artifact", RATIO, "floor")


def table(rows: Sequence[Row]) -> str:
    """One line per measure, one column per row."""
    columns: dict[str, dict[str, Any]] = {}
    for row in rows:
        columns.setdefault(str(row.values["column"]), {}).update(_unflattened(row.values))
    if "floor" in columns:
        columns["floor"] = columns.pop("floor")
    found = {name: Measures.model_validate(measures) for name, measures in columns.items()}
    return measures_table(found).markdown()


@benchmark("demo", table=table, quick={"names": ("balanced",), "overrides": SHORT})
def recipes(
    source: Source,
    *,
    names: tuple[str, ...] = ("lossless", "balanced", "small"),
    overrides: tuple[str, ...] = (),
) -> Iterator[Values]:
    """The model under each shipped recipe, next to its plain export, as `kvslim compress` measures it; fp32 weights."""
    for place, name in enumerate(names):
        texts = f"calibration.source={source.calibration}", f"validation.source={source.validation}", "weights=fp32"
        report = compress(source.model, load_recipe(name, (*overrides, *texts)), source.folder / name).report
        assert report is not None
        if not place:
            yield {"column": "plain", **flattened(report.plain)}
        yield {"column": f"`{name}`", **flattened(report.artifact)}
    yield {"column": "floor", **flattened(report.floor)}


ENCODER = ("validation.prompts=[32,128,512]", "validation.repeats=24")
BRIEF_ENCODER = ("validation.prompts=[16]", "validation.repeats=3", "validation.samples=8", "validation.length=48")


@benchmark("minilm", table=table, quick={"overrides": BRIEF_ENCODER})
def encoder(source: Source, *, overrides: tuple[str, ...] = ENCODER) -> Iterator[Values]:
    """A sentence encoder under the recipe `encoder`, next to its plain export, as `kvslim compress` measures it."""
    report = compress(source.model, load_recipe("encoder", overrides), source.folder / "encoder").report
    assert report is not None
    for column in COLUMNS:
        yield {"column": column, **flattened(getattr(report, column))}


def flattened(measures: Measures) -> Values:
    """What was measured, without quartiles; of a time by length, one value for each, as in `tpot_ms.128`."""
    values: Values = {}
    quartiles = {name for name in Measures.model_fields if name.endswith("_quartiles_ms")}
    for name, value in measures.model_dump(exclude_none=True, exclude=quartiles).items():
        values |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return values


def _unflattened(values: Values) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        metric, dot, key = name.partition(".")
        if dot:
            found.setdefault(metric, {})[key] = value
        elif name != "column":
            found[name] = value
    return found
