"""What a newcomer adds without an edit of the package: a kind of cache, a method that measures, a family."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnxruntime as ort
import pytest
from pydantic import Field
from support.models import (
    CALIBRATION,
    VALIDATION,
    cached_logits,
    export_slim,
    exported,
    open_prepared,
    recipe_of,
    tokens_of,
    torch_logits,
)
from support.paths import ROOT
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import kvslim
from kvslim.caches import CACHES, Cache, FullCache, Place
from kvslim.caches.attention.base import CacheAttention, States
from kvslim.caches.attention.full import FullAttention
from kvslim.contract import Frozen, KVTensor, ModelSpec
from kvslim.demo import MODEL_DIR
from kvslim.export.manifest import read_manifest
from kvslim.loading.architecture import ARCHITECTURES, Architecture
from kvslim.methods import METHODS, Method
from kvslim.recipe import Recipe
from kvslim.runtime.session import DecodeSession
from kvslim.transform.operators import ExportStep
from kvslim.transform.scoring import Scoring
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.trials import Trials
    from kvslim.transform.attention import SlimAttention
    from kvslim.transform.edits import Codes, LayerEdit

PROMPT = "Here is a story of Mira and Oren. Mira's lamp is red."


class Toys:
    """The classes, once they are registered."""

    cache: type[Cache]
    method: type[Method]


@pytest.fixture(scope="module")
def toys() -> Iterator[type[Toys]]:
    """A toy cache, a toy method and a toy family, known as long as this module's tests run."""
    Toys.cache, Toys.method = _toy_cache(), _toy_method()
    ARCHITECTURES["toy_llama"] = Architecture("Toy", "a Llama by another name")

    class ToyConfig(LlamaConfig):
        model_type = "toy_llama"

    class ToyLlama(LlamaForCausalLM):
        config_class = ToyConfig

    AutoConfig.register("toy_llama", ToyConfig)
    AutoModelForCausalLM.register(ToyConfig, ToyLlama)
    yield Toys
    del CACHES["negated"], METHODS["negate_kv"], ARCHITECTURES["toy_llama"]
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(ToyConfig)


def _toy_cache() -> type[Cache]:
    """A full float32 cache whose rows are stored negated, with what a session must be told of it in the metadata."""

    class Note(Frozen):
        sign: Literal[-1]

    class NegatedAttention(FullAttention):
        def exported(self, slim: SlimAttention, step: ExportStep, states: States, scoring: Scoring) -> Tensor:
            """Scores of negated queries and keys are those of the originals; negated values give a negated output."""
            query, key, value = (-each for each in states)
            return -super().exported(slim, step, (query, key, value), scoring)

    class NegatedCache(Cache):
        kind: Literal["negated"] = "negated"
        replaces_attention: ClassVar[bool] = True
        metadata: ClassVar[str | None] = "kvslim.negated"
        note_type: ClassVar[Any] = Note

        def describe(self, spec: ModelSpec) -> str:
            return "rows stored negated"

        def tensors(self, spec: ModelSpec, place: Place) -> tuple[KVTensor, ...]:
            return _renamed(FullCache().tensors(spec, place))

        def attention(self, edit: LayerEdit) -> CacheAttention:
            return NegatedAttention()

        @classmethod
        def note(cls, tensors: Sequence[KVTensor], attention: CacheAttention) -> object:
            return {"sign": -1}

        @classmethod
        def read_tensors(cls, nodes: Any, note: Note) -> tuple[KVTensor, ...] | None:
            return _renamed(FullCache.read_tensors(nodes, None) or ())

    return NegatedCache


def _renamed(tensors: Sequence[KVTensor]) -> tuple[KVTensor, ...]:
    return tuple(tensor.model_copy(update={"cache": "negated"}) for tensor in tensors)


def _toy_method() -> type[Method]:
    """Negates the caches of some layers, those whose divergence is least."""

    class NegateKv(Method):
        name: ClassVar[str] = "negate_kv"
        order: ClassVar[int] = 40
        summary: ClassVar[str] = "rows stored negated"

        count: int = Field(1, description="number of layers")
        layers: tuple[int, ...] | None = None

        def resolve(self, trials: Trials) -> Method:
            if self.layers is not None:
                return self
            losses = [trials.divergence(NegateKv(layers=(layer,))) for layer in range(trials.spec.layers)]
            return NegateKv(layers=tuple(np.argsort(losses, kind="stable")[: self.count].tolist()))

        def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
            layers = tuple(
                layer.model_copy(update={"cache": Toys.cache(), "reason": "negated"})
                if layer.layer in (self.layers or ())
                else layer
                for layer in plan.layers
            )
            return plan.model_copy(update={"layers": layers})

        def apply(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: Codes) -> Codes:
            return edits

    return NegateKv


