"""Quantises a decoder in memory; what takes minutes is taken from the disk when it was done before."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvslim import stages
from kvslim.calibrate import cache
from kvslim.contract import MIB
from kvslim.errors import GateError
from kvslim.export.manifest import GRAPH
from kvslim.export.stored import fetch_graph, graph_key, store_graph
from kvslim.planning.matrices import FLOAT, FORMATS, MatrixPrices, MatrixPricing
from kvslim.transform.kl_evaluator import KLEvaluator, is_large, probe_windows
from kvslim.transform.surgery import layer_modules
from kvslim.validation.measure import file_mib
from kvslim.weights.blocks import BlockFormat
from kvslim.weights.choice import Chosen, chosen_matrices
from kvslim.weights.quantise import install_quantised, quantise_model
from kvslim.weights.rows import QuantisedRows
from kvslim.weights.stored import load_blocks, save_blocks

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder
    from kvslim.recipe import Recipe

FILE = "weights.npz"
NODES = 24 * 2**10  # bytes of a layer's nodes and their names in the graph, with those of its cache


def quantise(prepared: PreparedDecoder) -> QuantisedRows:
    """Quantises the weights in place, in the recipe's format; the blocks by rows, as `install_quantised` adds them.

    Raises:
        GateError: A limit of the file's size is below what the smallest formats take.
    """
    chosen = _chosen(prepared)
    prepared.progress.stage(stages.QUANTISE)
    weights, of = prepared.recipe.weights, (prepared.model, prepared.architecture, prepared.spec)
    if weights.method == "gptq":
        return _fitted_to_text(prepared, chosen)
    known = prepared.snapshot.stored_rows() if weights.type == "stored" else None
    _, rows = quantise_model(*of, chosen, weights.method, prepared.progress, known=known)
    return rows


def _fitted_to_text(prepared: PreparedDecoder, chosen: Mapping[str, Chosen]) -> QuantisedRows:
    of = (prepared.model, prepared.architecture, prepared.spec)
    formats = {name: entry.to for name, entry in chosen.items()}
    key = graph_key("weights", prepared.digest, formats, prepared.text.identity)
    with tempfile.TemporaryDirectory(prefix="kvslim-") as name:
        folder = Path(name)
        if fetch_graph(key, folder):
            rows = QuantisedRows()
            install_quantised(*of, load_blocks(folder / FILE), rows)
        else:
            windows = prepared.text.calibration_windows
            quantised, rows = quantise_model(*of, chosen, "gptq", prepared.progress, windows=windows)
            with suppress(OSError):  # a disk that is full is no reason to lose what took minutes
                save_blocks(folder / FILE, quantised)
                store_graph(key, folder)
    return rows


def file_limit(prepared: PreparedDecoder) -> float | None:
    """MiB that the recipe allows for the graph's files; None for no limit."""
    weights = prepared.recipe.weights
    return weights.file_mib or (
        None if weights.file_ratio is None else file_mib(prepared.original) / weights.file_ratio
    )


def _chosen(prepared: PreparedDecoder) -> dict[str, Chosen]:
    """The matrices to quantise, and their formats: those of the recipe, or what loses least within its limit."""
    weights, limit = prepared.recipe.weights, file_limit(prepared)
    if limit is None:
        return _matrices(prepared)
    picking = matrix_picking(prepared)
    found = picking.within(limit * MIB - picking.others)
    if found is None:
        least = (picking.least + picking.others) / MIB
        ratio = math.floor(100 * file_mib(prepared.original) / least) / 100
        raise GateError(
            f"no way to store the weights takes {limit:.4g} MiB or less",
            where="weights.file_mib" if weights.file_mib else "weights.file_ratio",
            fix=f"ask for {least + 0.05:.1f} MiB or more, or at most {ratio} times smaller",
        )
    formats, _ = found
    return {
        name: replace(entry, to=formats[name].of_width(entry.module.weight.shape[1]))
        for name, entry in picking.chosen.items()
    }


