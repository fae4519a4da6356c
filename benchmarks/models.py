"""How benchmarks open a decoder, fit methods, plan, export and judge.

With `encoders`, `planners` and `plans` the one place that knows KVSlim's inner parts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from tokenizers import Tokenizer

from benchmarks.planners import OpenPlanner
from benchmarks.subjects import Source
from benchmarks.texts import Text, recipe_of
from kvslim.calibrate.corpus import loss_mask, text_windows
from kvslim.contract import ModelSpec
from kvslim.demo.world import recall_questions
from kvslim.loading.source import read_spec, resolve
from kvslim.methods.kv_quant import with_integers
from kvslim.planning.decide import decide
from kvslim.progress import Silent
from kvslim.recipe import Recipe, parse_recipe
from kvslim.runtime.session import DecodeSession
from kvslim.types import KVLayout, Plan
from kvslim.validation.measure import file_mib
from kvslim.validation.quality import measure_quality
from kvslim.validation.recall import RecallItem, capacity_for, measure_recall

STEP = 8  # of ranks
Codes = tuple[Any, ...]


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
        self.source, self.recipe = source, recipe_of(source, text, **settings)
        self._prepared = self._opened(self.recipe)
        self.spec: ModelSpec = self._prepared.spec
        self.identity = Plan.identity(self.spec)

    def _opened(self, recipe: Recipe) -> Any:
        from kvslim.prepared.decoder import PreparedDecoder

        snapshot = resolve(self.source.model)
        return PreparedDecoder(snapshot, read_spec(snapshot), recipe, Silent())

    @property
    def statistics(self) -> Any:
        """Of the calibration text."""
        return self._prepared.statistics

    def statistics_of(self, **calibration: Any) -> Any:
        """Statistics with other settings of the calibration."""
        settings = self.recipe.calibration.model_copy(update=calibration)
        return self._opened(self.recipe.model_copy(update={"calibration": settings})).statistics

    def calibrate(self, windows: np.ndarray) -> None:
        """Puts token ids [n, length] in the place of the calibration text."""
        from kvslim.calibrate.recorder import Recorder
        from kvslim.calibrate.recording import finish

        recorder = Recorder(self._prepared.model, self._prepared.architecture, self.spec, windows, seed=0)
        self._prepared.statistics = finish(recorder.record(Silent()), context=self.context)
        vars(self).pop("_trials", None)

    @cached_property
    def _trials(self) -> Any:
        return self._prepared.trials()

    def _trials_of(self, statistics: Any) -> Any:
        """Trials with those statistics in place of the model's own, where there are any."""
        if statistics is None:
            return self._trials
        trials = self._prepared.trials()
        trials.statistics = statistics
        return trials

    @property
    def context(self) -> int:
        """The target context in tokens."""
        return int(self._prepared.context)

    @property
    def calibration_windows(self) -> np.ndarray:
        """Token ids [n, length] of the calibration text."""
        found: np.ndarray = self._prepared.text.calibration_windows
        return found

    @cached_property
    def _evaluation(self) -> Any:
        return self._prepared.evaluation()

    @property
    def windows(self) -> np.ndarray:
        """Held-out token ids [n, length], without the long text."""
        return np.stack([each for each in self._evaluation.windows if len(each) == self.recipe.validation.length])

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
        encoded = self._prepared.tokenizer(text, add_special_tokens=start, verbose=False)
        return tuple(encoded.input_ids)

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, as a runtime without transformers has it."""
        found: Tokenizer = self._prepared.tokenizer.backend_tokenizer
        return found

    def size(self, plan: Plan, context: int | None = None) -> float:
        """Bytes of the cache per token, at the target context or another."""
        return KVLayout.of(self.spec, plan).bytes_per_token(context or self.context)

    def parameters(self, plan: Plan) -> int:
        """Numbers in the weights of the parts that stay."""
        from kvslim.transform.surgery import layer_modules

        model, architecture = self._prepared.model, self._prepared.architecture
        numbers = sum(weight.numel() for weight in model.parameters())
        for layer, module in zip(plan.layers, layer_modules(model, architecture), strict=True):
            names = (() if layer.mlp else architecture.mlp) + ((architecture.attention,) if layer.heads == () else ())
            numbers -= sum(weight.numel() for name in names for weight in module.get_submodule(name).parameters())
        return numbers

    def decode_time(self, plan: Plan, context: int) -> float:
        """Expected time of a token at a context, in multiply-accumulates of the float32 kernel."""
        return self._decode_time(context).of_plan(plan.layers)

    def weight_numbers(self, context: int) -> float:
        """Multiply-accumulates of weights for a token."""
        time = self._decode_time(context)
        return time.head + sum(time.attention) + sum(time.others)

    def _decode_time(self, context: int) -> Any:
        from kvslim.planning.budget import decode_time

        return decode_time(self._prepared, context)

    def taylor(self) -> np.ndarray:
        """Taylor scores of query heads [layers, q_heads]."""
        return self._trials.taylor

    # What methods and plans make of the model

    def decided(self, *methods: Any, statistics: Any = None) -> Plan:
        """The plan of methods, written as in a recipe."""
        recipe = parse_recipe({"name": "benchmark", "methods": list(methods)}, where="benchmark")
        return decide(recipe, self.spec, self.statistics if statistics is None else statistics)

    def measured_method(self, method: Any) -> Any:
        """A method with what it leaves to measuring filled in."""
        return method.resolve(self._trials)

    def without(self, method: Any) -> Codes:
        """The model without what a method removes, and else as it is."""
        return self._trials.codes_of(method)

    def codes(self, plan: Plan, statistics: Any = None) -> Codes:
        """What a plan puts into the model."""
        return self.plain_codes if plan.changes_nothing else self._trials_of(statistics).codes(plan)

    def refitted(self, codes: Codes) -> Codes:
        """The same with projections fitted again."""
        return self._trials.refitted(codes)

    def healed(self, plan: Plan, codes: Codes, budget: Mapping[str, Any]) -> tuple[Codes, Any]:
        """The same with weights trained to them, and what the training did; a budget as in a recipe."""
        from kvslim.transform.edits import FittedPlan

        settings = self._prepared.recipe
        self._prepared.recipe = parse_recipe({**settings.model_dump(), "heal": dict(budget)}, where="benchmark")
        try:
            fitted, found = self._prepared.healed(FittedPlan(plan, codes, self._prepared.made_for))
        finally:
            self._prepared.recipe = settings
        return fitted.codes, found

    def in_ggml(self, **kept: Any) -> tuple[float, Codes]:
        """Bytes of a token in a cache of llama.cpp's, and what puts it into the model; settings as in `GgmlCache`."""
        from kvslim.planning.ggml import GgmlCache
        from kvslim.transform.edits import LayerEdit

        cache = GgmlCache(kind="ggml", **kept)
        size = self.spec.layers * self.spec.kv_heads * cache.bytes_of(self.spec.head_dim)
        return size, tuple(LayerEdit(cache=cache) for _ in range(self.spec.layers))

    def compensated(self, plan: Plan) -> tuple[Plan, float]:
        """The plan with projections fitted again where that pays on calibration text, and its KL there."""
        from kvslim.planning.refit import refit_where_it_pays

        return refit_where_it_pays(self._trials, plan)

    def centred(self, plan: Plan) -> Plan:
        """The plan with keys centred where that pays."""
        return with_integers(self.spec, self.statistics, plan, {}, True)

    # KL in torch

    @property
    def held_out(self) -> Any:
        """The planner's KL evaluator, on calibration text that nothing is fitted to."""
        return self._trials.held_out

    @cached_property
    def _evaluator(self) -> Any:
        from kvslim.transform.kl_evaluator import KLEvaluator

        return KLEvaluator(self._prepared.model, self._prepared.architecture, self.windows)

    def kl(self, codes: Codes) -> float:
        """Mean KL on the held-out windows, in nats per token."""
        return self._evaluator.kl(codes)

    def recall(self, codes: Codes) -> float | None:
        """Recall, as a share."""
        from kvslim.transform.recall_trials import RecallTrials

        if not self.items:
            return None
        return RecallTrials(self._prepared.model, self._prepared.architecture, self.items).recall(codes)

    def kl_on(self, codes: Codes, source: Path, samples: int, length: int) -> float:
        """Mean KL on a text, of which completions alone count where it has prompts."""
        from kvslim.transform.kl_evaluator import KLEvaluator

        windows, mask = (
            part(str(source), self._prepared.tokenizer, samples=samples, length=length)
            for part in (text_windows, loss_mask)
        )
        return KLEvaluator(self._prepared.model, self._prepared.architecture, windows, mask).kl(codes)

    def logits(self, codes: Codes, tokens: np.ndarray) -> np.ndarray:
        """[n, vocab] logits in torch, in one forward pass."""
        import torch

        with self._installed(codes), torch.inference_mode():
            return self._prepared.model(torch.from_numpy(tokens[None])).logits[0].numpy()

    @cached_property
    def planner(self) -> OpenPlanner:
        """The planner of `kvslim compress`; it has probed the layers for all budgets."""
        return OpenPlanner(self._trials)

    def planner_within(self, time_ratio: float) -> OpenPlanner:
        """The same with a limit of the time of a token."""
        return OpenPlanner(self._trials, time_ratio)

    # Graphs

    def export(self, plan: Plan | None = None, codes: Codes | None = None, *, companions: bool = False) -> Path:
        """A new folder with the graph of a plan, by default of the one that changes nothing.

        Args:
            plan: What the graph is of.
            codes: Those of the plan, where they are not the ones that it would be given.
            companions: Whether to write what other clients read beside the graph, too.
        """
        folder = Path(tempfile.mkdtemp(prefix="graph-", dir=self.source.folder))
        if codes is None:
            codes = self.plain_codes if plan is None else self.codes(plan)
        with self._installed(codes):
            inputs = self._prepared.export(plan or self.identity, folder)
        if companions:
            self._prepared.write_companions(folder, KVLayout.of(self.spec, plan or self.identity), inputs)
        return folder

    @property
    def plain_codes(self) -> Codes:
        """Those that change nothing."""
        return self._prepared.codes(self.identity)

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
        return Measured(quality.kl_mean, quality.top1_agreement, recall, file_mib(folder))

    def measured_in_pieces(self, plan: Plan, pieces: Sequence[int]) -> dict[int, float]:
        """Mean KL of the exported graph, by how many tokens it and the plain one read at once."""
        session = self._session(self.export(plan))
        return {count: measure_quality(self.plain, session, self.windows, count).kl_mean for count in pieces}

    def _session(self, folder: Path) -> DecodeSession:
        longest = max(self.windows.shape[1], capacity_for(self.items))
        return DecodeSession(folder, capacity=longest, threads=1, all_positions=True)

    def release(self) -> None:
        """Frees the model's memory."""
        vars(self).pop("_trials", None)
        self._prepared.release()

    @contextmanager
    def _installed(self, codes: Codes) -> Iterator[None]:
        from kvslim.transform.surgery import trial

        with trial(self._prepared.model, self._prepared.architecture, codes):
            yield


def branched(model: onnx.ModelProto) -> bytes:
    """A graph whose attention over integers always takes its branch for prompts."""
    from kvslim.export.prompts import branch_prompts

    graph = ir.serde.deserialize_model(model)
    branch_prompts(graph, longest_step=0)
    return ir.to_proto(graph).SerializeToString()


def add_speculative_graph(folder: Path) -> None:
    """Writes the graph that drafts use beside an exported one."""
    from kvslim.export.speculative import write_speculative_graph

    write_speculative_graph(folder)
