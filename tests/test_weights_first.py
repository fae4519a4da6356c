"""Weights are quantised before anything is fitted: torch and the graph compute with the same numbers, to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.blocks import graph_rows
from support.models import in_chunks, open_prepared, recipe_of, tokens_of, torch_logits
from support.tiny_decoders import save_decoder
from support.tiny_encoders import save_encoder

from kvslim.checks import check_recipe
from kvslim.errors import UnsupportedError
from kvslim.loading.source import read_spec, resolve
from kvslim.methods import KvHdc, KvQuant
from kvslim.pipeline import compress
from kvslim.planning.decide import decide
from kvslim.prepared import weights as prepared_weights
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.runtime.session import DecodeSession
from kvslim.types import Plan
from kvslim.validation.quality import measure_quality
from kvslim.weight_format import WeightFormat
from kvslim.weights.blocks import BlockFormat, quantise
from kvslim.weights.gptq import gptq
from kvslim.weights.rows import QuantisedRows

ModelOf = Callable[[str], Path]
RANDOM = np.random.default_rng(0)
FOUR, EIGHT = BlockFormat(4, 32), BlockFormat(8, 32)
GPTQ = WeightFormat(type="int4", method="gptq")


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, whose rows are a block of 128 or two."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 32}
    return save_decoder("llama", tmp_path_factory.mktemp("wide") / "llama", **sizes)


def exported(prepared: PreparedDecoder, folder: Path, plan: Plan | None = None) -> Path:
    folder.mkdir()
    prepared.export(plan or Plan.identity(prepared.spec), folder)
    return folder


def float_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    session = DecodeSession(folder, capacity=len(tokens), all_positions=True, float_activations=True)
    return in_chunks(session, tokens, [len(tokens) - 4, 1])


def bits_of(folder: Path) -> Counter[tuple[str, int]]:
    nodes = [node for node in ir.load(folder / "model.onnx").graph if node.domain == "com.microsoft"]
    return Counter(
        (node.op_type, node.attributes.get_int("bits")) for node in nodes if node.op_type.endswith(("NBits", "ntized"))
    )


# Projections that are packed and read directly, scaled logits, and a table of its own for the head.
@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("gpt_neox", GPTQ),
        ("phi3", WeightFormat(type="int4", method="rtn")),
        ("gemma2", WeightFormat(type="int8")),
        ("opt", GPTQ),
    ],
)
def test_torch_and_graph_agree_when_weights_are_quantised(
    tiny_model: ModelOf, tmp_path: Path, family: str, weights: WeightFormat
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of((), weights))
    folder, tokens = exported(prepared, tmp_path / "plain"), tokens_of(prepared)
    expected = torch_logits(prepared, tokens)
    assert np.abs(float_logits(folder, tokens) - expected).max() < 1e-5 * np.abs(expected).max()
    assert {bits for _, bits in bits_of(folder)} == {8 if weights.type == "int8" else 4}
    assert not [node for node in ir.load(folder / "model.onnx").graph if node.op_type in ("MatMul", "FusedMatMul")]


@pytest.mark.parametrize(
    "given",
    [
        {"type": "int4"},
        {"type": "int4", "method": "rtn"},
        {"type": "int4", "method": "gptq"},
        {"type": "int4", "method": "gptq", "block": 64},
        {"type": "int4", "block": 128},
        {"type": "int4", "method": "gptq", "mixed": True},
        {"type": "int8"},
        {"type": "int8", "method": "rtn", "block": 32},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_graph_has_the_numbers_of_torch_to_the_bit(wide_llama: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    prepared = open_prepared(wide_llama, recipe_of((), WeightFormat(**given)))
    known = graph_rows(exported(prepared, tmp_path / "plain"))
    matrices = [
        module.weight.detach().numpy()
        for module in prepared.model.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    assert len(matrices) == 7 * prepared.spec.layers + 2
    assert {row.tobytes() for matrix in matrices for row in matrix} <= known
    blocks = {node.attributes.get_int("block_size", 0) for node in ir.load(tmp_path / "plain" / "model.onnx").graph}
    usual = {"int4": 32, "int8": 128}
    assert blocks - {0} == {given.get("block", usual[given["type"]])} | ({128} if given.get("mixed") else set())


def test_changed_matrices_get_eight_bits_and_others_stay_in_four(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvHdc(bits=8),), GPTQ))
    plain = bits_of(exported(prepared, tmp_path / "plain"))
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    prepared.install(prepared.codes(plan))
    slim = exported(prepared, tmp_path / "slim", plan)
    # The rotation folds into values, which are no longer packed with queries and keys, and into outputs. The MLP stays.
    layers = prepared.spec.layers
    assert plain == {("GatherBlockQuantized", 4): 1, ("MatMulNBits", 4): 4 * layers + 1}
    assert bits_of(slim) == {
        ("GatherBlockQuantized", 4): 1,
        ("MatMulNBits", 4): 3 * layers + 1,
        ("MatMulNBits", 8): 2 * layers,
    }
    tokens = tokens_of(prepared)
    expected = torch_logits(prepared, tokens)
    assert np.abs(float_logits(slim, tokens) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("width", [61, 64, 200])
def test_gptq_loses_less_on_its_inputs_than_the_search(width: int) -> None:
    mixing = RANDOM.standard_normal((width, width)) * RANDOM.exponential(1, width)
    inputs = RANDOM.standard_normal((2000, width)) @ mixing
    matrix = RANDOM.standard_normal((48, width)).astype(np.float32)

    def loss(numbers: np.ndarray) -> float:
        return float(np.square(inputs @ (numbers - matrix).T).sum())

    found = gptq(matrix, inputs.T @ inputs, FOUR)
    assert found.codes.shape == quantise(matrix, FOUR, "k_quant").codes.shape
    assert loss(found.numbers(width)) < 0.7 * loss(quantise(matrix, FOUR, "k_quant").numbers(width))


@pytest.mark.parametrize("to", [FOUR, BlockFormat(4, 64)])
def test_gptq_does_not_depend_on_the_order_of_columns(to: BlockFormat) -> None:
    """They are rounded in the order of their inputs' size, in their blocks."""
    width = 256
    inputs = (
        RANDOM.standard_normal((2000, width)) @ RANDOM.standard_normal((width, width)) * RANDOM.exponential(1, width)
    )
    moments, matrix = inputs.T @ inputs, RANDOM.standard_normal((48, width)).astype(np.float32)
    blocks = RANDOM.permutation(np.arange(width).reshape(-1, to.block))
    order = np.concatenate([RANDOM.permutation(block) for block in blocks])
    found = gptq(np.ascontiguousarray(matrix[:, order]), moments[np.ix_(order, order)], to)
    np.testing.assert_array_equal(found.numbers(width), gptq(matrix, moments, to).numbers(width)[:, order])


