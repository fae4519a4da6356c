"""Quantised weights: the search, the operators that read them, and what stays as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import cached_logits, open_prepared, recipe_of, tokens_of, torch_logits

from kvslim.contract import WeightMethod
from kvslim.errors import UsageError
from kvslim.export import weights as export_weights
from kvslim.export.storage import share_storage
from kvslim.export.weights import quantise_weights
from kvslim.recipe import load_recipe, parse_recipe
from kvslim.types import Plan
from kvslim.weight_format import WeightFormat
from kvslim.weights.blocks import BlockFormat, Quantised, quantise
from kvslim.weights.rows import QuantisedRows

ModelOf = Callable[[str], Path]
RANDOM = np.random.default_rng(0)
FOUR = BlockFormat(4, 32)
MATRICES = {
    "normal": RANDOM.standard_normal((64, 256)),
    "heavy-tailed": RANDOM.standard_t(2, (64, 256)),
    "one-sided": RANDOM.exponential(1, (64, 256)),
    "constant": np.full((64, 256), -0.3),
}


def dequantised(stored: Quantised, bits: int, inputs: int) -> np.ndarray:
    """The matrix [n, inputs] that stored blocks stand for, straight from the format's definition."""
    rows, blocks = stored.scales.shape
    zeros = np.full((rows, blocks), 1 << (bits - 1))
    if stored.zero_points is not None:
        zeros = _unpacked(stored.zero_points, bits)[:, :blocks]
    integers = _unpacked(stored.codes, bits).astype(np.int64) - zeros[..., None]
    return (integers * stored.scales[..., None]).reshape(rows, -1)[:, :inputs]


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed.astype(np.int64)
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1).astype(np.int64)


def weighted_error(matrix: np.ndarray, to: BlockFormat, method: WeightMethod) -> np.ndarray:
    """Per block, the sum of squares weighted by |x| + RMS of the block."""
    blocks = matrix.astype(np.float64).reshape(-1, to.block)
    weights = np.abs(blocks) + np.sqrt(np.mean(blocks**2, axis=1, keepdims=True))
    found = dequantised(quantise(matrix, to, method), to.bits, matrix.shape[1]).reshape(-1, to.block)
    return (weights * (found - blocks) ** 2).sum(1)


@pytest.mark.parametrize("to", [BlockFormat(4, 32), BlockFormat(4, 128), BlockFormat(8, 32), BlockFormat(8, 128)])
@pytest.mark.parametrize("name", MATRICES)
def test_k_quant_is_at_least_as_close_as_rounding_in_every_block(name: str, to: BlockFormat) -> None:
    matrix = MATRICES[name].astype(np.float32)
    searched, rounded = (weighted_error(matrix, to, method) for method in ("k_quant", "rtn"))
    assert (searched <= rounded * (1 + 1e-4) + 1e-12).all()
    if name != "constant":
        assert searched.sum() < (0.85 if to.block == 32 else 0.9) * rounded.sum()


@given(st.integers(1, 5), st.integers(1, 70), st.floats(1e-12, 1e6), st.integers(0, 99), st.sampled_from([4, 8]))
def test_error_stays_below_a_step_when_rounding_to_nearest(
    rows: int, width: int, size: float, seed: int, bits: int
) -> None:
    to = BlockFormat(bits, 64).of_width(width)
    matrix = (np.random.default_rng(seed).standard_normal((rows, width)) * size).astype(np.float32)
    stored = quantise(matrix, to, "rtn")
    steps = np.repeat(np.abs(stored.scales), to.block, axis=1)[:, :width]
    assert (np.abs(dequantised(stored, bits, width) - matrix) <= steps * 1.001).all()


def test_zeros_stay_zeros() -> None:
    for method in ("k_quant", "rtn"):
        assert not dequantised(quantise(np.zeros((3, 40), np.float32), FOUR, method), 4, 40).any()


@pytest.mark.parametrize("method", ["k_quant", "rtn"])
def test_blocks_do_not_depend_on_how_the_matrix_lies_in_memory(method: WeightMethod) -> None:
    matrix = RANDOM.standard_normal((700, 301)).astype(np.float32)  # several chunks, and a filled last block
    first, second = quantise(matrix, FOUR, method), quantise(np.ascontiguousarray(matrix.T).T, FOUR, method)
    assert first.codes.tobytes() == second.codes.tobytes()
    assert first.scales.tobytes() == second.scales.tobytes()