def _matrices(prepared: PreparedDecoder) -> dict[str, Chosen]:
    architecture = prepared.architecture
    layers = layer_modules(prepared.model, architecture)
    return chosen_matrices(prepared.model, layers, architecture, prepared.recipe.weights)


@dataclass(frozen=True)
class MatrixPicking:
    """What formats are picked from.

    Attributes:
        chosen: The matrices, by name.
        prices: Of their formats.
        least_bits: Of those that may not have fewer, by name.
        others: Bytes of the artifact's files besides the matrices.
    """

    chosen: Mapping[str, Chosen]
    prices: MatrixPrices
    least_bits: Mapping[str, int]
    others: float

    @property
    def least(self) -> float:
        """Bytes of the matrices in the smallest formats."""
        return self.prices.least_size(self.least_bits)

    def within(self, limit: float) -> tuple[dict[str, BlockFormat], float] | None:
        """As `MatrixPrices.within`."""
        return self.prices.within(limit, self.least_bits)


def matrix_picking(prepared: PreparedDecoder) -> MatrixPicking:
    """What formats of a decoder's matrices are picked from; it is not quantised yet."""
    chosen = _matrices(prepared)
    prices = _prices(prepared, chosen)
    return MatrixPicking(chosen, prices, _least_bits(prepared, chosen), _other_bytes(prepared, chosen))


def _prices(prepared: PreparedDecoder, chosen: Mapping[str, Chosen]) -> MatrixPrices:
    """What was measured of the matrices, from the disk when they were probed before."""
    spec = prepared.spec
    key = cache.content_key("matrices", FORMATS, prepared.digest, *prepared.text.identity)
    prices = cache.load_probes(key, MatrixPrices)
    if prices is None:
        prepared.progress.stage(stages.PROBE_WEIGHTS)
        large, mask = is_large(prepared.model), prepared.text.calibration_mask()
        windows = probe_windows(prepared.text.calibration_windows, spec.layers, large=large)
        mask = None if mask is None else probe_windows(mask, spec.layers, large=large)
        evaluator = KLEvaluator(prepared.model, prepared.architecture, windows, mask, probing=True)
        pricing = MatrixPricing(prepared.model, prepared.architecture, spec, evaluator)
        prices = MatrixPrices(key=key, groups=pricing.of(chosen, prepared.progress))
        cache.store_probes(prices)
    return prices


def _other_bytes(prepared: PreparedDecoder, chosen: Mapping[str, Chosen]) -> float:
    """Bytes of the artifact's files besides the matrices, with those of the codes that a recipe may put in."""
    spec, numbers = prepared.spec, sum(entry.module.weight.numel() for entry in chosen.values())
    codes = 0 if keeps_weights(prepared.recipe) else (spec.q_heads + spec.kv_heads) * spec.head_dim**2
    drafts = 0 if prepared.recipe.draft == "none" else 1  # the same graph over the same weights
    graph = (prepared.original / GRAPH).stat().st_size
    nodes = drafts * graph + (1 + drafts) * spec.layers * NODES
    return file_mib(prepared.original) * MIB + nodes + spec.layers * FLOAT * codes - FLOAT * numbers


def _least_bits(prepared: PreparedDecoder, chosen: Mapping[str, Chosen]) -> dict[str, int]:
    """Eight for the matrices of attention, where codes fold into them: rows that change are stored in eight anyway."""
    if keeps_weights(prepared.recipe):
        return {}
    layers, path = layer_modules(prepared.model, prepared.architecture), prepared.architecture.attention
    inside = {module for layer in layers for module in layer.get_submodule(path).modules()}
    return {name: 8 for name, entry in chosen.items() if entry.module in inside}


def keeps_weights(recipe: Recipe) -> bool:
    """Whether nothing that a recipe does changes rows of matrices."""
    return recipe.budget is None and recipe.heal is None and all(method.keeps_weights for method in recipe.methods)
