"""Quantises a decoder in memory; what takes minutes is taken from the disk when it was done before."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvslim import stages
from kvslim.calibrate import cache
from kvslim.contract import MIB
from kvslim.errors import GateError
from kvslim.export.manifest import GRAPH
from kvslim.export.stored import fetch_graph, graph_key, store_graph
from kvslim.planning.matrices import FLOAT, FORMATS, MatrixPrices, MatrixPricing, ProbedMatrices, in_eight
from kvslim.transform.kl_evaluator import KLEvaluator, is_large, probe_windows
from kvslim.transform.projections import SIDES
from kvslim.transform.surgery import attention_modules, layer_modules
from kvslim.validation.measure import file_mib
from kvslim.weights.choice import Chosen, chosen_matrices
from kvslim.weights.quantise import install_quantised, quantise_model
from kvslim.weights.rows import QuantisedRows
from kvslim.weights.stored import load_blocks, save_blocks

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder
    from kvslim.recipe import Recipe
    from kvslim.weight_format import WeightFormat

FILE = "weights.npz"
NODES = 32 * 2**10  # bytes of a layer's nodes and their names in the graph, with those of its cache
Changed = Literal["nothing", "values", "attention"]


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
        return _matrices(prepared, weights)
    picking = matrix_picking(prepared, prepared.recipe)
    picked = picking.prices.within(limit * MIB - picking.beside)
    if picked is None:
        least = (picking.prices.sizes[0] + picking.beside) / MIB
        ratio = math.floor(100 * file_mib(prepared.original) / least) / 100
        raise GateError(
            f"no way to store the weights takes {limit:.4g} MiB or less",
            where="weights.file_mib" if weights.file_mib else "weights.file_ratio",
            fix=f"ask for {least + 0.05:.1f} MiB or more, or at most {ratio} times smaller",
        )
    return {
        name: replace(entry, to=picked.formats[name].of_width(entry.module.weight.shape[1]))
        for name, entry in picking.chosen.items()
    }


def _matrices(prepared: PreparedDecoder, weights: WeightFormat) -> dict[str, Chosen]:
    architecture = prepared.architecture
    layers = layer_modules(prepared.model, architecture)
    return chosen_matrices(prepared.model, layers, architecture, weights)


@dataclass(frozen=True)
class MatrixPicking:
    """What formats are picked from.

    Attributes:
        chosen: The matrices, by name.
        prices: Of their formats.
        constants: Bytes of what else the model has: norms, biases, tables of positions.
        added: Bytes of a file that are set aside for the codes of its cache and the nodes of its graph.
    """

    chosen: Mapping[str, Chosen]
    prices: MatrixPrices
    constants: float
    added: float

    @property
    def beside(self) -> float:
        """Bytes of the artifact's files besides the matrices."""
        return self.constants + self.added


def matrix_picking(prepared: PreparedDecoder, recipe: Recipe) -> MatrixPicking:
    """What formats of a decoder's matrices are picked from for a recipe; it is not quantised yet."""
    chosen = _matrices(prepared, recipe.weights)
    numbers = sum(entry.module.weight.numel() for entry in chosen.values())
    constants = file_mib(prepared.original) * MIB - _graph_bytes(prepared) - FLOAT * numbers
    return MatrixPicking(chosen, _prices(prepared, chosen, recipe), constants, _added_bytes(prepared, recipe))


def _prices(prepared: PreparedDecoder, chosen: Mapping[str, Chosen], recipe: Recipe) -> MatrixPrices:
    """What was measured of the matrices, from the disk when they were probed before.

    Those whose rows may change have eight bits in any case. Else they are priced by themselves, so that what is known
    of all others serves every recipe that trains nothing.
    """
    kind = changed(recipe)
    changing = _changing(prepared, chosen, "attention" if kind == "attention" else "values")
    others = {name: entry for name, entry in chosen.items() if name not in changing}
    made = FORMATS, prepared.digest, *prepared.text.identity
    probed = [others, changing] if kind == "nothing" else [others]
    parts = {cache.content_key("matrices", *made, list(part)): part for part in probed}
    known = {key: prices for key in parts if (prices := cache.load_probes(key, ProbedMatrices)) is not None}
    if missing := {key: part for key, part in parts.items() if key not in known}:
        known |= _probed(prepared, missing)
    settled = () if kind == "nothing" else in_eight(prepared.model, changing)
    return MatrixPrices(groups=(*(group for key in parts for group in known[key].groups), *settled))


def _probed(prepared: PreparedDecoder, parts: Mapping[str, Mapping[str, Chosen]]) -> dict[str, ProbedMatrices]:
    """Prices of parts of the matrices, by the key under which they are stored."""
    prepared.progress.stage(stages.PROBE_WEIGHTS)
    spec, large, mask = prepared.spec, is_large(prepared.model), prepared.text.calibration_mask()
    windows = probe_windows(prepared.text.calibration_windows, spec.layers, large=large)
    mask = None if mask is None else probe_windows(mask, spec.layers, large=large)
    evaluator = KLEvaluator(prepared.model, prepared.architecture, windows, mask, probing=True)
    pricing = MatrixPricing(prepared.model, prepared.architecture, spec, evaluator)
    groups = pricing.of(list(parts.values()), prepared.progress)
    found = {key: ProbedMatrices(key=key, groups=tuple(of)) for key, of in zip(parts, groups, strict=True)}
    for prices in found.values():
        cache.store_probes(prices)
    return found


def _added_bytes(prepared: PreparedDecoder, recipe: Recipe) -> float:
    """The most that codes and nodes of an artifact take in its files, without residuals: these widen encoders."""
    spec = prepared.spec
    graphs = 1 if recipe.draft == "none" else 2  # the same over the same weights
    nodes = graphs * (_graph_bytes(prepared) + spec.layers * NODES)
    # Encoders of all heads; of kv heads feedback, two quarters of a matrix each; and two that add residuals up.
    codes = spec.layers * FLOAT * (spec.q_heads + 1.5 * spec.kv_heads + 2) * spec.head_dim**2
    return nodes + (0 if changed(recipe) == "nothing" else codes)


def _graph_bytes(prepared: PreparedDecoder) -> int:
    return (prepared.original / GRAPH).stat().st_size


def _changing(
    prepared: PreparedDecoder, chosen: Mapping[str, Chosen], kind: Literal["values", "attention"]
) -> dict[str, Chosen]:
    """The matrices with rows that codes, or training, may change: such rows are stored in eight bits."""
    architecture, changing = prepared.architecture, set()
    for attention in attention_modules(prepared.model, architecture):
        slim: Any = attention.kvslim
        # Codes of keys and queries come behind RoPE; without it they fold into projections as those of values do.
        sides = ("value",) if kind == "values" and slim.rotary is not None else SIDES
        changing |= {attention.get_submodule(getattr(architecture, side)) for side in (*sides, "output")}
    return {name: entry for name, entry in chosen.items() if entry.module in changing}


def changed(recipe: Recipe) -> Changed:
    """Which matrices have rows that a recipe may change: none, those that values pass, or all of the attention."""
    if recipe.heal is not None:
        return "attention"
    refits = recipe.compensate
    keeps = recipe.budget is None and all(method.keeps_weights(refits=refits) for method in recipe.methods)
    return "nothing" if keeps else "values"
