"""Bits and blocks of each matrix: what formats cost, limits of the file and of memory, and what a graph then has."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.models import CALIBRATION, VALIDATION, open_prepared, recipe_of, tokens_of, torch_logits

from kvslim.caches import SharedCache
from kvslim.contract import MIB
from kvslim.devices.peak import BRANCH_BYTES, FEEDBACK_BYTES, RESIDUAL_BYTES, open_bytes
from kvslim.devices.stored_weights import artifact_weights
from kvslim.errors import GateError, UsageError
from kvslim.export.manifest import SPECULATIVE_GRAPH
from kvslim.methods import KvHdc, KvQuant, Method
from kvslim.pipeline import compress
from kvslim.planning import matrices
from kvslim.planning.cost import Choice, bundled
from kvslim.planning.decide import decide
from kvslim.planning.matrices import FORMATS, MatrixPrice, MatrixPrices, StoredAs
from kvslim.planning.split import CacheSize, beside_bytes, branch_bytes, least_room, split, weights_sizes
from kvslim.prepared import limits
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.prepared.weights import matrix_picking
from kvslim.recipe import Recipe, parse_recipe
from kvslim.settings import Budget
from kvslim.transform.kl_evaluator import KLEvaluator, probe_windows
from kvslim.transform.projections import SIDES, projection
from kvslim.transform.surgery import attention_modules, slim_modules, trial
from kvslim.types import DraftChoice, LayerPlan, Manifest, Plan
from kvslim.validation.measure import file_mib
from kvslim.weight_format import WeightFormat
from kvslim.weights.blocks import BlockFormat, quantise
from kvslim.weights.rows import QuantisedRows


def limited(mib: float, *methods: Method) -> Recipe:
    return recipe_of(methods, WeightFormat(type="int4", file_mib=mib))


def size_of(formats: dict[str, BlockFormat], prices: MatrixPrices) -> float:
    ways = [{(way.bits, way.block): way.size for way in group.ways} for group in prices.groups]
    return sum(sizes[formats[group.names[0]]] for sizes, group in zip(ways, prices.groups, strict=True))


def test_matrices_that_read_one_input_are_priced_together_and_the_model_stays(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    before = torch_logits(prepared, tokens_of(prepared))
    prices = matrix_picking(prepared, prepared.recipe).prices
    queries, values = (
        [
            tuple(f"model.layers.{layer}.{part}" for part in parts)
            for layer in range(prepared.spec.layers)
            for parts in groups
        ]
        for groups in (
            (("self_attn.q_proj", "self_attn.k_proj"), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
            (("self_attn.v_proj",), ("self_attn.o_proj",)),  # codes may change these: they are priced by themselves
        )
    )
    names = [group.names for group in prices.groups]
    assert names == [("model.embed_tokens",), *queries, ("lm_head",), *values]
    np.testing.assert_array_equal(torch_logits(prepared, tokens_of(prepared)), before)


# The embedding, queries and keys, the MLP, the head, values.
@pytest.mark.parametrize("group", [0, 1, 2, 7, 8])
def test_price_is_the_divergence_of_the_model_with_that_group_rounded(tiny_llama: Path, group: int) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    price = matrix_picking(prepared, prepared.recipe).prices.groups[group]
    windows = probe_windows(prepared.text.calibration_windows, prepared.spec.layers, large=False)
    evaluator = KLEvaluator(prepared.model, prepared.architecture, windows)
    for name in price.names:
        weight = prepared.model.get_submodule(name).weight
        numbers = quantise(weight.detach().numpy(), FORMATS[0].of_width(weight.shape[1]), "k_quant")
        weight.data = torch.from_numpy(np.ascontiguousarray(numbers.numbers(weight.shape[1])))
    assert price.ways[0].loss == pytest.approx(evaluator.kl_from(0), rel=1e-4)
    assert price.ways[-1].loss < price.ways[0].loss / 100  # 8 bits


PRICES = MatrixPrices(
    groups=tuple(
        MatrixPrice(
            names=(name,),
            ways=tuple(
                StoredAs(bits=bits, block=block, size=size * factor, memory=2 * size * factor, loss=loss * share)
                for (bits, block), factor, share in (((4, 128), 4.0, 1.0), ((4, 32), 5.0, 0.6), ((8, 128), 8.0, 0.004))
            ),
        )
        for name, size, loss in (("a", 10, 1.0), ("b", 100, 1.0), ("c", 100, 0.01))
    ),
)


@pytest.mark.parametrize("limit", [840, 880, 940, 1100, 1240, 1680])
def test_formats_lose_least_within_a_limit(limit: float) -> None:
    found = PRICES.within(limit)
    assert found is not None
    formats, loss, memory = found
    fitting = [
        sum(way.loss for way in ways)
        for ways in itertools.product(*(group.ways for group in PRICES.groups))
        if sum(way.size for way in ways) <= limit
    ]
    assert size_of(formats, PRICES) <= limit
    assert memory == 2 * size_of(formats, PRICES)
    assert loss <= 1.25 * min(fitting)  # taken greedily
    assert loss == pytest.approx(
        sum(
            way.loss
            for group in PRICES.groups
            for way in group.ways
            if formats[group.names[0]] == (way.bits, way.block)
        )
    )


def test_what_does_not_fit_is_told() -> None:
    assert PRICES.sizes == (840, 1680)
    assert PRICES.within(839) is None


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # a table beside the head, and one that is the head too
def test_memory_of_formats_is_what_a_graph_of_them_takes(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    model = tiny_model(family)
    recipe = limited(1000.0, KvQuant())
    picking = matrix_picking(open_prepared(model, recipe), recipe)
    limit = sum(picking.prices.sizes) / 2
    picked = picking.prices.within(limit)
    assert picked is not None
    prepared = open_prepared(model, limited((limit + picking.beside) / MIB, KvQuant()))
    prepared.build_plain(tmp_path)
    floats, rounded = (
        artifact_weights(folder, prepared.spec, "", 0).decoding for folder in (prepared.original, tmp_path)
    )
    numbers = sum(entry.module.weight.numel() for entry in picking.chosen.values())
    table = prepared.model.get_input_embeddings().weight
    unread = 0 if prepared.model.get_output_embeddings().weight is table else table.numel()
    assert picked.memory == pytest.approx(rounded - floats + 4 * (numbers - unread), abs=500)


def test_rows_of_other_blocks_are_of_another_form_and_changed_rows_of_that_of_eight_bits() -> None:
    """Products of one form become one, in the finest format: others would take more than they were priced at."""
    rows, numbers = QuantisedRows(), np.random.default_rng(0).normal(size=(4, 2, 256)).astype(np.float32)
    for matrix, to in zip(numbers, FORMATS, strict=True):
        rows.add(matrix, quantise(matrix, to, "k_quant"))
    forms = [rows.form(matrix) for matrix in numbers]
    assert forms == [(to, False) for to in FORMATS]
    assert rows.form(numbers[0] + 1) == forms[-1]


# Behind RoPE codes of keys and queries are matrices of their own; without it they fold into projections too.
@pytest.mark.parametrize(("family", "bits"), [("llama", [4, 4, 8, 8]), ("gpt2", [8, 8, 8, 8])])
def test_only_rows_that_codes_change_take_eight_bits(
    tiny_model: Callable[[str], Path], family: str, bits: list[int]
) -> None:
    model, recipe = tiny_model(family), limited(1000.0, KvHdc(bits=8))
    picking = matrix_picking(open_prepared(model, recipe), recipe)
    least = (picking.prices.sizes[0] + picking.beside) / MIB
    prepared = open_prepared(model, limited(least, KvHdc(bits=8)))
    prepared.install(prepared.codes(decide(recipe, prepared.spec, prepared.statistics)))
    assert prepared.rows is not None
    for attention in attention_modules(prepared.model, prepared.architecture):
        rows = [projection(attention, prepared.architecture, side)[0] for side in (*SIDES, "output")]
        assert [prepared.rows.form(each.astype(np.float32))[0].bits for each in rows] == bits


# Codes of kv_hdc fold into matrices, which then take 8 bits; kv_quant leaves them alone.
@pytest.mark.parametrize(
    ("method", "draft"), [(KvQuant(bits=8), "none"), (KvHdc(bits=8), "none"), (KvQuant(), "lookup")]
)
def test_artifact_keeps_the_limit_of_its_files_and_uses_it(
    tiny_llama: Path, tmp_path: Path, method: Method, draft: DraftChoice
) -> None:
    recipe = limited(1000.0, method).model_copy(update={"draft": draft})
    picking = matrix_picking(open_prepared(tiny_llama, recipe), recipe)
    limit = (picking.beside + sum(picking.prices.sizes) / 2) / MIB
    recipe = recipe.model_copy(update={"weights": WeightFormat(type="int4", file_mib=limit)})
    manifest = compress(str(tiny_llama), recipe, tmp_path / "out")
    assert (tmp_path / "out" / SPECULATIVE_GRAPH).exists() == (draft != "none")
    assert limit - 0.2 < file_mib(tmp_path / "out") <= limit
    assert manifest.report is not None
    gate = next(gate for gate in manifest.report.gates if gate.name == "max_file_mib")
    assert (gate.passed, gate.limit) == (True, limit)
    assert manifest.report.plain.kl_to_original is not None
    nodes = [node for node in ir.load(tmp_path / "out" / "model.onnx").graph if node.op_type == "MatMulNBits"]
    assert {node.attributes.get_int("bits") for node in nodes} == {4, 8}


def test_limit_that_nothing_fits_names_one_that_does(tiny_llama: Path) -> None:
    with pytest.raises(GateError, match=r"takes 0\.01 MiB or less") as caught:
        open_prepared(tiny_llama, limited(0.01))
    mib, ratio = re.findall(r"[\d.]+", caught.value.fix)
    open_prepared(tiny_llama, limited(float(mib)))
    prepared = open_prepared(tiny_llama, recipe_of((), WeightFormat(type="int4", file_ratio=float(ratio))))
    assert prepared.rows is not None


def test_second_limit_takes_prices_from_the_disk(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_prepared(tiny_llama, limited(1.0))
    monkeypatch.setattr(matrices.MatrixPricing, "of", lambda *_: pytest.fail("probed again"))
    open_prepared(tiny_llama, limited(2.0))


def test_bits_alone_are_picked_by_a_limit() -> None:
    for other in ({"type": "int8"}, {"mixed": True}, {"block": 32}, {"method": "rtn"}):
        with pytest.raises(ValueError, match="picks bits and blocks"):
            WeightFormat.model_validate({"type": "int4", "file_mib": 1, **other})


CACHES = [CacheSize(6400, 400, 0.0005), CacheSize(3200, 300, 0.01), CacheSize(1600, 200, 0.1)]


def prices_of(steep: float) -> MatrixPrices:
    """One matrix that may take from 2,000 bytes on, in memory an eighth more, and loses the less the more it takes."""
    ways = (
        StoredAs(bits=4, block=place, size=size, memory=size * 1.125, loss=steep / size)
        for place, size in enumerate(map(float, np.geomspace(2000, 8000, 200)))
    )
    return MatrixPrices(groups=(MatrixPrice(names=("a",), ways=tuple(ways)),))


@pytest.mark.parametrize(("steep", "whole"), [(1e-9, 6800), (1e6, 1800)])
def test_memory_goes_where_it_takes_most_loss(steep: float, whole: float) -> None:
    """Weights that lose hardly anything leave the cache all it can use, and those that lose much the least."""
    prices = prices_of(steep)
    weights = weights_sizes(prices)
    found = split(10_000, weights, CACHES)
    assert found is not None
    picked = prices.within(found.weights)
    assert picked is not None
    codes = np.interp(found.cache, [1600, 3200, 6400], [200, 300, 400])
    assert 9_900 <= picked.memory + found.cache + codes <= 10_001  # all but the codes of the next larger cache
    assert found.cache + codes == pytest.approx(whole, abs=10_000 / 50)
    assert split(10_000, weights, [*CACHES, CacheSize(1000, 2600, 0.2)]) == found  # takes more, and loses more


def test_memory_that_holds_neither_is_told() -> None:
    weights = weights_sizes(prices_of(1.0))
    least = least_room(weights, CACHES)
    assert least == pytest.approx(2000 * 1.125 + 1600 + 200, abs=2)
    assert split(least - 1, weights, CACHES) is None
    assert split(least, weights, CACHES) is not None
    assert split(10_000, weights, []) is None


def test_codes_of_a_plan_take_what_is_put_into_the_model(prepared: PreparedDecoder) -> None:
    layers = (
        bundled(LayerPlan(layer=0, heads=(0, 1)), Choice(8, 8), None, 4),
        bundled(LayerPlan(layer=1), Choice(8, 0), None, 8),
    )
    plan = Plan(layers=layers)
    with trial(prepared.model, prepared.architecture, prepared.codes(plan)):
        slims = slim_modules(prepared.model, prepared.architecture)
        numbers = sum(code.numel() for slim in slims for code in (slim.key_encoder, slim.query_encoder))
    assert beside_bytes(prepared.spec, plan) == 4 * numbers + 2 * BRANCH_BYTES + FEEDBACK_BYTES + RESIDUAL_BYTES
    shared = Plan(layers=(layers[1].model_copy(update={"layer": 0}), LayerPlan(layer=1, cache=SharedCache(source=0))))
    with trial(prepared.model, prepared.architecture, prepared.codes(shared)):
        own, reading = slim_modules(prepared.model, prepared.architecture)
        numbers = own.key_encoder.numel() + own.query_encoder.numel() + reading.query_encoder.numel()
    assert beside_bytes(prepared.spec, shared) == 4 * numbers + 2 * BRANCH_BYTES


@pytest.mark.parametrize(
    ("given", "blocks", "settled"),
    [
        ({}, False, "int4"),
        ({}, True, "stored"),
        ({"file_mib": 1}, True, "int4"),
        ({"method": "gptq"}, True, "int4"),
    ],
)
def test_format_is_the_files_own_unless_more_is_asked(given: dict[str, object], blocks: bool, settled: str) -> None:
    weights = WeightFormat.model_validate({"type": "auto", **given})
    assert weights.settled(is_encoder=False, has_blocks=blocks).type == settled
    assert weights.settled(is_encoder=True, has_blocks=False).type == "fp32"


def test_encoder_gets_weights_that_can_be_read_back() -> None:
    settled = WeightFormat(type="auto", mixed=True).settled(is_encoder=True, has_blocks=False)
    assert WeightFormat.model_validate(settled.model_dump()) == WeightFormat()


def test_weights_of_one_limit_are_others_where_codes_fold_into_them(tiny_llama: Path) -> None:
    kept, folded = (open_prepared(tiny_llama, limited(1.0, method)) for method in (KvQuant(bits=8), KvHdc(bits=8)))
    assert kept.weights_identity != folded.weights_identity


@pytest.mark.parametrize(
    "weights",
    [
        {"type": "int8"},
        {"type": "int4", "method": "rtn"},
        {"type": "auto", "block": 64},
        {"type": "auto", "file_mib": 90},
    ],
)
def test_budget_of_memory_needs_bits_to_choose(tiny_llama: Path, tmp_path: Path, weights: dict[str, object]) -> None:
    recipe = memory_recipe(300).model_copy(update={"weights": WeightFormat.model_validate(weights)})
    with pytest.raises(UsageError, match="leave nothing to choose"):
        compress(str(tiny_llama), recipe, tmp_path / "out")


def test_budget_of_memory_says_what_time_can_be_kept(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = memory_recipe(300)
    assert recipe.budget is not None
    hurried = recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"time_ratio": 0.01})})
    with pytest.raises(GateError, match="of plain's time per token"):
        compress(str(tiny_llama), hurried, tmp_path / "out")


def memory_recipe(mib: float) -> Recipe:
    return Recipe(
        name="test",
        budget=Budget(memory_mib=mib, context=64),
        weights=WeightFormat(type="int4"),
        calibration=CALIBRATION.model_copy(update={"samples": 8}),
        validation=VALIDATION,
    )


def budgeted(model: Path, folder: Path, limit: float, **others: float) -> tuple[Recipe, Manifest]:
    """An artifact within so many MiB, and its recipe."""
    recipe = memory_recipe(limit)
    assert recipe.budget is not None
    recipe = recipe.model_copy(update={"budget": recipe.budget.model_copy(update=others)})
    manifest = compress(str(model), recipe, folder)
    found = parse_recipe(manifest.recipe, where="")
    assert found.weights.file_mib is not None
    assert found.gates.max_file_mib is not None
    assert file_mib(folder) <= found.gates.max_file_mib
    return found, manifest


def test_budget_of_memory_becomes_one_of_the_file_and_one_of_the_cache(tiny_llama: Path, tmp_path: Path) -> None:
    recipe, manifest = budgeted(tiny_llama, tmp_path / "out", open_bytes(2) / MIB + 1.95, max_kl=100.0)
    assert recipe.budget is not None
    assert recipe.budget.memory_mib is None
    assert recipe.budget.kv_mib is not None
    assert manifest.kv_layout.bytes_at(64) / MIB <= recipe.budget.kv_mib
    with pytest.raises(GateError, match="do not fit into 50 MiB"):
        compress(str(tiny_llama), memory_recipe(50), tmp_path / "none")


def test_memory_that_nothing_fits_names_some_that_does(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "decided_by", lambda *_: None)  # steps that the kernel cannot read take no memory
    with pytest.raises(GateError, match="do not fit") as caught:
        open_prepared(tiny_llama, memory_recipe(50))
    enough = re.findall(r"[\d.]+", caught.value.fix)[0]
    assert open_prepared(tiny_llama, memory_recipe(float(enough))).rows is not None
    monkeypatch.setattr(limits, "_planned_sizes", lambda *_: [])
    with pytest.raises(GateError, match="there is no plan of the cache"):
        open_prepared(tiny_llama, memory_recipe(1000))


def test_budget_of_memory_takes_steps_alone_where_they_leave_more_for_the_weights(
    tiny_llama: Path, tmp_path: Path
) -> None:
    room = 2 * BRANCH_BYTES / MIB + 0.22
    limit = open_bytes(2) / MIB + room
    recipe, manifest = budgeted(tiny_llama, tmp_path / "out", limit)
    assert (recipe.methods, recipe.budget, recipe.compensate) == ((KvQuant(bits=8),), None, False)
    beside = branch_bytes(manifest.plan) + manifest.kv_layout.bytes_at(64) + manifest.spec.rope_bytes
    weights = artifact_weights(tmp_path / "out", manifest.spec, "", 0).decoding
    assert (weights + beside) / MIB == pytest.approx(room - 0.01, abs=0.01)  # all of it is used
    assert manifest.report is not None
    assert manifest.report.artifact.peak_rss_mib == pytest.approx(limit, rel=0.2)
