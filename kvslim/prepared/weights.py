"""Quantises a decoder in memory; what takes minutes is taken from the disk when it was done before."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvslim import stages
from kvslim.export.stored import fetch_graph, graph_key, store_graph
from kvslim.weights.quantise import install_quantised, quantise_model
from kvslim.weights.rows import QuantisedRows
from kvslim.weights.stored import load_blocks, save_blocks

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder

FILE = "weights.npz"


def quantise(prepared: PreparedDecoder) -> QuantisedRows:
    """Quantises the weights in place, in the recipe's format; the blocks by rows, as `install_quantised` adds them."""
    prepared.progress.stage(stages.QUANTISE)
    weights, of = prepared.recipe.weights, (prepared.model, prepared.architecture, prepared.spec)
    if weights.method == "gptq":
        return _fitted_to_text(prepared)
    known = prepared.snapshot.stored_rows() if weights.type == "stored" else None
    _, rows = quantise_model(*of, weights, prepared.progress, known=known)
    return rows


def _fitted_to_text(prepared: PreparedDecoder) -> QuantisedRows:
    weights, of = prepared.recipe.weights, (prepared.model, prepared.architecture, prepared.spec)
    key = graph_key("weights", prepared.digest, weights.model_dump(), prepared.text.identity)
    with tempfile.TemporaryDirectory(prefix="kvslim-") as name:
        folder = Path(name)
        if fetch_graph(key, folder):
            rows = QuantisedRows()
            install_quantised(*of, load_blocks(folder / FILE), rows)
        else:
            windows = prepared.text.calibration_windows
            quantised, rows = quantise_model(*of, weights, prepared.progress, windows=windows)
            with suppress(OSError):  # a disk that is full is no reason to lose what took minutes
                save_blocks(folder / FILE, quantised)
                store_graph(key, folder)
    return rows