def product_graph(operator: str, inputs: int, outputs: int, bias: str | None) -> ir.Model:
    """y = x W^T (+ b), the matrix stored as `operator` wants it; bias "own" is Gemm's, "added" an Add."""
    transposed = operator != "MatMul"
    shape = (outputs, inputs) if transposed else (inputs, outputs)
    weight = _constant("w", RANDOM.standard_normal(shape))
    b = _constant("b", RANDOM.standard_normal(outputs))
    x = ir.val("x", ir.DataType.FLOAT, [3, inputs])
    domain, attributes = "com.microsoft" if operator == "FusedMatMul" else "", {"transB": 1} if transposed else {}
    operands = [x, weight, b] if bias == "own" else [x, weight]
    nodes = [ir.node(operator, operands, attributes, domain=domain, name="product")]
    if bias == "added":
        nodes.append(ir.node("Add", [b, nodes[0].outputs[0]], name="add"))
    output = nodes[-1].outputs[0]
    output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
    constants = [weight] if bias is None else [weight, b]
    graph = ir.Graph([x], [output], nodes=nodes, initializers=constants, opset_imports={"": 21, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


def _constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.val(name, const_value=ir.tensor(array.astype(np.float32), name=name))


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


@pytest.mark.parametrize("method", ["k_quant", "rtn"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("inputs", "outputs", "block"), [(64, 48, 32), (100, 33, 32), (61, 41, 32), (256, 9, 128)])
@pytest.mark.parametrize(
    ("operator", "bias"), [("MatMul", None), ("MatMul", "added"), ("Gemm", "own"), ("FusedMatMul", "added")]
)
def test_product_equals_dequantised_matrix(
    monkeypatch: pytest.MonkeyPatch,
    operator: str,
    bias: str | None,
    inputs: int,
    outputs: int,
    block: int,
    kind: str,
    method: WeightMethod,
) -> None:
    monkeypatch.setattr(export_weights, "ACCURACY_LEVEL", 0)  # activations in float32
    model, bits = product_graph(operator, inputs, outputs, bias), {"int8": 8, "int4": 4}[kind]
    constants = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    matrix = constants["w"] if operator != "MatMul" else constants["w"].T
    blocks, rows = quantise(matrix, BlockFormat(bits, block), method), QuantisedRows()
    rows.add(matrix, blocks)
    quantise_weights(model, rows)
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    assert "w" not in model.graph.initializers
    x = RANDOM.standard_normal((3, inputs)).astype(np.float32)
    stored = dequantised(blocks, bits, inputs)
    np.testing.assert_array_equal(blocks.numbers(inputs), stored.astype(np.float32))
    expected = x @ stored.T + constants.get("b", 0)
    np.testing.assert_allclose(run(model, x=x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 40), (2, 64, 64)])
def test_small_and_stacked_matrices_stay_as_they_are(shape: tuple[int, ...]) -> None:
    model = product_graph("MatMul", 64, 64, None)
    model.graph.initializers["w"].const_value = ir.tensor(np.zeros(shape, np.float32), name="w")
    quantise_weights(model, QuantisedRows())
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_matrix_is_computed_once_and_not_kept_when_it_is_lazy() -> None:
    model = product_graph("FusedMatMul", 64, 48, None)
    made = []

    def compute() -> ir.TensorProtocol:
        made.append(1)
        return ir.tensor(np.ones((48, 64), np.float32))

    lazy = ir.LazyTensor(compute, dtype=ir.DataType.FLOAT, shape=ir.Shape((48, 64)))
    model.graph.initializers["w"].const_value = lazy
    quantise_weights(model, QuantisedRows())
    assert len(made) == 1
    assert "w" not in model.graph.initializers


@pytest.fixture(scope="module")
def tied(tiny_model: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain exports of a model whose embedding is its output head, by weights."""
    folders = {}
    formats = {"fp32": WeightFormat(), "int4": WeightFormat(type="int4"), "int8": WeightFormat(type="int8")}
    formats["mixed"] = WeightFormat(type="int4", mixed=True)
    for name, weights in formats.items():
        prepared = open_prepared(tiny_model("qwen3"), recipe_of((), weights))
        folders[name] = tmp_path_factory.mktemp("tied") / name
        folders[name].mkdir()
        prepared.export(Plan.identity(prepared.spec), folders[name])
    return folders


@pytest.mark.parametrize("name", ["fp32", "int8", "int4", "mixed"])
def test_tied_table_is_stored_once(tied: dict[str, Path], name: str) -> None:
    graph = ir.load(tied[name] / "model.onnx").graph
    readers = [
        (node, index) for node in graph for index, value in enumerate(node.inputs) if _rows(value) == 257 and index < 2
    ]
    assert Counter(node.op_type for node, _ in readers) == (
        {"Gather": 1, "FusedMatMul": 1} if name == "fp32" else {"GatherBlockQuantized": 1, "MatMulNBits": 1}
    )
    places = {(tensor.offset, tensor.length) for node, i in readers if (tensor := node.inputs[i].const_value)}
    assert len(places) == 1
    stored = {
        (t.offset, t.length) for v in graph.initializers.values() if isinstance(t := v.const_value, ir.ExternalTensor)
    }
    assert (tied[name] / "model.onnx_data").stat().st_size == sum(length for _, length in stored)


def _rows(value: ir.Value | None) -> int | None:
    return None if value is None or value.const_value is None else next(iter(value.const_value.shape.numpy()), None)


def test_head_and_sensitive_layers_get_eight_bits_when_mixed(tied: dict[str, Path]) -> None:
    graph = ir.load(tied["mixed"] / "model.onnx").graph
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    bits = [node.attributes.get_int("bits") for node in products]
    per_layer = (len(products) - 1) // 2
    assert bits[-1] == 8
    for layer, layer_bits in enumerate((bits[:per_layer], bits[per_layer:-1])):
        # The rule takes layer 0, below 2 / 8, and not layer 1, below 14 / 8 and not the third after an eighth.
        assert layer_bits[-1] == (8 if layer == 0 else 4)
        assert layer_bits.count(8) == (2 if layer == 0 else 0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_int8_graph_is_close_to_torch(tiny_model: ModelOf, tmp_path: Path, family: str) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of((), "int8"))
    prepared.export(Plan.identity(prepared.spec), tmp_path)
    tokens = tokens_of(prepared)
    expected = torch_logits(prepared, tokens)
    assert np.abs(cached_logits(tmp_path, tokens) - expected).max() < 0.05 * np.abs(expected).max()


def test_two_exports_are_equal_to_the_byte_when_mixed(
    tied: dict[str, Path], tiny_model: ModelOf, tmp_path: Path
) -> None:
    weights = WeightFormat(type="int4", mixed=True)
    prepared = open_prepared(tiny_model("qwen3"), recipe_of((), weights))
    prepared.export(Plan.identity(prepared.spec), tmp_path)
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / file).read_bytes() == (tied["mixed"] / file).read_bytes()


def test_reshape_of_what_is_computed_stays_when_storage_is_shared(tmp_path: Path) -> None:
    x, shape = ir.val("x", ir.DataType.FLOAT, [4]), ir.val("s", const_value=ir.tensor(np.array([2, 2]), name="s"))
    node = ir.node("Reshape", [x, shape], name="reshape")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[shape], opset_imports={"": 21})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx", external_data="model.onnx_data")
    share_storage(tmp_path / "model.onnx")
    assert [node.op_type for node in ir.load(tmp_path / "model.onnx").graph] == ["Reshape"]


def test_word_and_long_form_are_one_format() -> None:
    word, long = (parse_recipe({"name": "x", "weights": w}, "test").weights for w in ("int4", {"type": "int4"}))
    assert word == long == WeightFormat(type="int4", method="k_quant", mixed=False)
    assert str(word) == "int4 (k_quant)"


def test_overrides_reach_the_format_when_the_recipe_has_a_word() -> None:
    recipe = load_recipe("balanced", ["weights=int4", "weights.mixed=true", "weights.method=rtn"])
    assert recipe.weights == WeightFormat(type="int4", method="rtn", mixed=True)


@pytest.mark.parametrize(
    "weights",
    [
        "int3",
        {"type": "int8", "mixed": True},
        {"mixed": True},
        {"method": "gptq"},
        {"type": "stored", "method": "gptq"},
        {"type": "stored", "method": "rtn"},
        {"type": "stored", "block": 64},
        {"type": "fp32", "block": 32},
        {"bits": 4},
        4,
    ],
)
def test_format_is_refused_when_it_makes_no_sense(weights: object) -> None:
    with pytest.raises(UsageError, match="weights"):
        parse_recipe({"name": "x", "weights": weights}, "test")
