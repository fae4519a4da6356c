"""How each matrix of a decoder is stored, so that the graph loses least within so many bytes.

Matrices that read one input are stored alike, since the graph packs some of them. Values are apart from queries and
keys, since codes fold into them. Each such group is rounded coarsely, alone, and the divergence that this makes is its
price. For noise this small the divergence grows with the noise's energy, so other formats cost as much less as their
noise has less. What groups lose adds up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import nn

from kvslim.contract import Frozen, ModelSpec
from kvslim.loading.architecture import Architecture
from kvslim.loading.mapped import let_go
from kvslim.planning.allocate import Option, allocate
from kvslim.progress import Progress
from kvslim.transform.hooks import hooked
from kvslim.transform.surgery import attention_modules, layer_modules, project_directly
from kvslim.weights.blocks import BlockFormat, Floats, quantise
from kvslim.weights.choice import Chosen

if TYPE_CHECKING:
    from kvslim.transform.kl_evaluator import KLEvaluator

# What is probed comes first. Two bits leave 15 times the noise, and MatMulNBits does not read them faster than four.
FORMATS = (BlockFormat(4, 128), BlockFormat(4, 64), BlockFormat(4, 32), BlockFormat(8, 128))
EIGHT = FORMATS[-1]
FLOAT = 4


class StoredAs(Frozen):
    """One way to store the matrices of a group: bytes, and the divergence that it is expected to make."""

    bits: int
    block: int
    size: float = Field(description="bytes in the file")
    memory: float = Field(description="bytes in a process")
    loss: float


class MatrixPrice(Frozen):
    """Matrices that are stored alike, by the names of their modules, and the ways to store them."""

    names: tuple[str, ...]
    ways: tuple[StoredAs, ...]


class Picked(NamedTuple):
    """How matrices are stored.

    Attributes:
        formats: By the name of their module.
        loss: Expected divergence, nats per token.
        memory: Bytes in a process.
    """

    formats: dict[str, BlockFormat]
    loss: float
    memory: float


class MatrixPrices(Frozen):
    """What formats are picked from: the ways to store each group of a model's matrices."""

    groups: tuple[MatrixPrice, ...]

    @property
    def sizes(self) -> tuple[float, float]:
        """Bytes of all matrices in the smallest formats, and in the largest."""
        of_groups = [[way.size for way in group.ways] for group in self.groups]
        return sum(map(min, of_groups)), sum(map(max, of_groups))

    def within(self, limit: float) -> Picked | None:
        """The format of each matrix, of least expected divergence within so many bytes of a file.

        Returns:
            The formats with what they lose and take; None where nothing fits.
        """
        taken = allocate(
            [[Option(way.size, way.loss, place) for place, way in enumerate(group.ways)] for group in self.groups],
            limit,
        )
        if taken is None:
            return None
        found = [group.ways[option.name] for group, option in zip(self.groups, taken, strict=True)]
        formats = {
            name: BlockFormat(way.bits, way.block)
            for group, way in zip(self.groups, found, strict=True)
            for name in group.names
        }
        return Picked(formats, sum(way.loss for way in found), sum(way.memory for way in found))


class ProbedMatrices(MatrixPrices):
    """What was measured of some of a model's matrices; no limit decides it."""

    key: str = Field(description="hash of all that decides it: model, text, and the names of the matrices")


class MatrixPricing(NamedTuple):
    """What prices are found with; the model is as it was afterwards.

    Attributes:
        model: A prepared decoder whose weights are not rounded.
        architecture: Where its parts live.
        spec: Its shape.
        evaluator: Of the model, on text that nothing is fitted to.
    """

    model: Any
    architecture: Architecture
    spec: ModelSpec
    evaluator: KLEvaluator

    def of(self, parts: Sequence[Mapping[str, Chosen]], progress: Progress) -> list[list[MatrixPrice]]:
        """The price of each group of the chosen modules, in the order that they run; a group is of one part."""
        names = {entry.module: name for part in parts for name, entry in part.items()}
        tokens = self.evaluator.batches[0][:1]
        groups = [
            (place, group)
            for place, part in enumerate(parts)
            for group in _groups(self.model, [entry.module for entry in part.values()], tokens)
        ]
        found: list[list[MatrixPrice]] = [[] for _ in parts]
        for place, group in progress.track(groups, "matrices probed"):
            named = tuple(names[module] for module in group)
            found[place].append(MatrixPrice(names=named, ways=tuple(self._ways(group))))
        return found

    def _ways(self, group: Sequence[Any]) -> Iterator[StoredAs]:
        matrices = [module.weight.detach().numpy() for module in group]
        coarse = [_rounded(matrix, FORMATS[0]) for matrix in matrices]
        loss, noises = self._loss(group, coarse), [sum(map(_noise, matrices, coarse))]
        del coarse  # one rounded copy of a large table is enough
        noises += [sum(_noise(matrix, _rounded(matrix, to)) for matrix in matrices) for to in FORMATS[1:]]
        let_go()
        for to, noise in zip(FORMATS, noises, strict=True):
            yield _stored_as(self.model, group, to, loss * (noise / noises[0] if noises[0] else 0.0))

    def _loss(self, group: Sequence[Any], numbers: Sequence[Floats]) -> float:
        layers = layer_modules(self.model, self.architecture)
        inside = [place for place, layer in enumerate(layers) for module in layer.modules() if module in group]
        is_head = all(module is self.model.get_output_embeddings() for module in group) and not self._is_tied
        with _replaced(group, numbers, self):
            return self.evaluator.kl_from(min(inside) if inside else len(layers) * is_head)

    @property
    def _is_tied(self) -> bool:
        return self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight


