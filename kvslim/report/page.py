"""`report.html`: one self-contained page of tables and figures, made from manifests alone.

The page loads no script, font or picture from elsewhere, and follows the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined

from kvslim.report.card import name_of
from kvslim.report.compare import Comparison, Regression, comparison_table, regressions_table
from kvslim.report.figures import Figure, Limits, figures
from kvslim.report.tables import Table, decisions_table, frontier_table, gates_table, report_table
from kvslim.types import Manifest, Plan, Report

REPORT = "report.html"
TEMPLATE = "report.html.j2"
BASELINE = (
    "Plain is the same model, exported the same way, with its cache in fp32; floor is that export against itself. "
    "Quality is measured through the cache on held-out text; speed is interleaved in one run, on the machine that made "
    "the artifact."
)
QUANTISED = (
    " KL and perplexity have activations in float32; the floor and the KL with activations rounded are as it runs; "
    "fp32 is the model before its weights were quantised."
)
ENCODER_BASELINE = (
    "Plain is the same model, exported the same way, with its weights in fp32, on one text at a time; artifact and "
    "floor, which is that export again, run padded batches."
)


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    value: str
    label: str


@dataclass(frozen=True)
class Section:
    """One part of the page: text, tables and figures, in this order; `source` is text that can be unfolded."""

    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    source: str = ""

    @property
    def filled(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.figures or self.source or any(table.rows for table in self.tables))


def _baseline(encoder: bool, report: Report) -> str:
    """What the columns of the measurements are."""
    if encoder:
        return ENCODER_BASELINE
    return BASELINE if report.original is None else BASELINE + QUANTISED


def write_report(folder: Path, manifest: Manifest, limits: Limits = ()) -> None:
    """Writes report.html into an artifact's folder."""
    (folder / REPORT).write_text(artifact_page(manifest, limits), encoding="utf-8")


def artifact_page(manifest: Manifest, limits: Limits = ()) -> str:
    """The page of one artifact; the same manifest gives the same text.

    Args:
        manifest: The artifact's manifest; its file digests are not used, because the page is one of the files.
        limits: Devices with their memory in GiB.
    """
    report, recipe = manifest.report, str(manifest.recipe.get("name", "custom"))
    encoder, changed = manifest.spec.is_encoder, manifest.plan != Plan.identity(manifest.spec)
    drawn = figures({recipe: manifest}, limits)
    sections = (
        Section("Before and after", _baseline(encoder, report), (report_table(report),))
        if report
        else Section("Before and after"),
        Section("Gates", "What the recipe asks of the artifact.", (gates_table(report.gates) if report else NOTHING,)),
        Section("Figures", figures=drawn),
        Section("What the planner tried", PLANNED, (frontier_table(manifest.frontier),)),
        Section(
            "Decisions",
            "" if encoder else DECIDED,
            (decisions_table(manifest.spec, manifest.plan) if changed else NOTHING,),
        ),
        Section("Made from", tables=(_origin(manifest),), source=yaml.safe_dump(manifest.recipe, sort_keys=False)),
    )
    return _page(
        f"{name_of(manifest)}, {recipe}",
        str(manifest.recipe.get("description", "")),
        manifest.passed,
        _tiles(report) if report else (),
        sections,
    )


def comparison_page(
    comparison: Comparison,
    manifests: Mapping[str, Manifest],
    regressions: Sequence[Regression] | None = None,
    limits: Limits = (),
) -> str:
    """The page of several artifacts side by side.

    Args:
        comparison: What the manifests measured.
        manifests: The artifacts by the same names.
        regressions: What got worse than a baseline; None without a baseline.
        limits: Devices with their memory in GiB.
    """
    verdict = "Nothing is worse than the baseline." if regressions == () else ""
    passed = [column.passed for column in comparison.artifacts.values()]
    sections = (
        Section("Side by side", COMPARED, (comparison_table(comparison),)),
        Section("Against the baseline", "Worse by more than the tolerance.", (regressions_table(regressions or ()),)),
        Section("Figures", figures=figures(manifests, limits)),
        *(
            Section(f"Decisions: {name}", tables=(decisions_table(manifest.spec, manifest.plan),))
            for name, manifest in manifests.items()
            if manifest.plan != Plan.identity(manifest.spec)
        ),
    )
    known = None if None in passed else all(passed) and not regressions
    return _page(" · ".join(manifests), verdict, known, (), sections)


NOTHING = Table((), ())
PLANNED = "Plans of other sizes, measured on calibration text before any graph was made."
DECIDED = "Score is the share of the score energy that a rank keeps, the lower one of keys and values."
COMPARED = (
    "Each artifact was measured against the plain export of its own model in one run of its own; times of different "
    "machines are not comparable, but times relative to plain are."
)


def _page(title: str, lead: str, passed: bool | None, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    template = resources.files("kvslim.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        lead=lead,
        passed=passed,
        tiles=tiles,
        sections=[section for section in sections if section.filled],
    )


def _tiles(report: Report) -> tuple[Tile, ...]:
    """The numbers that most readers look for; a number that was not measured has no tile."""
    artifact, ratio = report.artifact, report.ratio
    longest = max(ratio.tpot_ms or {}, key=int, default=None)
    slowest = max(ratio.latency_ms or {}, key=int, default=None)
    tiles = (
        _tile("{:.3g}x", ratio.kv_bytes_per_token and 1 / ratio.kv_bytes_per_token, "smaller KV cache"),
        _tile("{:.3g}x", ratio.file_mib, "files, to plain"),
        _tile("{:.2g}", artifact.kl_mean, "mean KL to plain"),
        _tile("{:.1%}", artifact.recall, "recall"),
        _tile("{:.4f}", artifact.embedding_cosine_mean, "mean cosine to plain"),
        _tile("{:.3g}x", longest and (ratio.tpot_ms or {})[longest], f"time per token at {longest}, to plain"),
        _tile("{:.3g}x", slowest and (ratio.latency_ms or {})[slowest], f"latency at {slowest} tokens, to plain"),
    )
    return tuple(tile for tile in tiles if tile is not None)


def _tile(form: str, value: float | str | None, label: str) -> Tile | None:
    return Tile(form.format(value), label) if isinstance(value, float) else None


def _origin(manifest: Manifest) -> Table:
    source = manifest.source
    rows = [
        ("model", name_of(manifest)),
        *([("revision", source.revision)] if source.revision else []),
        ("SHA-256 of its files", source.sha256),
        ("weights", str(manifest.weights)),
        *([] if manifest.spec.is_encoder else [("bytes per token counted at", f"{manifest.context:,} tokens")]),
        *manifest.versions.items(),
    ]
    return Table(("", ""), tuple(rows), words=True)
