"""Every method on every family: the graph computes what torch computes, in prefill and in cached decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.models import (
    cached_logits,
    export_slim,
    exported,
    open_prepared,
    original_logits,
    recipe_of,
    tokens_of,
    torch_logits,
)
from support.tiny_decoders import CONFIGS, FAMILIES

from kvslim.caches import FullCache
from kvslim.methods import (
    METHODS,
    ClusterHeads,
    KvHdc,
    KvPca,
    KvQuant,
    KvWindow,
    LinearAttention,
    Method,
    PruneHeads,
    PruneLayers,
    PruneMlp,
    ShareKv,
)
from kvslim.runtime.opening import layout_of, open_session
from kvslim.types import KVLayout, LayerPlan, Plan

PLANS: dict[str, Sequence[Method]] = {
    "plain": (),
    "pca": (KvPca(rank_ratio=0.5),),
    "key_pca": (KvPca(rank_ratio=0.5, objective="key"),),
    "int8": (KvQuant(),),
    "window": (KvWindow(window=12, sinks=3),),
    "linear": (LinearAttention(window=12, sinks=3, features=8),),
    "pca_window_int8": (KvPca(rank_ratio=0.5), KvWindow(window=12, sinks=3), KvQuant()),
    "pca_int8": (KvQuant(granularity="per_tensor"), KvPca(rank_ratio=0.5)),
    "int4": (KvQuant(bits=4),),
    "hdc_int8": (KvHdc(),),
    "pca_hdc_int4": (KvHdc(bits=4, granularity="per_channel"), KvPca(rank_ratio=0.5)),
    "heads": (PruneHeads(heads={0: (0, 2)}, score="fluctuation"),),
    "clusters": (ClusterHeads(clusters={0: 2}), KvQuant()),
    "shared": (ShareKv(sources={1: 0}), KvQuant()),
    "layers": (PruneLayers(layers={1: "attention"}), KvQuant()),
    "mlp": (PruneMlp(widths={1: 64}), KvQuant()),
}
CORE = ("llama", "gpt2")  # with RoPE, and with learned positions


def plans_of(family: str) -> tuple[str, ...]:
    """Every family is tried plain and slim; a variant of one, which differs in its RoPE alone, plain."""
    if "-" in family:
        return ("plain",)
    # In a window the kernel takes int4 in heads of 32 and more: too large for half the head_dim of these.
    return ("plain", "mlp", "pca_int8" if CONFIGS[family].get("sliding_window") else "pca_hdc_int4")


ModelOf = Callable[[str], Path]


def test_matrix_covers_every_method() -> None:
    assert {method.name for plan in PLANS.values() for method in plan} == set(METHODS)


@pytest.mark.parametrize(
    ("family", "plan"),
    [(family, plan) for family in FAMILIES for plan in PLANS if family in CORE or plan in plans_of(family)],
)
def test_graph_equals_torch_in_prefill_and_cached_decode(
    tiny_model: ModelOf, tmp_path: Path, family: str, plan: str
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of(PLANS[plan]))
    tokens = tokens_of(prepared)
    original = original_logits(tiny_model(family), tokens)
    made = export_slim(prepared, tmp_path / "slim")
    layout = layout_of(open_session(tmp_path / "slim"))
    assert layout == KVLayout.of(prepared.spec, made)
    slim = torch_logits(prepared, tokens)
    effect = np.abs(slim - original).max()
    assert effect > 1e-4 if PLANS[plan] else effect < 2e-5
    # A number on the edge between two integers may round to either side, which moves all later logits a little.
    rounds = any(method.stores_cache for method in PLANS[plan])
    tolerance = max(1e-4, 0.1 * effect) if rounds else 1e-4
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < tolerance


@pytest.mark.parametrize("family", CORE)
def test_graph_equals_torch_when_keys_and_values_have_residuals_of_different_ranks(
    tiny_model: ModelOf, tmp_path: Path, family: str
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of())
    halves = FullCache(rank=8, residual=8, value_rank=16, value_residual=0, rotation=0, stored="int4", centred=True)
    layers = tuple(LayerPlan(layer=layer, cache=halves) for layer in range(prepared.spec.layers))
    plan = Plan(layers=layers)
    tokens, slim = tokens_of(prepared), exported(prepared, plan, tmp_path / "slim")
    effect = np.abs(slim - original_logits(tiny_model(family), tokens)).max()
    assert effect > 1e-4
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < 0.1 * effect


@pytest.mark.parametrize("family", [*CORE, "gemma3_text", "opt"])
def test_full_rank_reproduces_the_plain_export_when_not_quantised(
    tiny_model: ModelOf, tmp_path: Path, family: str
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of([KvPca(rank_ratio=1.0)]))
    (tmp_path / "plain").mkdir()
    prepared.export(Plan.identity(prepared.spec), tmp_path / "plain")
    export_slim(prepared, tmp_path / "slim")
    tokens = tokens_of(prepared)
    plain, slim = (cached_logits(tmp_path / name, tokens) for name in ("plain", "slim"))
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(slim, plain, atol=1e-4)
