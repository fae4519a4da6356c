"""The models that codecs are compared on: the demo and, if it lies beside the checkout, a model of English prose."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kvslim.demo.world import calibration_text, heldout_text, recall_questions
from kvslim.load.source import read_spec, resolve
from kvslim.pipeline import decide
from kvslim.plan.planner import Planned, Planner
from kvslim.progress import Silent
from kvslim.recipe import parse_recipe
from kvslim.runtime.session import DecodeSession
from kvslim.transform.codes import LayerCodes
from kvslim.transform.judge import Judge
from kvslim.transform.surgery import trial
from kvslim.types import KVLayout, Plan
from kvslim.validate.quality import measure_quality
from kvslim.validate.recall import RecallItem, measure_recall
from kvslim.workshop import Workshop

ROOT = Path(__file__).resolve().parent.parent
SHARED, MHA = ROOT.parent / "shared", ROOT / "tests" / "mha_model"
LENGTH = 512
SETTINGS = {
    "calibration": {"samples": 64, "length": LENGTH, "context": LENGTH},
    "validation": {"samples": 24, "length": LENGTH, "recall_items": 100, "recall_distance": 320},
}


class Measured(NamedTuple):
    """An exported artifact against the plain export.

    Attributes:
        kl: Mean, in nats per token.
        top1: Share of equal most likely tokens.
        recall: As a share, where asked for.
        mib: Size of the graph's files.
    """

    kl: float
    top1: float
    recall: float | None
    mib: float


class Subject:
    """A model with its statistics, held-out text and recall questions.

    Args:
        name: For headings.
        model: What `kvslim compress` takes.
        texts: Sources of calibration and of validation.
        asked: Whether recall is measured.
    """

    def __init__(self, name: str, model: str, texts: tuple[str, str] = ("self", "self"), *, asked: bool = True) -> None:
        snapshot, self.name, self.asked = resolve(model), name, asked
        sources = dict(zip(SETTINGS, texts, strict=True))
        settings = {part: {**values, "source": sources[part]} for part, values in SETTINGS.items()}
        recipe = parse_recipe({"name": "benchmark", **settings}, where="benchmark")
        self.workshop = Workshop(snapshot, read_spec(snapshot), recipe, Silent())
        self.spec, self.recipe = self.workshop.spec, recipe
        self.statistics = self.workshop.statistics()
        self.windows, self.items = self.workshop.evaluation()
        self.identity = Plan.identity(self.spec)

    @cached_property
    def planner(self) -> Planner:
        """The planner of `kvslim compress`, its layers probed once for all budgets."""
        return self.workshop.planner(self.statistics, self.held_out, LENGTH)

    @cached_property
    def held_out(self) -> Judge:
        """The planner's own judge, on calibration text."""
        return self.workshop.held_out_judge(self.statistics)

    @cached_property
    def judge(self) -> Judge:
        """Divergence in torch on the held-out windows."""
        return Judge(self.workshop.model, self.workshop.architecture, self.windows)

    def planned(self, ratio: float) -> Planned:
        """The planner's plan for a cache so many times smaller."""
        planned = self.planner.allocated(self.planner.plain_bytes / ratio)
        assert planned is not None, f"nothing is {ratio:.3g} times smaller"
        return self.planner.never_worse(planned)

    def size(self, plan: Plan, context: int = LENGTH) -> float:
        """Bytes of the cache per token at a context."""
        return KVLayout.of(self.spec, plan).bytes_per_token(context)

    @cached_property
    def plain(self) -> DecodeSession:
        """The plain export."""
        session, _ = self.exported(self.identity, tuple(LayerCodes() for _ in self.identity.layers))
        return session

    def exported(self, plan: Plan, codes: tuple[LayerCodes, ...]) -> tuple[DecodeSession, float]:
        """The model with codes, exported and opened, and the size of the graph's files in MiB."""
        with (
            tempfile.TemporaryDirectory() as folder,
            trial(self.workshop.model, self.workshop.architecture, codes),
        ):
            self.workshop.export(plan, Path(folder))
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            return DecodeSession(Path(folder), capacity=LENGTH, threads=1, all_positions=True), size / 2**20

    def decided(self, *methods: Mapping[str, Any]) -> Plan:
        """What methods decide, written as in a recipe."""
        recipe = parse_recipe({"name": "benchmark", "methods": list(methods)}, where="benchmark")
        return decide(recipe, self.spec, self.statistics)

    def measured(self, plan: Plan, codes: tuple[LayerCodes, ...] | None = None) -> Measured:
        """Quality of a plan, or of codes in its place, through the exported graph and its cache, in chunks of 16."""
        session, mib = self.exported(plan, codes or self.workshop.codes(self.statistics, plan))
        quality = measure_quality(self.plain, session, self.windows)
        recall = measure_recall(session, self.items) if self.asked else None
        return Measured(quality.kl_mean, quality.top1_agreement, recall, mib)


def of_stories(name: str, model: str) -> Subject:
    """A model that was trained like the demo: stories are its texts, and what they tell its recall questions."""
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "calibration.txt", Path(folder) / "heldout.txt"
        for path, stories in zip(texts, (calibration_text(90, 450), heldout_text(40, 450)), strict=True):
            path.write_text("\n\n".join(stories), encoding="utf-8")
        subject = Subject(name, model, (str(texts[0]), str(texts[1])))
    ids, settings = subject.workshop._ids, subject.recipe.validation
    questions = recall_questions(settings.recall_items, settings.recall_distance, lambda text: len(ids(text)), 1)
    subject.items = [RecallItem(ids(item.prompt), ids(item.answer, start=False)) for item in questions]
    return subject


def subjects(shared: Path = SHARED) -> Iterator[Subject]:
    """The demo, and `models/books-llama` with its texts where the shared folder is there."""
    yield Subject("the demo model, on stories", "demo")
    if (shared / "models").is_dir():
        texts = str(shared / "text" / "calibration.txt"), str(shared / "text" / "heldout.txt")
        yield Subject("books-llama, on prose", str(shared / "models" / "books-llama"), texts, asked=False)
