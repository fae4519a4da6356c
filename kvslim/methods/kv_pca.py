"""`kv_pca`: the KV cache in fewer dimensions per head.

Keys: of all rank-r codes of the product q . k, the one with the least mean squared score error comes from balancing the
key covariance M against the query moment H (balanced truncation; Moore, "Principal component analysis in linear
systems", IEEE TAC 26(1), 1981, section IV). A constant error in all keys moves no softmax, hence covariance. Values:
dropping part of every value drops the same part of each attention output, so M is the covariance of the outputs and H
the output projection's Gram matrix; the mean of the outputs goes into the projection's bias. `objective: key` is plain
PCA (H = I), kept for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from kvslim.caches import CodedCache
from kvslim.caches.coded import STEP, check_rank, rank_step
from kvslim.contract import ModelSpec, Objective
from kvslim.methods.base import Conflict, Method
from kvslim.transform.edits import Array, Codes, LayerEdit
from kvslim.types import Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.recipe import Recipe

SILENT = 1e-24  # is added to moments: a head that is always zero, or that nothing reads, has none


class Basis(NamedTuple):
    """A pair of codes, best coordinate first; d = head_dim.

    Attributes:
        encoder: [heads, d, d]; a cached vector x is stored as `x @ encoder`.
        decoder: [heads, d, d]; a vector y that x meets in a product is read as `y @ decoder`.
        values: [heads, d]; what each coordinate adds to E[(x . y)^2].
    """

    encoder: Array
    decoder: Array
    values: Array

    @property
    def energy(self) -> Array:
        """[heads, d]; the share of E[(x . y)^2] that the first r of all d coordinates keep is `energy[:, r - 1]`."""
        return np.asarray(np.cumsum(self.values, axis=-1) / self.values.sum(-1, keepdims=True))


def balanced_basis(moment: Array, metric: Array, damping: float) -> Basis:
    """Balanced truncation of x . y with x ~ `moment` and y ~ `metric`.

    Args:
        moment: [heads, d, d] second moment of the cached side.
        metric: [heads, d, d] second moment of the side that reads it.
        damping: Share of the mean eigenvalue added to each diagonal.

    Returns:
        All d coordinates; any number of leading ones is the best code of that rank.
    """
    moment, metric = _damped(moment, damping), _damped(metric, damping)
    root = np.linalg.cholesky(metric)
    values, vectors = np.linalg.eigh(root.swapaxes(-1, -2) @ moment @ root)
    values, vectors = values[:, ::-1], vectors[:, :, ::-1]
    quarter = values[:, None, :] ** 0.25
    encoder = root @ vectors / quarter
    decoder = np.linalg.solve(root.swapaxes(-1, -2), vectors) * quarter
    return Basis(encoder, decoder, values)


def _damped(matrix: Array, damping: float) -> Array:
    dim = matrix.shape[-1]
    level = np.trace(matrix, axis1=-2, axis2=-1)[:, None, None] / dim
    return matrix + (damping * level + SILENT) * np.eye(dim)


class KvPca(Method):
    """PCA of keys and values; equal rank for both in a layer, given directly, as a share of head_dim, or by energy.

    Without a size all coordinates stay, in the order of their energy.
    """

    name: ClassVar[str] = "kv_pca"
    order: ClassVar[int] = 10
    summary: ClassVar[str] = "fewer dimensions per cached head: balanced truncation of keys and values"
    either: ClassVar[tuple[str, ...]] = ("rank", "rank_ratio", "energy")

    rank: int | None = Field(None, ge=STEP, description="cached dimensions per head, a multiple of 8")
    rank_ratio: float | None = Field(None, gt=0, le=1, description="rank as a share of head_dim, rounded down")
    value_rank: int | None = Field(None, ge=STEP, description="another rank for values, beside rank (attention24)")
    energy: float | None = Field(None, gt=0, le=1, description="least share of energy that every head keeps")
    objective: Objective = Field("balanced", description="balanced weighs keys by queries; key is plain PCA")
    damping: float = Field(1e-2, gt=0, le=1, description="share of the mean eigenvalue added to each diagonal")

    @model_validator(mode="after")
    def _has_both_ranks(self) -> KvPca:
        if self.value_rank is not None and self.rank is None:
            raise ValueError("value_rank needs rank")
        return self

    def check(self, spec: ModelSpec) -> None:
        """Refuses a rank that the kernel cannot take in every layer."""
        for name in ("rank", "value_rank"):
            rank = getattr(self, name)
            for window in set(spec.windows) if rank is not None else ():
                check_rank(rank, spec, window, f"recipe: methods.kv_pca.{name}")

    def conflicts(self, others: Sequence[Method], recipe: Recipe) -> Iterator[Conflict]:
        """Two ranks in a layout that has one."""
        if self.value_rank is not None and recipe.layout == "gqa":
            yield Conflict(
                "layout gqa gives keys and values one rank",
                "recipe: methods.kv_pca.value_rank",
                "use layout attention24, or rank alone",
            )

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Sets each layer's ranks and objective, with the least energy kept by any of its heads as score."""
        layers = []
        for layer in plan.layers:
            if not isinstance(layer.cache, CodedCache):
                layers.append(layer)
                continue
            bases = self.bases(statistics, layer.layer, self.objective)
            key, value = (basis.energy.min(0) for basis in bases)
            step = rank_step(spec.windows[layer.layer])
            if plan.layout == "gqa":
                rank = value_rank = self._rank(spec, step, np.minimum(key, value))
            else:
                rank, value_rank = self._rank(spec, step, key), self.value_rank or self._rank(spec, step, value)
            score = float(min(key[rank - 1], value[value_rank - 1]))
            ranks = f"rank {rank}" if rank == value_rank else f"ranks {rank} and {value_rank}"
            reason = f"{ranks} of {spec.head_dim} keep{'s' * (rank == value_rank)} {score:.2%} of the energy"
            reason = reason if layer.reason == "kept" else f"{layer.reason}; {reason}"
            coded = layer.with_cache(
                rank=rank, value_rank=None if rank == value_rank else value_rank, objective=self.objective
            )
            layers.append(coded.model_copy(update={"score": score, "reason": reason}))
        return plan.model_copy(update={"layers": tuple(layers)})

    def apply(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: Codes) -> Codes:
        """Adds each layer's encoders and decoders."""
        return tuple(
            edit
            if not isinstance(layer.cache, CodedCache) or layer.cache.rank is None
            else self._coded(spec, statistics, layer.layer, layer.cache, edit)
            for layer, edit in zip(plan.layers, edits, strict=True)
        )

    def _rank(self, spec: ModelSpec, step: int, energy: Array) -> int:
        if self.rank is not None:
            return self.rank
        if self.rank_ratio is not None:
            return max(step, int(spec.head_dim * self.rank_ratio) // step * step)
        if self.energy is None:
            return spec.head_dim
        enough = int((energy < self.energy).sum()) + 1
        return min(spec.head_dim, -(-enough // step) * step)

    def bases(self, statistics: CalibrationStatistics, layer: int, objective: Objective) -> tuple[Basis, Basis]:
        """Bases of keys and of values of one layer."""
        balanced = objective == "balanced"
        key, value = statistics.key_moment[layer], statistics.output_moment[layer]
        identity = np.broadcast_to(np.eye(key.shape[-1]), key.shape)
        return (
            balanced_basis(key, statistics.query_moment[layer] if balanced else identity, self.damping),
            balanced_basis(value, statistics.output_gram[layer] if balanced else identity, self.damping),
        )

    def _coded(
        self, spec: ModelSpec, statistics: CalibrationStatistics, layer: int, cache: CodedCache, edit: LayerEdit
    ) -> LayerEdit:
        key, value = self.bases(statistics, layer, cache.objective)
        key_rank, value_rank = cache.ranks(spec.head_dim)
        by_query = lambda array: np.repeat(array, spec.group_size, axis=0)  # noqa: E731
        encoder, decoder = by_query(value.encoder[..., :value_rank]), by_query(value.decoder[..., :value_rank])
        mean = statistics.output_mean[layer]
        return edit.coded(
            key_encoder=key.encoder[..., :key_rank],
            query_encoder=by_query(key.decoder[..., :key_rank]),
            value_encoder=value.encoder[..., :value_rank],
            value_decoder=decoder.swapaxes(-1, -2),
            value_offset=mean - np.einsum("hd,hdr,her->he", mean, encoder, decoder),
        )
