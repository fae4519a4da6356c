"""Every method on every family: the graph computes what torch computes, in prefill and in cached decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import FAMILIES
from models import (
    cached_logits,
    export_slim,
    open_workshop,
    original_logits,
    recipe_of,
    tokens_of,
    torch_logits,
)

from kvslim.methods import METHODS, KvPca, KvQuant, Method
from kvslim.runtime.session import layout_of, open_session
from kvslim.types import KVLayout, Plan

PLANS: dict[str, Sequence[Method]] = {
    "plain": (),
    "pca": (KvPca(rank_ratio=0.5),),
    "key_pca": (KvPca(rank_ratio=0.5, objective="key"),),
    "int8": (KvQuant(),),
    "pca_int8": (KvQuant(granularity="per_tensor"), KvPca(rank_ratio=0.5)),
}
CORE = ("llama", "mistral", "gpt2", "smollm3")  # with RoPE, with windows, with learned positions, with some of each
ModelOf = Callable[[str], Path]


def test_matrix_covers_every_method() -> None:
    assert {method.name for plan in PLANS.values() for method in plan} == set(METHODS)


@pytest.mark.parametrize(
    ("family", "plan"),
    [(family, plan) for family in FAMILIES for plan in PLANS if family in CORE or plan in ("plain", "pca_int8")],
)
def test_graph_equals_torch_in_prefill_and_cached_decode(
    tiny_model: ModelOf, tmp_path: Path, family: str, plan: str
) -> None:
    workshop = open_workshop(tiny_model(family), recipe_of(PLANS[plan]))
    tokens = tokens_of(workshop)
    original = original_logits(tiny_model(family), tokens)
    made = export_slim(workshop, tmp_path / "slim")
    layout = layout_of(open_session(tmp_path / "slim"))
    assert layout == KVLayout.of(workshop.spec, made)
    slim = torch_logits(workshop, tokens)
    effect = np.abs(slim - original).max()
    assert effect > 1e-4 if PLANS[plan] else effect < 2e-5
    # A number on the edge between two integers may round to either side, which moves all later logits a little.
    tolerance = max(1e-4, 0.1 * effect) if "int8" in plan else 1e-4
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < tolerance


@pytest.mark.parametrize("family", [*CORE, "gemma3_text", "gpt_neox", "opt"])
def test_full_rank_reproduces_the_plain_export_when_not_quantised(
    tiny_model: ModelOf, tmp_path: Path, family: str
) -> None:
    workshop = open_workshop(tiny_model(family), recipe_of([KvPca(rank_ratio=1.0)]))
    (tmp_path / "plain").mkdir()
    workshop.export(Plan.identity(workshop.spec), tmp_path / "plain")
    export_slim(workshop, tmp_path / "slim")
    tokens = tokens_of(workshop)
    plain, slim = (cached_logits(tmp_path / name, tokens) for name in ("plain", "slim"))
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(slim, plain, atol=1e-4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_large_matrix_is_quantised_when_weights_are(
    tiny_model: ModelOf, tmp_path: Path, family: str, weights: str
) -> None:
    workshop = open_workshop(tiny_model(family), recipe_of([KvPca(rank=8)], weights))
    export_slim(workshop, tmp_path / "slim")
    graph = onnx.load(tmp_path / "slim" / "model.onnx", load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "FusedMatMul")]
    assert not [node.name for node in products if constants.intersection(node.input)]
    assert Counter(node.op_type for node in graph.node)["MatMulNBits"] >= 4 * workshop.spec.layers + 1
    tokens = tokens_of(workshop)
    expected, found = torch_logits(workshop, tokens), cached_logits(tmp_path / "slim", tokens)
    correlation = np.corrcoef(expected.ravel(), found.ravel())[0, 1]
    assert correlation > {"int8": 0.999, "int4": 0.9}[weights]


def test_graph_is_fused_and_names_no_path(tiny_llama: Path, tmp_path: Path) -> None:
    workshop = open_workshop(tiny_llama, recipe_of([KvPca(rank=8), KvQuant()]))
    export_slim(workshop, tmp_path / "slim")
    text = (tmp_path / "slim" / "model.onnx").read_bytes()
    assert b".py" not in text
    count = Counter(node.op_type for node in onnx.load_from_string(text).graph.node)
    layers = workshop.spec.layers
    assert count["GroupQueryAttention"] == layers
    assert count["RotaryEmbedding"] == 2 * layers
    assert count["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert count["Reshape"] <= 4 * layers + 3  # into and out of the codes of q and k, and three for the whole graph
    assert not {"Softmax", "Expand", "Where", "ScatterElements"}.intersection(count)


def test_plain_graph_splits_and_merges_no_heads(tiny_llama: Path, tmp_path: Path) -> None:
    export_slim(open_workshop(tiny_llama, recipe_of()), tmp_path / "plain")
    graph = onnx.load(tmp_path / "plain" / "model.onnx", load_external_data=False).graph
    count = Counter(node.op_type for node in graph.node)
    assert count["Reshape"] <= 3
    assert count["Transpose"] == 0


def test_dimensions_have_the_names_of_the_field(tiny_llama: Path, tmp_path: Path) -> None:
    workshop = open_workshop(tiny_llama, recipe_of())
    export_slim(workshop, tmp_path / "plain")
    session = open_session(tmp_path / "plain")
    shapes = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert shapes["present.1.value"] == ["batch_size", 2, "total_sequence_length", 16]
    assert shapes["logits"][:2] == ["batch_size", "sequence_length"]


def test_two_exports_are_equal_to_the_byte(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        export_slim(open_workshop(tiny_llama, recipe_of([KvPca(rank=8), KvQuant()], "int4")), tmp_path / name)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
