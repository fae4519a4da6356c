"""How benchmarks open a model, fit methods, plan, export and judge: the one place that knows KVSlim's inner parts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.subjects import Source
from kvslim.caches.rotation import has_rotation
from kvslim.calibrate.corpus import counted_windows, text_windows
from kvslim.contract import ModelSpec
from kvslim.demo.world import recall_questions
from kvslim.loading.source import read_spec, resolve
from kvslim.methods.fitting import fit
from kvslim.methods.kv_quant import with_integers
from kvslim.pipeline import decide
from kvslim.progress import Silent
from kvslim.recipe import Recipe, parse_recipe
from kvslim.runtime.session import DecodeSession
from kvslim.types import KVLayout, LayerPlan, Plan, WeightFormat
from kvslim.validation.quality import measure_quality
from kvslim.validation.recall import RecallItem, measure_recall

LENGTH = 512
FULL = {
    "calibration": {"samples": 64, "length": LENGTH, "context": LENGTH},
    "validation": {"samples": 24, "length": LENGTH, "recall_items": 100, "recall_distance": 320},
}
BRIEF = {
    "calibration": {"samples": 4, "length": 48, "context": 48},
    "validation": {"samples": 2, "length": 48, "recall_items": 2, "recall_distance": 16},
}
LITTLE = {"calibration": {"samples": 2, "length": 64}}  # for graphs whose time or memory alone counts
STEP = 8  # of ranks
Text = Mapping[str, Mapping[str, Any]]
Codes = tuple[Any, ...]
Kind = Sequence[Sequence[tuple[Any, Any]]]  # what plans may be made of: candidates by layer


class Measured(NamedTuple):
    """An exported graph against the plain one.

    Attributes:
        kl: Mean, in nats per token.
        top1: Share of equal most likely tokens.
        recall: As a share; None where it is not asked for.
        mib: Size of the graph's files.
    """

    kl: float
    top1: float
    recall: float | None
    mib: float


class OpenModel:
    """A decoder with its statistics, held-out text and recall questions, each made when it is first needed.

    Args:
        source: The model and its texts.
        text: How much of them; settings of a recipe's calibration and validation.
        settings: Others of the recipe.
    """

    def __init__(self, source: Source, text: Text, **settings: Any) -> None:
        from kvslim.workshop import Workshop

        self.source, self.recipe = source, recipe_of(source, text, **settings)
        snapshot = resolve(source.model)
        self._workshop = Workshop(snapshot, read_spec(snapshot), self.recipe, Silent())
        self.spec: ModelSpec = self._workshop.spec
        self.identity = Plan.identity(self.spec)
        self._numbers = count()

    @cached_property
    def statistics(self) -> Any:
        """Of the calibration text."""
        return self._workshop.statistics()

    def statistics_of(self, **calibration: Any) -> Any:
        """Statistics with other settings of the calibration."""
        settings = self.recipe.calibration.model_copy(update=calibration)
        with self._with_recipe(calibration=settings):
            return self._workshop.statistics()

    def collect(self, windows: np.ndarray, context: int) -> Any:
        """Statistics of token ids [n, length], for a target context."""
        from kvslim.calibrate.statistics import collect

        shop = self._workshop
        return collect(shop.model, shop.architecture, self.spec, windows, context=context, seed=0, batches=iter)

    @property
    def context(self) -> int:
        """The target context in tokens."""
        return self.recipe.calibration.target(self.spec)

    @cached_property
    def _evaluation(self) -> Any:
        return self._workshop.evaluation()

    @property
    def windows(self) -> np.ndarray:
        """Held-out token ids [n, length]."""
        return self._evaluation.windows

    @cached_property
    def items(self) -> Sequence[RecallItem]:
        """Recall questions; none where recall is not asked for."""
        if self.source.recall != "stories":
            return self._evaluation.items if self.source.recall else ()
        settings = self.recipe.validation
        questions = recall_questions(
            settings.recall_items, settings.recall_distance, lambda text: len(self.ids(text)), settings.seed
        )
        return [RecallItem(self.ids(item.prompt), self.ids(item.answer, start=False)) for item in questions]

    def ids(self, text: str, *, start: bool = True) -> tuple[int, ...]:
        """Token ids of a text."""
        encoded = self._workshop.tokenizer(text, add_special_tokens=start, verbose=False)
        return tuple(encoded.input_ids)

    def size(self, plan: Plan, context: int | None = None) -> float:
        """Bytes of the cache per token, at the target context or another."""
        return KVLayout.of(self.spec, plan).bytes_per_token(context or self.context)

    def parameters(self, plan: Plan) -> int:
        """Numbers in the weights of the parts that stay."""
        from kvslim.transform.surgery import layer_modules

        model, architecture = self._workshop.model, self._workshop.architecture
        numbers = sum(weight.numel() for weight in model.parameters())
        for layer, module in zip(plan.layers, layer_modules(model, architecture), strict=True):
            names = (() if layer.mlp else architecture.mlp) + ((architecture.attention,) if layer.heads == () else ())
            numbers -= sum(weight.numel() for name in names for weight in module.get_submodule(name).parameters())
        return numbers

    def decode_time(self, plan: Plan, context: int) -> float:
        """Expected time of a token at a context, in multiply-accumulates of the float32 kernel."""
        return self._workshop.decode_time(context).of_plan(plan.layers)

    def weight_numbers(self, context: int) -> float:
        """Multiply-accumulates of weights for a token."""
        time = self._workshop.decode_time(context)
        return time.head + sum(time.attention) + sum(time.others)

    def taylor(self) -> np.ndarray:
        """Taylor scores of query heads [layers, q_heads]."""
        return self._workshop.taylor(self.statistics)

    # What methods and plans make of the model

    def decided(self, *methods: Any, statistics: Any = None) -> Plan:
        """The plan of methods, written as in a recipe."""
        recipe = parse_recipe({"name": "benchmark", "methods": list(methods)}, where="benchmark")
        return decide(recipe, self.spec, self.statistics if statistics is None else statistics)

    def measured_method(self, method: Any) -> Any:
        """A method with what it leaves to measuring filled in."""
        with self._with_recipe(methods=(method,)):
            return self._workshop.measured_recipe(self.statistics, self.held_out).methods[0]

    def without(self, method: Any) -> Codes:
        """The model without what a method removes, and else as it is."""
        return self._workshop.without(self.statistics, method)

    def codes(self, plan: Plan, statistics: Any = None) -> Codes:
        """What a plan puts into the model."""
        return self._workshop.codes(self.statistics if statistics is None else statistics, plan)

    def fitted(self, plan: Plan) -> Codes:
        """The same without projections fitted again."""
        return fit(self.spec, self.statistics, plan)

    def refitted(self, codes: Codes) -> Codes:
        """The same with projections fitted again."""
        return self._workshop.refitted(self.statistics, codes)

    def compensated(self, plan: Plan) -> tuple[Plan, float]:
        """The plan with projections fitted again where that pays on calibration text, and its KL there."""
        return self._workshop.compensated(self.statistics, self.held_out, plan)

    def centred(self, plan: Plan) -> Plan:
        """The plan with keys centred where that pays."""
        return with_integers(self.spec, self.statistics, plan, {}, True)

    # KL in torch

    @cached_property
    def held_out(self) -> Any:
        """The planner's KL evaluator, on calibration text that nothing is fitted to."""
        return self._workshop.held_out_judge(self.statistics)

    @cached_property
    def _evaluator(self) -> Any:
        from kvslim.transform.judge import Judge

        return Judge(self._workshop.model, self._workshop.architecture, self.windows)

    def kl(self, codes: Codes) -> float:
        """Mean KL on the held-out windows, in nats per token."""
        return self._evaluator.kl(codes)

    def recall(self, codes: Codes) -> float | None:
        """Recall, as a share."""
        return self._evaluator.recall(codes, self.items) if self.items else None

    def kl_on(self, codes: Codes, source: Path, samples: int, length: int) -> float:
        """Mean KL on a text, of which completions alone count where it has prompts."""
        from kvslim.transform.judge import Judge

        windows, counted = (
            part(str(source), self._workshop.tokenizer, samples=samples, length=length)
            for part in (text_windows, counted_windows)
        )
        return Judge(self._workshop.model, self._workshop.architecture, windows, counted).kl(codes)

    def logits(self, codes: Codes, tokens: np.ndarray) -> np.ndarray:
        """[n, vocab] logits in torch, in one forward pass."""
        import torch

        with self._installed(codes), torch.inference_mode():
            return self._workshop.model(torch.from_numpy(tokens[None])).logits[0].numpy()

    # Plans for a budget

    @cached_property
    def planner(self) -> Any:
        """The planner of `kvslim compress`; it has probed the layers for all budgets."""
        return self._workshop.planner(self.statistics, self.held_out, self.context)

    def allocated(self, ratio: float) -> Any:
        """The plan of least KL for a cache so many times smaller, with what is expected of it."""
        planned = self.planner.allocated(self.planner.plain_bytes / ratio)
        assert planned is not None, f"nothing is {ratio:.3g} times smaller"
        return planned

    def planned(self, ratio: float) -> Any:
        """The same, or all layers alike where that loses less."""
        return self.planner.never_worse(self.allocated(ratio))

    def planned_of(self, ratio: float, kinds: Callable[[Kind], bool]) -> Any:
        """The same of some kinds of candidates alone."""
        with self._only(lambda every: {bits: [kind for kind in of if kinds(kind)] for bits, of in every.items()}):
            return self.planned(ratio)

    def alternatives(self, ratio: float) -> Iterator[Any]:
        """The 4-bit plan of each kind of candidates, where one fits."""
        seen = set()
        for kind in self.planner.ways[4]:
            with self._only(lambda _, kind=kind: {8: [], 4: [kind]}):
                planned = self.planner.allocated(self.planner.plain_bytes / ratio)
            if planned is not None and planned.plan.layers not in seen:
                seen.add(planned.plan.layers)
                yield planned

    @contextmanager
    def _only(self, some: Callable[[Any], Any]) -> Iterator[None]:
        """Within the block the planner offers some kinds of candidates alone."""
        every = self.planner.ways
        self.planner.ways = some(every)
        try:
            yield
        finally:
            self.planner.ways = every

    # Graphs

    def export(self, plan: Plan | None = None, codes: Codes | None = None, weights: WeightFormat | None = None) -> Path:
        """A new folder with the graph of a plan, by default of the one that changes nothing."""
        folder = self.source.folder / f"graph-{next(self._numbers)}-{id(self)}"
        folder.mkdir()
        if codes is None:
            codes = self.plain_codes if plan is None else self.codes(plan)
        with self._installed(codes), self._with_recipe(weights=weights or self.recipe.weights):
            self._workshop.export(plan or self.identity, folder)
        return folder

    @property
    def plain_codes(self) -> Codes:
        """Those that change nothing."""
        from kvslim.transform.edits import LayerEdit

        return tuple(LayerEdit() for _ in range(self.spec.layers))

    @cached_property
    def plain(self) -> DecodeSession:
        """The plain graph, opened."""
        return self._session(self.export())

    def measured(self, plan: Plan, codes: Codes | None = None) -> Measured:
        """Quality through the exported graph and its cache, in chunks of 16."""
        folder = self.export(plan, codes)
        session = self._session(folder)
        quality = measure_quality(self.plain, session, self.windows)
        recall = measure_recall(session, self.items) if self.items else None
        return Measured(quality.kl_mean, quality.top1_agreement, recall, mib(folder))

    def _session(self, folder: Path) -> DecodeSession:
        longest = max([self.windows.shape[1], *(len(item.prompt) + len(item.answer) for item in self.items)])
        return DecodeSession(folder, capacity=longest, threads=1, all_positions=True)

    def release(self) -> None:
        """Frees the model's memory."""
        self._workshop.release()

    @contextmanager
    def _installed(self, codes: Codes) -> Iterator[None]:
        from kvslim.transform.surgery import trial

        with trial(self._workshop.model, self._workshop.architecture, codes):
            yield

    @contextmanager
    def _with_recipe(self, **update: Any) -> Iterator[None]:
        before = self._workshop.recipe
        self._workshop.recipe = before.model_copy(update=update)
        try:
            yield
        finally:
            self._workshop.recipe = before


