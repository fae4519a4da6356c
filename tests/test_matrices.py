"""Bits and blocks of each matrix: what formats cost, limits of the file and of memory, and what a graph then has."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.models import CALIBRATION, VALIDATION, open_prepared, recipe_of, tokens_of, torch_logits

from kvslim.contract import MIB
from kvslim.devices.peak import RUNTIME_BYTES
from kvslim.errors import GateError, UsageError
from kvslim.export.manifest import SPECULATIVE_GRAPH
from kvslim.methods import KvHdc, KvQuant, Method
from kvslim.pipeline import compress
from kvslim.planning import matrices
from kvslim.planning.matrices import FORMATS, MatrixPrice, MatrixPrices, StoredAs
from kvslim.planning.split import split
from kvslim.prepared.weights import matrix_picking
from kvslim.recipe import Recipe, parse_recipe
from kvslim.settings import Budget
from kvslim.transform.kl_evaluator import KLEvaluator, probe_windows
from kvslim.types import DraftChoice, PlanPoint
from kvslim.validation.measure import file_mib
from kvslim.weight_format import WeightFormat
from kvslim.weights.blocks import BlockFormat, quantise


def limited(mib: float, *methods: Method) -> Recipe:
    return recipe_of(methods, WeightFormat(type="int4", file_mib=mib))


def size_of(formats: dict[str, BlockFormat], prices: MatrixPrices) -> float:
    ways = [{(way.bits, way.block): way.size for way in group.ways} for group in prices.groups]
    return sum(sizes[formats[group.names[0]]] for sizes, group in zip(ways, prices.groups, strict=True))


def test_matrices_that_read_one_input_are_priced_together_and_the_model_stays(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    before = torch_logits(prepared, tokens_of(prepared))
    prices = matrix_picking(prepared).prices
    of_layer = [
        tuple(f"model.layers.{layer}.{part}" for part in parts)
        for layer in range(prepared.spec.layers)
        for parts in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        )
    ]
    assert [group.names for group in prices.groups] == [("model.embed_tokens",), *of_layer, ("lm_head",)]
    np.testing.assert_array_equal(torch_logits(prepared, tokens_of(prepared)), before)


@pytest.mark.parametrize("group", [0, 1, 4, -1])  # the embedding, projections of the first layer, the head
def test_price_is_the_divergence_of_the_model_with_that_group_rounded(tiny_llama: Path, group: int) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    price = matrix_picking(prepared).prices.groups[group]
    windows = probe_windows(prepared.text.calibration_windows, prepared.spec.layers, large=False)
    evaluator = KLEvaluator(prepared.model, prepared.architecture, windows)
    for name in price.names:
        weight = prepared.model.get_submodule(name).weight
        numbers = quantise(weight.detach().numpy(), FORMATS[0].of_width(weight.shape[1]), "k_quant")
        weight.data = torch.from_numpy(np.ascontiguousarray(numbers.numbers(weight.shape[1])))
    assert price.ways[0].loss == pytest.approx(evaluator.kl_from(0), rel=1e-4)
    assert price.ways[-1].loss < price.ways[0].loss / 100  # 8 bits


PRICES = MatrixPrices(
    key="",
    groups=tuple(
        MatrixPrice(
            names=(name,),
            ways=tuple(
                StoredAs(bits=bits, block=block, size=size * factor, loss=loss * share)
                for (bits, block), factor, share in (((4, 128), 4.0, 1.0), ((4, 32), 5.0, 0.6), ((8, 128), 8.0, 0.004))
            ),
        )
        for name, size, loss in (("a", 10, 1.0), ("b", 100, 1.0), ("c", 100, 0.01))
    ),
)


@pytest.mark.parametrize("limit", [840, 880, 940, 1100, 1240, 1680])
def test_formats_lose_least_within_a_limit(limit: float) -> None:
    found = PRICES.within(limit, {})
    assert found is not None
    formats, loss = found
    fitting = [
        sum(way.loss for way in ways)
        for ways in itertools.product(*(group.ways for group in PRICES.groups))
        if sum(way.size for way in ways) <= limit
    ]
    assert size_of(formats, PRICES) <= limit
    assert loss <= 1.25 * min(fitting)  # taken greedily
    assert loss == pytest.approx(
        sum(
            way.loss
            for group in PRICES.groups
            for way in group.ways
            if formats[group.names[0]] == (way.bits, way.block)
        )
    )


def test_least_bits_are_kept_and_what_does_not_fit_is_told() -> None:
    formats, _ = PRICES.within(1300, {"c": 8}) or ({}, 0)
    assert formats["c"] == (8, 128)
    assert PRICES.least_size({}) == 840
    assert PRICES.least_size({"c": 8}) == 1240
    assert PRICES.within(839, {}) is None
    assert PRICES.within(1239, {"c": 8}) is None


# Codes of kv_hdc fold into matrices, which then take 8 bits; kv_quant leaves them alone.
@pytest.mark.parametrize(
    ("method", "draft"), [(KvQuant(bits=8), "none"), (KvHdc(bits=8), "none"), (KvQuant(), "lookup")]
)
def test_artifact_keeps_the_limit_of_its_files_and_uses_it(
    tiny_llama: Path, tmp_path: Path, method: Method, draft: DraftChoice
) -> None:
    recipe = limited(1000.0, method).model_copy(update={"draft": draft})
    picking = matrix_picking(open_prepared(tiny_llama, recipe))
    most = sum(max(way.size for way in group.ways) for group in picking.prices.groups)
    limit = (picking.others + (picking.least + most) / 2) / MIB
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


FRONTIER = tuple(
    PlanPoint(cache="int8", kv_bytes_per_token=size, kv_ratio=1, time_ratio=1, kl=kl)
    for size, kl in ((64.0, 0.0005), (32.0, 0.01), (16.0, 0.1))
)


@pytest.mark.parametrize(("steep", "cache"), [(1e-6, 6400), (1e4, 1600)])
def test_memory_goes_where_it_takes_most_loss(steep: float, cache: float) -> None:
    """Weights that lose hardly anything leave the cache all it can use, and those that lose much the least."""
    found = split(10_000, 2000, lambda size: steep * np.exp(-size / 2000), FRONTIER, 100)
    assert found is not None
    assert found.cache == pytest.approx(cache, rel=1e-6)
    assert found.weights + found.cache == pytest.approx(10_000)


def test_memory_that_holds_neither_is_told() -> None:
    assert split(3000, 2000, lambda _: 0.0, FRONTIER, 100) is None
    assert split(3000, 2000, lambda _: 0.0, (), 100) is None


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


def test_budget_of_memory_becomes_one_of_the_file_and_one_of_the_cache(tiny_llama: Path, tmp_path: Path) -> None:
    tight = RUNTIME_BYTES / MIB + 0.45
    manifest = compress(str(tiny_llama), memory_recipe(tight), tmp_path / "out")
    recipe = parse_recipe(manifest.recipe, where="")
    assert recipe.budget is not None
    assert recipe.budget.memory_mib is None
    assert recipe.weights.file_mib is not None
    assert recipe.budget.kv_mib is not None
    cache = manifest.kv_layout.bytes_at(64) / MIB
    assert cache <= recipe.budget.kv_mib
    assert file_mib(tmp_path / "out") + cache <= 0.45
    with pytest.raises(GateError, match="do not fit into 100 MiB"):
        compress(str(tiny_llama), memory_recipe(100), tmp_path / "none")
