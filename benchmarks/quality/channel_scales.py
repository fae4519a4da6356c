"""Scales of the channels that matrices read, folded into the norms before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.models import OpenModel
from benchmarks.quality.weights import FORMATS, cost
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, USUAL
from kvslim.loading.model import load_model
from kvslim.loading.source import resolve
from kvslim.weights.blocks import BlockFormat, Floats, quantise

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SPREAD = 0.5  # standard deviation of the logarithm of a random scale
NAMES = {"none": "as it is", "searched": "scales searched", "random": "scales at random"}
TABLE = Table((Column("weights", "KL of the weights"),), pivot="scales", each=(Column("kl", "{}", ".2g"),), format="")


class _Reader(NamedTuple):
    """A norm, and the projections that read what it gives."""

    norm: Any
    projections: tuple[Any, ...]


@benchmark(
    "books",
    "smollm2",
    table=TABLE,
    quick={"text": BRIEF, "formats": ("int4 (k_quant)",), "scales": ("none", "searched")},
)
def channel_scales(
    source: Source,
    *,
    text: Mapping[str, Any] = USUAL,
    formats: tuple[str, ...] = ("int4 (k_quant)", "int4 (k_quant, blocks of 128)", "int4 (gptq)"),
    scales: tuple[str, ...] = tuple(NAMES),
) -> Iterator[Values]:
    """What quantised weights lose with scales folded into the norms of a Llama; in floats the model stays what it is.

    Searched scales are those of AWQ (Lin et al. 2023, section 3.2): the mean size of a channel to some power, that with
    which the products of the norm's projections lose least on the calibration text. Random ones take weights off the
    grid that they may lie on.
    """
    source = source._replace(recall=None)
    original = OpenModel(source, text)
    for name in scales:
        copy = source._replace(model=str(_scaled(source, original.calibration_windows, name)))
        for kind in formats:
            yield {"weights": kind, "scales": NAMES[name], "kl": cost(copy, text, FORMATS[kind], original)["kl"]}


def _scaled(source: Source, windows: np.ndarray, name: str) -> Path:
    """A copy of a model whose norms and projections have scales."""
    snapshot, folder = resolve(source.model), source.folder / name
    model = load_model(snapshot)
    readers = [
        reader
        for layer in model.model.layers
        for reader in (
            _Reader(layer.input_layernorm, tuple(getattr(layer.self_attn, f"{side}_proj") for side in "qkv")),
            _Reader(layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        )
    ]
    if name == "searched":
        _search(model, readers, windows)
    if name == "random":
        draw = np.random.default_rng(0).normal
        for reader in readers:
            _fold(reader, np.exp(draw(0, SPREAD, len(reader.norm.weight))).astype(np.float32))
    model.save_pretrained(folder)
    snapshot.tokenizer().save_pretrained(folder)
    return folder


def _search(model: Any, readers: Sequence[_Reader], windows: np.ndarray) -> None:
    inputs: dict[Any, list[Floats]] = {reader.norm: [] for reader in readers}
    hooks = [norm.register_forward_hook(_keep(kept)) for norm, kept in inputs.items()]
    with torch.inference_mode():
        for window in windows:
            model.model(input_ids=torch.from_numpy(window[None]), use_cache=False)
    for hook in hooks:
        hook.remove()
    for reader in readers:
        x = np.concatenate(inputs.pop(reader.norm))
        moments = x.T @ x
        sizes = np.abs(x).mean(0)
        tried = [_normalised(np.maximum(sizes, 1e-4 * sizes.max()) ** power) for power in EXPONENTS]
        _fold(reader, min(tried, key=lambda scales, of=reader, by=moments: _loss(of, scales, by)))


def _keep(kept: list[Floats]) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    return lambda _, __, found: kept.append(found[0].numpy())


def _normalised(scales: Floats) -> Floats:
    found: Floats = scales / np.sqrt(scales.max() * scales.min())
    return found


def _loss(reader: _Reader, scales: Floats, moments: Floats) -> float:
    """What a norm's projections lose on inputs with these moments, where their columns are scaled and rounded."""
    lost = 0.0
    for projection in reader.projections:
        matrix = projection.weight.detach().numpy()
        rounded = quantise(matrix * scales, BlockFormat(4, 32), "k_quant").numbers(matrix.shape[1]) / scales
        error = rounded - matrix
        lost += float(np.einsum("ni,ij,nj->", error, moments, error, optimize=True))
    return lost


def _fold(reader: _Reader, scales: Floats) -> None:
    factor = torch.from_numpy(scales)
    reader.norm.weight.data /= factor
    for projection in reader.projections:
        projection.weight.data *= factor
