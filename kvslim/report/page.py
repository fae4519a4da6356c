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

from kvslim.measures import Report
from kvslim.report.advice import passing_budget
from kvslim.report.answers import Answer, compared_answer, differing
from kvslim.report.card import name_of
from kvslim.report.compare import Comparison, Regression, comparison_table, regressions_table, short_names
from kvslim.report.decisions import decisions
from kvslim.report.draft import draft_table
from kvslim.report.figure import Figure, Limits
from kvslim.report.figures import figures
from kvslim.report.healing import healing_note
from kvslim.report.matrices import formats_line, rounded_again
from kvslim.report.tables import (
    UNCERTAIN,
    Table,
    frontier_table,
    gates_table,
    plan_table,
    removals_table,
    report_table,
    timing_note,
)
from kvslim.report.tiles import Tile, failed_gates, tiles
from kvslim.types import KVLayout, Manifest, Plan

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
class Section:
    """One part of the page: text, tables, figures and answers, in this order.

    Attributes:
        title: Headline.
        text: What it shows.
        tables: Those without rows are left out.
        figures: Pictures.
        answers: Of plain export and artifact.
        folded: A headline, and a table or a text that can be unfolded under it.
    """

    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    answers: tuple[Answer, ...] = ()
    folded: tuple[str, Table | str] | None = None

    @property
    def filled(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.figures or self.answers or self.folded or any(table.rows for table in self.tables))


@dataclass(frozen=True)
class Head:
    """What stands above the sections.

    Attributes:
        title: Headline.
        lead: What the artifact is meant to be, or what a comparison found.
        passed: Whether all gates hold; None where there are none.
        failures: What failed gates asked for and what was measured.
        advice: What is expected to pass.
        tiles: Headline numbers.
        warning: Why some of them say little.
    """

    title: str
    lead: str = ""
    passed: bool | None = None
    failures: tuple[str, ...] = ()
    advice: str = ""
    tiles: tuple[Tile, ...] = ()
    warning: str = ""


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
    sections = (
        Section("Gates", "What was asked of the artifact.", (gates_table(report.gates) if report else NOTHING,)),
        Section("Figures", figures=figures({recipe: manifest}, limits)),
        _answers(report),
        Section("Before and after", _baseline(manifest.spec.is_encoder, report), (report_table(report),))
        if report
        else Section("Before and after"),
        Section("Draft", DRAFT, (draft_table(manifest.draft, report.speculation if report else None),)),
        Section("Other sizes", PLANNED, (_others(manifest),)),
        _decisions("Decisions", manifest),
        Section(
            "Made from",
            tables=(_origin(manifest),),
            folded=("Recipe", yaml.safe_dump(manifest.recipe, sort_keys=False)),
        ),
    )
    return rendered(_head(manifest, recipe), sections)


def _head(manifest: Manifest, recipe: str) -> Head:
    """Above the sections: a failed gate takes the place of what the recipe promises."""
    report, title = manifest.report, f"{name_of(manifest)}, {recipe}"
    if report is None:
        return Head(title, str(manifest.recipe.get("description", "")))
    passed, budget = bool(manifest.passed), passing_budget(manifest)
    return Head(
        title,
        str(manifest.recipe.get("description", "")) if passed else "",
        passed,
        failed_gates(report),
        "" if passed or budget is None else f"Expected to pass: kvslim compress with {budget}.",
        tiles(manifest),
        timing_note(report) or "",
    )


def _others(manifest: Manifest) -> Table:
    plain = KVLayout.of(manifest.spec, Plan.identity(manifest.spec)).bytes_per_token(manifest.context)
    return frontier_table(manifest.frontier or manifest.alike, manifest.peers, plain)


def _answers(report: Report | None) -> Section:
    found = tuple(compared_answer(sample) for sample in report.samples) if report else ()
    return Section("Sample answers", f"{ANSWERS} {differing(found)}", answers=found)


def _decisions(title: str, manifest: Manifest) -> Section:
    """What happens to the layers; nothing where nothing does."""
    spec, plan = manifest.spec, manifest.plan
    if plan == Plan.identity(spec):
        return Section(title)
    if spec.is_encoder:
        return Section(title, tables=(removals_table(plan),))
    found = decisions(spec, plan)
    return Section(title, found.shared, (found.differing,), folded=("Each layer, and why", plan_table(plan)))


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
    names = short_names(manifests)
    manifests = {names[name]: manifest for name, manifest in manifests.items()}
    verdict = "Nothing is worse than the baseline." if regressions == () else ""
    passed = [column.passed for column in comparison.artifacts.values()]
    failures = tuple(
        f"{name}, {missed}"
        for name, manifest in manifests.items()
        for missed in (failed_gates(manifest.report) if manifest.report else ())
    )
    sections = (
        Section("Side by side", COMPARED, (comparison_table(comparison),)),
        Section("Against the baseline", "Worse by more than the tolerance.", (regressions_table(regressions or ()),)),
        Section("Figures", figures=figures(manifests, limits)),
        *(_decisions(f"Decisions: {name}", manifest) for name, manifest in manifests.items()),
    )
    known = None if None in passed else all(passed) and not regressions
    doubtful = [name for name, manifest in manifests.items() if manifest.report and manifest.report.timings_uncertain]
    warning = f"{UNCERTAIN}: {', '.join(doubtful)}" if doubtful else ""
    return rendered(Head(" · ".join(manifests), verdict, known, failures, warning=warning), sections)


NOTHING = Table((), ())
DRAFT = (
    "It proposes tokens, and the model keeps those that it would have written itself. Texts were written with and "
    "without it in turns, greedily, on the machine that made the artifact."
)
PLANNED = "Other sizes of the same model and cache types of other tools, priced on calibration text in torch."
ANSWERS = "Both continue the beginnings of held-out texts with their most likely tokens. Words that differ are marked."
COMPARED = (
    "Each artifact was measured against the plain export of its own model in one run of its own; times of different "
    "machines are not comparable, but times relative to plain are."
)


def rendered(head: Head, sections: Sequence[Section]) -> str:
    """The page with that head and those sections that have something to show."""
    template = resources.files("kvslim.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filled = [section for section in sections if section.filled]
    return environment.from_string(template).render(head=head, sections=filled)


def _origin(manifest: Manifest) -> Table:
    source = manifest.source
    rows = [
        ("model", name_of(manifest)),
        *([("revision", source.revision)] if source.revision else []),
        ("SHA-256 of its files", source.sha256),
        ("weights", str(manifest.weights)),
        *([("stored as", formats_line(manifest.matrices))] if manifest.matrices else []),
        *([("rounding", again)] if (again := rounded_again(manifest)) else []),
        *([("training", healing)] if (healing := healing_note(manifest)) else []),
        *([] if manifest.spec.is_encoder else [("bytes per token counted at", f"{manifest.context:,} tokens")]),
        *manifest.versions.items(),
    ]
    return Table(("", ""), tuple(rows), words=True)