class OpenEncoder:
    """An encoder with its calibration and its plain export.

    Args:
        source: The model and its texts.
        text: How much of them; settings of a recipe's calibration and validation.
    """

    def __init__(self, source: Source, text: Text) -> None:
        from kvslim.encoder_workshop import EncoderWorkshop

        from kvslim.validation.encoder import answers

        snapshot = resolve(source.model)
        self._workshop = EncoderWorkshop(snapshot, read_spec(snapshot), recipe_of(source, text), Silent())
        self.folder, self.spec = source.folder, self._workshop.spec
        self.held_out = self._workshop.held_out()
        self._fitting, judged = self._workshop.calibration()
        self.statistics = self._workshop.statistics(self._fitting)
        self._evaluator = self._workshop.judge(judged)
        self.plain = self._export(())
        self.reference = answers(self.plain, self.held_out, batch=1)

    def loss(self, method: Any) -> float:
        """What the model loses without what a method removes, on calibration sentences."""
        return self._evaluator.loss(self._workshop.without(self.statistics, method))

    def export(self, method: Any, *, refitted: bool = False) -> Path:
        """The graph of the encoder without what a method removes."""
        codes = self._workshop.without(self.statistics, method)
        return self._export(self._workshop.refitted(self._fitting, codes) if refitted else codes)

    def _export(self, codes: Codes) -> Path:
        from kvslim.transform.surgery import trial

        folder = Path(tempfile.mkdtemp(dir=self.folder))
        if not codes:
            self._workshop.export(folder)
            return folder
        with trial(self._workshop.model.base_model, self._workshop.architecture, codes):
            self._workshop.export(folder)
        return folder