@pytest.fixture(scope="module")
def toy_demo(toys: type[Toys], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a family that nobody knew before."""
    folder = tmp_path_factory.mktemp("toy") / "model"
    shutil.copytree(MODEL_DIR, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "toy_llama"}))
    return folder


@pytest.fixture(scope="module")
def artifact(toys: type[Toys], toy_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(name="toy", methods=(toys.method(count=3),), calibration=CALIBRATION, validation=VALIDATION)
    out = tmp_path_factory.mktemp("out") / "artifact"
    kvslim.compress(str(toy_demo), recipe, out)
    return out


def test_compress_makes_an_artifact_of_the_toys(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert [layer.cache.kind for layer in manifest.plan.layers][:4] == ["negated"] * 3 + ["full"]
    assert [tensor.cache for tensor in manifest.kv_layout.tensors][:8] == ["negated"] * 6 + ["full"] * 2
    assert manifest.spec.model_type == "toy_llama"
    assert manifest.report is not None
    assert manifest.report.artifact.kl_mean is not None
    assert manifest.report.artifact.kl_mean < 1e-6


def test_session_knows_the_toy_cache_by_its_note(artifact: Path) -> None:
    layout = DecodeSession(artifact, capacity=16).layout
    assert [tensor.cache for tensor in layout.tensors][:8] == ["negated"] * 6 + ["full"] * 2


def test_rows_are_the_negative_of_the_plain_models_rows(toys: type[Toys], tiny_llama: Path, tmp_path: Path) -> None:
    rows = {}
    for name, methods in {"plain": (), "negated": (toys.method(layers=(0,)),)}.items():
        prepared = open_prepared(tiny_llama, recipe_of(methods))
        export_slim(prepared, tmp_path / name)
        rows[name] = _first_rows(tmp_path / name)
    for negated, plain in zip(rows["negated"], rows["plain"], strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(negated, -plain, atol=1e-5)


def _first_rows(folder: Path) -> list[np.ndarray]:
    """Keys and values of three tokens that stock onnxruntime gives back for the first layer."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feed: dict[str, np.ndarray] = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    for node in session.get_inputs():
        if node.name.startswith("past"):
            feed[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
    found: list[np.ndarray] = session.run(["present.0.key", "present.0.value"], feed)
    return found


def test_generate_streams_text_from_the_toys(artifact: Path) -> None:
    text = "".join(kvslim.load(artifact).generate(PROMPT, max_new_tokens=8))
    assert text.strip()


def test_validate_measures_the_toys_again(artifact: Path, toy_demo: Path) -> None:
    report = kvslim.validate(artifact, against=str(toy_demo))
    assert report.artifact.kl_mean is not None
    assert report.artifact.kl_mean < 1e-6


def test_plan_with_the_toy_cache_is_read_from_json(toys: type[Toys]) -> None:
    layer = LayerPlan.model_validate({"layer": 0, "cache": {"kind": "negated"}})
    assert isinstance(layer.cache, toys.cache)
    assert json.loads(layer.model_dump_json())["cache"] == {"kind": "negated"}


def test_cache_of_the_docs_works(tiny_llama: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adding_a_cache.md").read_text()
    namespace: dict[str, Any] = {"__name__": "negative"}
    try:
        code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
        exec(compile(code, "adding_a_cache.md", "exec", dont_inherit=True), namespace)
        prepared = open_prepared(tiny_llama, recipe_of())
        tokens = tokens_of(prepared)
        before = torch_logits(prepared, tokens)
        layers = (LayerPlan(layer=0, cache=namespace["NegativeCache"]()), LayerPlan(layer=1))
        exported(prepared, Plan(layers=layers), tmp_path / "negative")
        assert np.abs(cached_logits(tmp_path / "negative", tokens) - before).max() < 1e-4
    finally:
        CACHES.pop("negative", None)
