"""What a graph is made of: its nodes, its dimensions, its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.models import (
    cached_logits,
    export_slim,
    exported,
    open_prepared,
    original_logits,
    recipe_of,
    tokens_of,
    torch_logits,
)

from kvslim.caches import FullCache
from kvslim.methods import KvHdc, KvPca, KvQuant, Method
from kvslim.runtime.opening import layout_of, open_session
from kvslim.runtime.session import DecodeSession
from kvslim.types import LayerPlan, Plan
from kvslim.weights.choice import SMALLEST_MATRIX

ModelOf = Callable[[str], Path]


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_large_matrix_is_quantised_when_weights_are(
    tiny_model: ModelOf, tmp_path: Path, family: str, weights: str
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of([KvPca(rank=8)], weights))
    export_slim(prepared, tmp_path / "slim")
    graph = onnx.load(tmp_path / "slim" / "model.onnx", load_external_data=False).graph
    constants = {
        tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and np.prod(tensor.dims) >= SMALLEST_MATRIX
    }
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "FusedMatMul")]
    assert not [node.name for node in products if constants.intersection(node.input)]
    assert Counter(node.op_type for node in graph.node)["MatMulNBits"] >= 4 * prepared.spec.layers + 1
    tokens = tokens_of(prepared)
    expected, found = torch_logits(prepared, tokens), cached_logits(tmp_path / "slim", tokens)
    correlation = np.corrcoef(expected.ravel(), found.ravel())[0, 1]
    assert correlation > {"int8": 0.999, "int4": 0.9}[weights]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_standard_operators_take_different_ranks_for_keys_and_values(
    tiny_model: ModelOf, tmp_path: Path, family: str
) -> None:
    head_dim = 32 if family == "gemma2" else 16
    recipe = recipe_of([KvPca(rank=head_dim // 2, value_rank=head_dim)]).model_copy(update={"layout": "attention24"})
    prepared = open_prepared(tiny_model(family), recipe)
    tokens = tokens_of(prepared)
    export_slim(prepared, tmp_path / "slim")
    model = onnx.load(tmp_path / "slim" / "model.onnx", load_external_data=False)
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == 24
    assert Counter(node.op_type for node in model.graph.node)["TensorScatter"] == 2 * prepared.spec.layers
    dims = {tensor.kind: tensor.dim for tensor in layout_of(open_session(tmp_path / "slim")).tensors}
    assert dims == {"key": head_dim // 2, "value": head_dim}
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - torch_logits(prepared, tokens)).max() < 1e-4


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_window_is_a_mask_alone_when_its_cache_is_full(tiny_model: ModelOf, tmp_path: Path, family: str) -> None:
    recipe = recipe_of().model_copy(update={"window_cache": False})
    prepared = open_prepared(tiny_model(family), recipe)
    tokens = tokens_of(prepared)
    export_slim(prepared, tmp_path / "full")
    assert {tensor.window for tensor in layout_of(open_session(tmp_path / "full")).tensors} == {None}
    expected = original_logits(tiny_model(family), tokens)
    assert np.abs(cached_logits(tmp_path / "full", tokens) - expected).max() < 1e-4


LAYER = {"GroupQueryAttention": 1, "MatMulNBits": 4, "SkipSimplifiedLayerNormalization": 2, "Split": 1}
LAYER |= {"QuickGelu": 1, "Mul": 1}
# The head, the embedding, the first norm, the lengths that attention reads, and the choice of logits.
ONCE = {"MatMulNBits": 1, "GatherBlockQuantized": 1, "SimplifiedLayerNormalization": 1, "Shape": 1, "Squeeze": 1}
ONCE |= {"Cast": 2, "ReduceSum": 1, "Sub": 1, "Slice": 1}
# Over an integer cache attention is a branch of an `If`, on one condition for all layers.
BRANCHED = {"If": 1, "GroupQueryAttention": -1}
# Codes of q and k work on [batch, heads, length, dim]: both are rotated and coded as one, taken apart and merged again.
CODED = {"Split": 2, "RotaryEmbedding": 1, "Reshape": 3, "Transpose": 3, "MatMul": 1, "Sub": 1}


def count_of(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3-partial", "gpt_neox"])
def test_plain_int4_graph_has_the_nodes_of_a_layer_and_no_more(
    tiny_model: ModelOf, tmp_path: Path, family: str
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of(weights="int4"))
    export_slim(prepared, tmp_path / "plain")
    count = count_of(tmp_path / "plain")
    if family == "gpt_neox":  # its own norms, activation and parallel residual
        assert count["GroupQueryAttention"] == 2
        assert count["MatMulNBits"] == 4 * 2 + 1
        assert not {"Transpose", "Concat", "Reshape", "RotaryEmbedding"}.intersection(count)
        return
    expected = Counter(ONCE)
    for _ in range(prepared.spec.layers):
        expected.update(LAYER)
    assert not count - expected


def test_slim_graph_adds_codes_alone_and_names_no_path(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of([KvPca(rank=8), KvQuant()], "int4"))
    export_slim(prepared, tmp_path / "slim")
    assert b".py" not in (tmp_path / "slim" / "model.onnx").read_bytes()
    expected = Counter(ONCE)
    for _ in range(prepared.spec.layers):
        expected.update(LAYER)
        expected.update(CODED)
        expected.update(BRANCHED)
    expected.update({"Shape": 1, "Greater": 1})
    expected.update({"Concat": 4, "Shape": 2})  # the shapes that heads are split and merged to
    expected.update({"FusedMatMul": prepared.spec.layers})  # values of rank 8: too few numbers for blocks
    assert count_of(tmp_path / "slim") - expected == Counter()


def parts_of(path: Path) -> list[str]:
    """The operators of a graph and the names of its constants, those of branches included."""

    def parts(graph: onnx.GraphProto) -> Iterator[str]:
        yield from (constant.name for constant in graph.initializer)
        for node in graph.node:
            yield node.op_type
            for attribute in node.attribute:
                yield from parts(attribute.g)

    return sorted(parts(onnx.load(path, load_external_data=False).graph))


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("methods", [[], [KvQuant()], [KvPca(rank=8), KvQuant()]])
def test_onnxruntime_finds_nothing_to_change(
    tiny_llama: Path, tmp_path: Path, methods: list[Method], weights: str
) -> None:
    export_slim(open_prepared(tiny_llama, recipe_of(methods, weights)), tmp_path / "slim")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    ort.InferenceSession(tmp_path / "slim" / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert parts_of(tmp_path / "slim" / "model.onnx") == parts_of(tmp_path / "opened.onnx")


def test_keys_and_values_are_rounded_with_feedback_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of([KvHdc(bits=4)]))
    export_slim(prepared, tmp_path / "slim")
    count = count_of(tmp_path / "slim")
    assert (count["Round"], count["If"]) == (prepared.spec.layers, prepared.spec.layers)


def test_keys_and_values_are_rounded_at_once_where_both_have_as_many_residuals(
    tiny_llama: Path, tmp_path: Path
) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    cache = FullCache(rank=8, residual=8, rotation=0, stored="int4", centred=True)
    layers = tuple(LayerPlan(layer=layer, cache=cache) for layer in range(prepared.spec.layers))
    tokens, slim = tokens_of(prepared), exported(prepared, Plan(layers=layers), tmp_path / "slim")
    assert count_of(tmp_path / "slim")["Round"] == prepared.spec.layers
    effect = np.abs(slim - original_logits(tiny_llama, tokens)).max()
    assert effect > 1e-4
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < 0.1 * effect


def test_graph_gives_the_last_position_and_evaluation_all(tiny_model: ModelOf, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_model("qwen3"), recipe_of(weights="int4"))
    export_slim(prepared, tmp_path / "plain")
    tokens = tokens_of(prepared)
    every = DecodeSession(tmp_path / "plain", capacity=40, all_positions=True).step(tokens)
    last = DecodeSession(tmp_path / "plain", capacity=40).step(tokens)
    assert every.shape == (40, prepared.spec.vocab_size)
    np.testing.assert_allclose(last, every[-1:], atol=1e-4)
    session = DecodeSession(tmp_path / "plain", capacity=40, all_positions=True)
    np.testing.assert_array_equal(session.step(tokens[:20], last=7), every[13:20])
    np.testing.assert_array_equal(session.step(tokens[20:]), every[20:])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_long_text_equals_torch_when_prefilled_in_chunks(tiny_model: ModelOf, tmp_path: Path, family: str) -> None:
    """Far past the calibration windows of 48 tokens, and past many evictions from windows of 16."""
    prepared = open_prepared(tiny_model(family), recipe_of([KvPca(rank_ratio=0.5)]))
    export_slim(prepared, tmp_path / "slim")
    tokens = tokens_of(prepared, 700)
    expected = torch_logits(prepared, tokens)
    session = DecodeSession(tmp_path / "slim", capacity=len(tokens))
    for start, stop, chunk in ((0, 500, 64), (500, 633, 500), (633, 634, 1), (634, 700, 7)):
        logits = session.prefill(tokens[start:stop], chunk=chunk)
        assert np.abs(logits - expected[stop - 1]).max() < 1e-4


def test_dimensions_have_the_names_of_the_field(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    export_slim(prepared, tmp_path / "plain")
    session = open_session(tmp_path / "plain")
    shapes = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert shapes["present.1.value"] == ["batch_size", 2, "total_sequence_length", 16]
    assert shapes["logits"][:2] == ["batch_size", 1]


def test_two_exports_are_equal_to_the_byte(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        export_slim(open_prepared(tiny_llama, recipe_of([KvPca(rank=8), KvQuant()], "int4")), tmp_path / name)
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_queries_and_keys_are_rotated_as_one_where_keys_are_centred(tiny_model: ModelOf, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_model("gpt_neox"), recipe_of([KvQuant()], "int4"))
    plan = export_slim(prepared, tmp_path / "slim")
    count = count_of(tmp_path / "slim")
    assert 0 < sum(layer.cache.centred for layer in plan.layers) == count["RotaryEmbedding"]
    assert count["Transpose"] == 0
    assert count["MatMulNBits"] == 4 * prepared.spec.layers + 1