def _noise(matrix: Floats, rounded: Floats) -> float:
    """The energy of the error of a rounded matrix, added up row by row."""
    return sum(float(np.square(near - row, dtype=np.float64).sum()) for near, row in zip(rounded, matrix, strict=True))


def in_eight(model: Any, chosen: Mapping[str, Chosen]) -> tuple[MatrixPrice, ...]:
    """Matrices that take eight bits in any case, each by itself; they are not probed, as there is nothing to choose."""
    return tuple(
        MatrixPrice(names=(name,), ways=(_stored_as(model, [entry.module], EIGHT, 0.0),))
        for name, entry in chosen.items()
    )


def _stored_as(model: Any, group: Sequence[Any], to: BlockFormat, loss: float) -> StoredAs:
    size = sum(_in_file(module.weight.shape, to) for module in group)
    memory = sum(_in_memory(model, module, to) for module in group)
    return StoredAs(bits=to.bits, block=to.block, size=size, memory=memory, loss=loss)


def _in_memory(model: Any, module: Any, to: BlockFormat) -> float:
    """Bytes in a process that decodes: a packed matrix. Of a table only the pages of the file that it looks up."""
    return 0.0 if module is model.get_input_embeddings() else _packed(module.weight.shape, to)


def _in_file(shape: Sequence[int], to: BlockFormat) -> float:
    """Bytes of codes, scales and zero points."""
    to = to.of_width(shape[1])
    return _blocks(shape, to) * (to.block * to.bits / 8 + FLOAT + to.bits / 8)


def _packed(shape: Sequence[int], to: BlockFormat) -> float:
    """Bytes of codes, scales and the sums of blocks, in which a product reads them."""
    to = to.of_width(shape[1])
    return _blocks(shape, to) * (to.block * to.bits / 8 + 2 * FLOAT)


def _blocks(shape: Sequence[int], to: BlockFormat) -> float:
    rows, width = shape
    return rows * (width + to.padding(width)) / to.block


def _rounded(matrix: Floats, to: BlockFormat) -> Floats:
    return quantise(matrix, to.of_width(matrix.shape[1]), "k_quant").numbers(matrix.shape[1])


@contextmanager
def _replaced(group: Sequence[Any], numbers: Sequence[Floats], of: MatrixPricing) -> Iterator[None]:
    """Within the block modules compute with other numbers."""
    kept = [module.weight.data for module in group]
    try:
        for module, matrix in zip(group, numbers, strict=True):
            module.weight.data = torch.from_numpy(np.ascontiguousarray(matrix))
        _project(group, of)
        yield
    finally:
        for module, weight in zip(group, kept, strict=True):
            module.weight.data = weight
        _project(group, of)


def _project(group: Sequence[Any], of: MatrixPricing) -> None:
    """Lets attentions compute with the matrices of a group, of which they may have rows as their own."""
    for attention in attention_modules(of.model, of.architecture):
        if any(module in group for module in attention.children()):
            project_directly(attention, of.architecture, of.spec)


def _groups(model: Any, modules: Sequence[nn.Module], tokens: torch.Tensor) -> list[list[nn.Module]]:
    """Modules in the order that they run, those that read one input together."""
    groups: list[list[nn.Module]] = []
    last: list[Any] = [None]

    def note(module: nn.Module, args: tuple[Any, ...], _: dict[str, Any]) -> None:
        if args[0] is not last[0]:
            groups.append([])
        last[0] = args[0]
        groups[-1].append(module)

    with hooked(modules, note), torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    return groups