def recipe_of(source: Source, text: Text, **settings: Any) -> Recipe:
    """A recipe that calibrates and validates on a source's texts."""
    sources = {"calibration": source.calibration, "validation": source.validation}
    parts = {part: {**text.get(part, {}), "source": path} for part, path in sources.items()}
    return parse_recipe({"name": "benchmark", **parts, **settings}, where="benchmark")


def mib(folder: Path) -> float:
    """Size of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 2**20


def plan_of(spec: ModelSpec, *, every: int = 1, bits: int = 32, per_tensor: bool = False, **layer: Any) -> Plan:
    """All layers alike, or each first of so many; `layer` sets rank, window, sinks, heads and mlp."""
    layer |= {"cache": {32: "float32", 8: "int8", 4: "int4"}[bits]}
    layer |= {"granularity": "per_tensor" if per_tensor else "per_channel"}
    plain = (LayerPlan(layer=index) for index in range(spec.layers))
    return Plan(layers=tuple(one if one.layer % every else one.model_copy(update=layer) for one in plain))


def sharing_plan(spec: ModelSpec, *, every: int) -> Plan:
    """Each last of so many layers reads the cache of the one before it."""
    layers = (
        LayerPlan(layer=index, donor=index - 1 if index % every == every - 1 else None) for index in range(spec.layers)
    )
    return Plan(layers=tuple(layers))


def varied(plan: Plan, **layer: Any) -> Plan:
    """A plan with the same thing changed in all layers: refit, objective, centred."""
    return plan.model_copy(update={"layers": tuple(one.model_copy(update=layer) for one in plan.layers)})


def without_rotation(plan: Plan) -> Plan:
    """The plan with coordinates stored as they are, not rotated."""
    return varied(plan, roles=None)


def without_residual(plan: Plan, spec: ModelSpec) -> Plan:
    """The plan with nothing stored twice: the bytes of residuals go to more rank, as far as there is more."""
    layers = []
    for layer in plan.layers:
        if not any(layer.twice):
            layers.append(layer)
            continue
        key, value = (_rank_within(width, spec.head_dim) for width in layer.widths(spec.head_dim))
        own = {"rank": key, "value_rank": None if value == key else value, "refined": 0, "value_refined": None}
        layers.append(layer.model_copy(update=own))
    return plan.model_copy(update={"layers": tuple(layers)})


def has_windows(kind: Kind) -> bool:
    """Whether any of a kind's candidates keeps a window."""
    return any(layer.window is not None for layer_candidates in kind for _, layer in layer_candidates)


def made_of(plan: Plan) -> str:
    """What a plan uses, in words."""
    windows = {layer.window for layer in plan.layers} - {None}
    gone = sum(layer.heads is not None for layer in plan.layers)
    shared = sum(layer.donor is not None for layer in plan.layers)
    parts = ["ranks and bits"]
    parts += [f"windows of {windows.pop()}"] if windows else []
    parts += [f"heads removed in {gone} layers"] if gone else []
    parts += [f"{shared} shared caches"] if shared else []
    return ", ".join(parts)


def without_means(codes: Codes) -> Codes:
    """The codes with nothing in the place of heads that went."""
    return tuple(
        code if code.mean_output is None else replace(code, mean_output=0.0 * code.mean_output) for code in codes
    )


def source_layer(code: Any) -> int | None:
    """The layer whose cache a layer reads."""
    return code.donor


def _rank_within(width: int, head_dim: int) -> int:
    return next(rank for rank in range(min(width, head_dim), 0, -STEP) if has_rotation(rank))
