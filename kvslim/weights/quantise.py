"""Quantises the weights of a model in torch, before anything is fitted to it.

Whatever is measured or fitted later then sees the numbers that the graph has, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from kvslim.contract import ModelSpec, WeightMethod
from kvslim.loading.architecture import Architecture
from kvslim.loading.mapped import in_file, let_go
from kvslim.progress import Progress
from kvslim.transform.surgery import layer_modules, project_directly
from kvslim.weights.blocks import Quantised, quantise
from kvslim.weights.choice import Chosen
from kvslim.weights.layerwise import quantise_on_text
from kvslim.weights.rows import QuantisedRows


def quantise_model(
    model: Any,
    architecture: Architecture,
    spec: ModelSpec,
    chosen: Mapping[str, Chosen],
    method: WeightMethod,
    progress: Progress,
    *,
    windows: np.ndarray | None = None,
    known: QuantisedRows | None = None,
) -> tuple[dict[str, Quantised], QuantisedRows]:
    """Quantises a prepared decoder in place.

    Args:
        model: The model; it computes with the quantised numbers afterwards.
        architecture: Where its parts live.
        spec: Its shape.
        chosen: Its matrices, and their formats.
        method: How they are rounded.
        progress: Receives the progress.
        windows: [n, length] token ids, for `gptq`.
        known: Rows that are in blocks already and stay so.

    Returns:
        The blocks of each matrix by the name of its module, and by rows as `install_quantised`.
    """
    found, rows = dict[str, Quantised](), QuantisedRows()

    def put(name: str, quantised: Quantised) -> None:
        found[name] = quantised.kept(in_file)
        install_quantised(model, architecture, spec, {name: found[name]}, rows)

    if windows is not None:
        quantise_on_text(model, layer_modules(model, architecture), chosen, windows, put, progress)
        return found, rows
    for name, entry in progress.track(chosen.items(), "matrices"):
        matrix = entry.module.weight.detach().numpy()
        put(name, quantise(matrix, entry.to, method) if known is None else known.stored(matrix))
    return found, rows


def install_quantised(
    model: nn.Module,
    architecture: Architecture,
    spec: ModelSpec,
    quantised: Mapping[str, Quantised],
    rows: QuantisedRows,
) -> None:
    """Lets a prepared decoder compute with quantised numbers; a table that is also the head changes with it.

    Args:
        model: The model; edited.
        architecture: Where its parts live.
        spec: Its shape.
        quantised: Blocks by the name of their module.
        rows: Receives them by the rows that the model has now.
    """
    for name, blocks in quantised.items():
        weight: Any = model.get_submodule(name).weight
        # In place: a weight that is mapped from a file stays there, and rows of it that others have change with it.
        weight.data.copy_(torch.from_numpy(blocks.numbers(weight.shape[1])))
        rows.add(weight.detach().numpy(), blocks)
        holder = model.get_submodule(name.rpartition(".")[0])
        if hasattr(holder, "kvslim"):  # an attention, which may have rows of the matrix as its own
            project_directly(holder, architecture, spec)
        let_go()