def test_gptq_takes_inputs_that_are_never_used() -> None:
    moments = np.zeros((64, 64))
    moments[:3, :3] = np.eye(3)
    matrix = RANDOM.standard_normal((5, 64)).astype(np.float32)
    for given in (moments, np.zeros((64, 64))):
        assert np.abs(gptq(matrix, given, FOUR).numbers(64) - matrix).max() < np.abs(matrix).max()


def test_rows_are_found_again_when_they_are_stacked_picked_or_changed() -> None:
    rows = QuantisedRows()
    four, eight = (RANDOM.standard_normal((6, 70)).astype(np.float32) for _ in range(2))
    rows.add(four, quantise(four, FOUR, "rtn"))
    rows.add(eight, quantise(eight, EIGHT, "k_quant"))
    only = rows.stored(four[[4, 1]])
    assert only.bits == 4
    np.testing.assert_array_equal(only.numbers(70), quantise(four, FOUR, "rtn").numbers(70)[[4, 1]])
    changed = np.concatenate([four[2:4], 2 * four[:1], eight])
    mixed = rows.stored(changed)
    assert mixed.bits == 8
    np.testing.assert_array_equal(mixed.numbers(70)[:2], quantise(four, FOUR, "rtn").numbers(70)[2:4])
    np.testing.assert_array_equal(mixed.numbers(70)[3:], quantise(eight, EIGHT, "k_quant").numbers(70))
    assert np.abs(mixed.numbers(70)[2] - changed[2]).max() < np.abs(changed[2]).max() / 100


def test_second_run_takes_the_quantised_weights_from_the_disk(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_prepared(tiny_llama, recipe_of((), GPTQ))
    monkeypatch.setattr(prepared_weights, "quantise_model", lambda *_, **__: pytest.fail("quantised again"))
    second = open_prepared(tiny_llama, recipe_of((), GPTQ))
    tokens = tokens_of(first)
    np.testing.assert_array_equal(torch_logits(first, tokens), torch_logits(second, tokens))


def test_report_tells_what_weights_and_cache_cost(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of((KvQuant(bits=4),), WeightFormat(type="int4"))
    report = compress(str(tiny_llama), recipe, tmp_path / "out").report
    assert report is not None
    assert report.original is not None
    prepared = open_prepared(tiny_llama, recipe)
    plain, windows = exported(prepared, tmp_path / "plain"), prepared.text.held_out_windows
    sessions = [
        DecodeSession(folder, capacity=windows.shape[1], all_positions=True, float_activations=floats)
        for folder, floats in ((prepared.original, False), (plain, True), (tmp_path / "out", True))
    ]
    original, kept, slim = sessions
    of_weights, of_both = measure_quality(original, kept, windows), measure_quality(original, slim, windows)
    assert report.plain.kl_to_original == pytest.approx(of_weights.kl_mean, rel=1e-6)
    assert report.artifact.kl_to_original == pytest.approx(of_both.kl_mean, rel=1e-6)
    assert report.artifact.kl_mean == pytest.approx(measure_quality(kept, slim, windows).kl_mean, rel=1e-6)
    assert report.original.perplexity == pytest.approx(measure_quality(original, original, windows).perplexity)
    # Rounded activations add to what the cache costs, and are what the floor is.
    assert report.artifact.kl_as_run != pytest.approx(report.artifact.kl_mean, rel=1e-3)
    assert 0 <= report.floor.kl_mean < report.artifact.kl_as_run  # 0 where one row and many are rounded alike


def test_gptq_is_refused_for_encoders(tmp_path: Path) -> None:
    snapshot = resolve(str(save_encoder("bert", "feature-extraction", tmp_path / "bert")))
    with pytest.raises(UnsupportedError, match="gptq"):
        check_recipe(recipe_of((), GPTQ).model_copy(update={"name": "encoder"}), read_spec(snapshot))
