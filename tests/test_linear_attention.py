"""`linear_attention`: what a state computes, that the graph computes it too, what it learns, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.models import exported, in_chunks, open_prepared, recipe_of, tokens_of
from support.numbers_of_a_model import SPEC, statistics_of
from support.tiny_artifact import fill

from kvslim.caches import Cache, LinearCache
from kvslim.caches.attention.base import attended
from kvslim.caches.attention.linear import FeatureMaps, StateAttention, attended_blocks
from kvslim.caches.attention.window import Ring
from kvslim.checks import check_methods, check_plan
from kvslim.cli.inputs import read_plan
from kvslim.contract import ModelSpec
from kvslim.errors import UsageError
from kvslim.export.manifest import read_manifest
from kvslim.healing.distil import healed
from kvslim.healing.student import Student
from kvslim.healing.text import Text, Texts
from kvslim.healing.transfer import transferred
from kvslim.methods import KvHdc, KvPca, KvQuant, KvWindow, LinearAttention, Method, PruneLayers, ShareKv
from kvslim.methods.kv_window import kept_attention
from kvslim.methods.linear_attention import clusters_of_keys
from kvslim.planning.decide import decide
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Silent
from kvslim.report.decisions import decisions
from kvslim.report.memory import artifact_caches, cache_memory
from kvslim.report.tables import layers_table, plan_table
from kvslim.runtime.opening import layout_of, open_session
from kvslim.runtime.session import DecodeSession
from kvslim.settings import Heal
from kvslim.transform.attention import Observed
from kvslim.transform.edits import Features
from kvslim.transform.scoring import Scoring
from kvslim.transform.surgery import slim_modules
from kvslim.types import KVLayout, LayerPlan, Plan

CACHE = LinearCache(window=8, sinks=2, features=6)
CHUNKS = ([1], [3], [5, 1, 11], [7, 2], [40])


def plan_of(spec: ModelSpec, cache: Cache = CACHE) -> Plan:
    return Plan(layers=tuple(LayerPlan(layer=layer, cache=cache) for layer in range(spec.layers)))


@pytest.fixture
def session(tiny_llama: Path, tmp_path: Path) -> DecodeSession:
    """A model with a state in every layer."""
    prepared = open_prepared(tiny_llama, recipe_of())
    exported(prepared, plan_of(prepared.spec), tmp_path / "slim")
    return DecodeSession(tmp_path / "slim", capacity=60, all_positions=True, batch=2)


def test_attention_is_that_of_the_formula() -> None:
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 300, 8, generator=random) for heads in (4, 2, 2))
    maps = FeatureMaps(*(torch.randn(2, 5, *dim, generator=random) for dim in ((8,), (), (8,), ())))
    ring, scale = Ring(window=7, sinks=3), 0.4
    scoring = StateAttention(ring).scoring(Scoring(scale))

    found = torch.cat(list(attended_blocks((query, key, value), maps, ring, scoring)), dim=1)

    for token in (0, 6, 9, 10, 11, 255, 256, 299):
        for head in range(4):
            own, q = head // 2, query[0, head, token]
            k, v, places = key[0, own, : token + 1], value[0, own, : token + 1], torch.arange(token + 1)
            f = torch.exp(maps.query_weight[own] @ q * scale + maps.query_bias[own])
            g = (k @ maps.key_weight[own].T + maps.key_bias[own]).softmax(-1)
            weights = torch.where((token - places < 7) | (places < 3), torch.exp(k @ q * scale), g @ f)
            torch.testing.assert_close(found[0, token, head], weights @ v / weights.sum())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", [CACHE, LinearCache(window=1, features=1)])
def test_graph_equals_torch_in_chunks_of_any_size(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, cache: LinearCache
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of())
    expected, tokens = exported(prepared, plan_of(prepared.spec, cache), tmp_path / "slim"), tokens_of(prepared)
    session = DecodeSession(tmp_path / "slim", capacity=40, all_positions=True)
    for chunks in CHUNKS:
        session.reset()
        np.testing.assert_allclose(in_chunks(session, tokens, chunks), expected, atol=1e-4)


def test_pruned_heads_leave_the_features_of_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    layers = (LayerPlan(layer=0, heads=(2, 3), cache=CACHE), LayerPlan(layer=1, cache=CACHE))
    expected, tokens = exported(prepared, Plan(layers=layers), tmp_path / "slim"), tokens_of(prepared)
    session = DecodeSession(tmp_path / "slim", capacity=40, all_positions=True)
    np.testing.assert_allclose(in_chunks(session, tokens, [7, 1]), expected, atol=1e-4)


def test_cache_has_one_size_at_any_context(session: DecodeSession) -> None:
    spec_layers, heads, dim = 2, 2, 16
    size = spec_layers * heads * 4 * (2 * dim * (8 + 2) + 6 * (dim + 1))
    assert [session.layout.bytes_at(context) for context in (10, 60, 100_000)] == [size] * 3
    held = [array for layer in session._layers for array in layer.arrays]
    assert sum(array.nbytes for array in held) == 2 * size  # two sequences
    session.prefill(np.arange(50) % 100)
    assert all(now is before for now, before in zip(_arrays(session), held, strict=True))


def _arrays(session: DecodeSession) -> list[np.ndarray]:
    return [array for layer in session._layers for array in layer.arrays]


def test_state_cannot_be_rewound_but_a_window_that_is_not_full_can(session: DecodeSession) -> None:
    tokens = np.arange(30) % 100
    session.allocate(1)
    session.step(tokens[:9])
    session.rewind(5)
    np.testing.assert_allclose(session.step(tokens[5:9]), _fresh(session, tokens[:9])[5:], atol=1e-4)
    session.step(tokens[9:20])
    with pytest.raises(UsageError, match="a state has taken in tokens that a context of 19 holds apart"):
        session.rewind(19)
    assert not session.takes_back(2)
    session.step(tokens[20:22])
    with pytest.raises(UsageError, match="a state has taken in tokens that a context of 21 holds apart"):
        session.rewind(21)
    assert session.keep_shared(tokens[:20].tolist(), tokens[:15].tolist()) == 0
    np.testing.assert_allclose(session.step(tokens), _fresh(session, tokens), atol=1e-4)


def _fresh(session: DecodeSession, tokens: np.ndarray) -> np.ndarray:
    return session.sibling(60).step(tokens)


def test_sequences_of_different_lengths_decode_side_by_side(session: DecodeSession) -> None:
    prompts, then = [np.arange(31) % 90, 7 + np.arange(12) % 50], [3, 4, 5]
    session.prefill_each(prompts)
    found = [session.step(np.full((2, 1), token))[:, -1] for token in then]
    for row, prompt in enumerate(prompts):
        alone = _fresh(session, np.concatenate([prompt, then]))[-3:]
        np.testing.assert_allclose([logits[row] for logits in found], alone, atol=1e-4)
    session.drop(0)
    np.testing.assert_allclose(
        session.step(np.full((1, 1), 6))[0, -1], _fresh(session, np.array([*prompts[1], *then, 6]))[-1], atol=1e-4
    )


def test_filled_cache_can_be_timed(session: DecodeSession) -> None:
    session.allocate(1)
    session.fill(40)
    assert np.isfinite(session.step([1, 2])).all()
    assert not session.lends_rows


def error_of(prepared: PreparedDecoder, features: Features, tokens: np.ndarray, layer: int = 0) -> float:
    """Squared error of a layer's attention with a state, on a text."""
    errors = []

    def compare(seen: Observed) -> None:
        maps = FeatureMaps(*(torch.from_numpy(getattr(features, each.name)).float() for each in fields(features)))
        ring, states = Ring(CACHE.window, CACHE.sinks), (seen.query, seen.key, seen.value)
        found = torch.cat(list(attended_blocks(states, maps, ring, StateAttention(ring).scoring(seen.scoring))), dim=1)
        errors.append(float((found - attended(*states, seen.scoring)).square().sum()))

    slim = slim_modules(prepared.model, prepared.architecture)[layer]
    slim.observer = compare
    with torch.inference_mode():
        prepared.model(torch.from_numpy(tokens[None]))
    slim.observer = None
    return errors[0]


def test_training_lowers_the_error_on_other_text_and_repeats_itself(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of([LinearAttention(window=8, sinks=2, features=6)]))
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    untrained = prepared.trials().codes_of(plan)
    windows = np.random.default_rng(0).integers(0, 12, (3, 160))  # of few tokens, whose keys form clusters
    of = prepared.model, prepared.architecture, untrained, windows, Silent()
    trained, again = transferred(*of), transferred(*of)
    other = np.random.default_rng(1).integers(0, 12, 160)
    for layer in range(prepared.spec.layers):
        before, after = (error_of(prepared, codes[layer].features, other, layer) for codes in (untrained, trained))
        assert after < 0.85 * before
        for each in fields(Features):
            first, second = (getattr(codes[layer].features, each.name) for codes in (trained, again))
            np.testing.assert_array_equal(first, second)


def test_training_is_done_once_and_told(tiny_llama: Path) -> None:
    labels: list[str] = []

    class Heard(Silent):
        def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
            labels.append(label)
            yield from items

    prepared = open_prepared(tiny_llama, recipe_of([LinearAttention(window=8, sinks=2, features=5)]))
    prepared.progress = Heard()
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    first, second = prepared.codes(plan), prepared.codes(plan)
    assert labels.count("passes that train states") == 1
    untrained = prepared.trials().codes_of(plan)
    for one, two, bare in zip(first, second, untrained, strict=True):
        np.testing.assert_array_equal(one.features.key_weight, two.features.key_weight)
        assert np.abs(one.features.key_weight - bare.features.key_weight).max() > 1e-4


def test_clusters_are_found_and_a_key_belongs_to_its_own() -> None:
    random = np.random.default_rng(0)
    centres = 10 * random.standard_normal((2, 4, 8))
    keys = np.repeat(centres, 25, axis=1) + 0.1 * random.standard_normal((2, 100, 8))
    features = clusters_of_keys(keys, 8)
    scores = keys @ features.key_weight.swapaxes(1, 2) + features.key_bias[:, None]
    nearest = np.square(keys[:, :, None] - features.query_weight[:, None]).sum(-1).argmin(-1)
    np.testing.assert_array_equal(scores.argmax(-1), nearest)
    assert np.isfinite(scores).all()


def test_healing_trains_projections_and_features(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    plan = plan_of(prepared.spec)
    codes = prepared.codes(plan)
    student = Student(prepared.model, prepared.architecture, codes)
    tokens = torch.from_numpy(tokens_of(prepared)[None])
    student.model(tokens).logits.log_softmax(-1)[..., 0].mean().backward()
    names = {name for _, name in student.weights}
    assert {
        f"self_attn.kvslim.{side}_features_{part}" for side in ("key", "query") for part in ("weight", "bias")
    } < names
    assert all(weight.grad.abs().max() > 0 for weight in student.weights.values())

    windows = np.random.default_rng(0).integers(0, prepared.spec.vocab_size, (8, 32))
    texts = Texts(*(Text(windows, None) for _ in range(3)))
    settings = Heal.model_validate({"steps": 12, "rate": 2e-2})
    healed_codes, found = healed(
        prepared.model, prepared.architecture, codes, texts, settings, 0, tmp_path / "state", Silent()
    )
    assert found.kept
    assert found.kl_after < found.kl_before
    prepared.install(healed_codes)
    (tmp_path / "graph").mkdir()
    prepared.export(plan, tmp_path / "graph")
    with torch.inference_mode():
        expected = prepared.model(tokens).logits[0].numpy()
    session = DecodeSession(tmp_path / "graph", capacity=40, all_positions=True)
    np.testing.assert_allclose(in_chunks(session, tokens[0].numpy(), [9, 1]), expected, atol=1e-4)


def test_state_goes_to_the_layers_named_or_counted_or_to_all() -> None:
    spec = SPEC.model_copy(update={"layers": 4, "windows": (None, 64, None, None)})
    statistics, plan = statistics_of(spec), Plan.identity(spec)

    def taken(method: LinearAttention) -> list[int]:
        return [layer.layer for layer in method.decide(spec, statistics, plan).layers if layer.cache.kind == "linear"]

    assert taken(LinearAttention()) == [0, 2, 3]  # layer 1 has a window of its own
    assert taken(LinearAttention(layers=(3,))) == [3]
    kept = kept_attention(statistics, 64).min(axis=1)
    assert taken(LinearAttention(count=1)) == [min((0, 2, 3), key=kept.__getitem__)]


@pytest.mark.parametrize(
    ("options", "windows", "fault"),
    [
        ({"layers": (2, SPEC.layers)}, None, f"the model has {SPEC.layers} layers, not a layer {SPEC.layers}"),
        ({"layers": (0,)}, 8, "layer 0 has a sliding window of its own"),
        ({"count": SPEC.layers + 1}, None, f"the model has {SPEC.layers} layers without a sliding window"),
        ({}, 8, "the model has 0 layers without a sliding window, the recipe asks for all"),
    ],
)
def test_layers_that_cannot_have_a_state_are_refused(
    options: dict[str, object], windows: int | None, fault: str
) -> None:
    spec = SPEC.model_copy(update={"windows": (windows,) * SPEC.layers})
    with pytest.raises(UsageError, match=fault):
        LinearAttention.model_validate(options).check(spec)


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"sinks": -1}, {"features": 0}, {"count": 1, "layers": (0,)}, {"bits": 4}]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LinearAttention.model_validate(options)


STATE = LinearAttention(window=8, sinks=2, features=6)


@pytest.mark.parametrize(
    ("methods", "changes", "fault"),
    [
        ((STATE,), {"layout": "attention24"}, "attention24 has no state"),
        ((STATE, KvWindow(window=8)), {}, "may both take tokens out of one layer"),
        ((STATE, KvWindow(window=8, layers=(1,))), {}, "may both take tokens out of one layer"),
        ((STATE, ShareKv(sources={1: 0})), {}, "share_kv and linear_attention may choose the same layers"),
        ((STATE.model_copy(update={"layers": (0,)}), ShareKv(sources={1: 0})), {}, "layer 0 cannot have a window"),
        ((STATE, KvHdc(bits=2)), {}, "packed codes keep what leaves their window"),
        ((LinearAttention(window=180),), {}, "hardly leave a window of 184"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    methods: Sequence[Method], changes: dict[str, object], fault: str
) -> None:
    with pytest.raises(UsageError, match=fault):
        check_methods(recipe_of(methods).model_copy(update=changes))


def test_windows_and_states_stand_in_different_layers() -> None:
    methods = KvWindow(window=8, layers=(0,)), LinearAttention(window=8, layers=(1,))
    check_methods(recipe_of(methods))
    plan = decide(recipe_of(methods), SPEC, statistics_of(SPEC))
    assert [layer.cache.kind for layer in plan.layers[:2]] == ["window", "linear"]


def test_named_layer_that_another_method_has_taken_is_refused() -> None:
    statistics = statistics_of(SPEC)
    plan = PruneLayers(layers={1: "attention"}).decide(SPEC, statistics, Plan.identity(SPEC))
    with pytest.raises(UsageError, match="another method has taken the cache of layer 1"):
        LinearAttention(layers=(1,)).decide(SPEC, statistics, plan)
    assert [each.cache.kind for each in LinearAttention().decide(SPEC, statistics, plan).layers][:2] == [
        "linear",
        "full",
    ]


@pytest.mark.parametrize("other", [KvPca(rank_ratio=0.5), KvQuant(), KvHdc()])
def test_ranks_and_bits_are_those_of_the_other_layers(tiny_llama: Path, tmp_path: Path, other: Method) -> None:
    state = LinearAttention(window=8, sinks=2, features=6, layers=(0,))
    prepared = open_prepared(tiny_llama, recipe_of([other, state]))
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    assert [layer.cache.kind for layer in plan.layers] == ["linear", "full"]
    expected, tokens = exported(prepared, plan, tmp_path / "slim"), tokens_of(prepared)
    session = DecodeSession(tmp_path / "slim", capacity=40, all_positions=True)
    np.testing.assert_allclose(in_chunks(session, tokens, [16]), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("cache", "windows", "fault"),
    [
        (LinearCache(window=0, features=4), None, "a window of 0"),
        (LinearCache(window=8, sinks=-1, features=4), None, "-1 sinks"),
        (LinearCache(window=8, features=0), None, "a state of 0 features"),
        (LinearCache(window=8, features=4), 32, "layer 0 forgets what leaves its own window"),
    ],
)
def test_plan_is_refused_when_a_state_cannot_be(cache: Cache, windows: int | None, fault: str) -> None:
    spec = SPEC.model_copy(update={"windows": (windows,) * SPEC.layers})
    layers = (LayerPlan(layer=0, cache=cache), *(LayerPlan(layer=i) for i in range(1, SPEC.layers)))
    with pytest.raises(UsageError, match=fault):
        check_plan(Plan(layers=layers), spec)


def test_plan_that_reads_a_state_as_a_source_is_refused() -> None:
    plan = Plan.model_validate(
        {
            "layers": [
                {"layer": 0, "cache": {"kind": "linear", "window": 8, "features": 4}},
                {"layer": 1, "cache": {"kind": "shared", "source": 0}},
                *({"layer": layer} for layer in range(2, SPEC.layers)),
            ]
        }
    )
    with pytest.raises(UsageError, match="it keeps a window of tokens alone"):
        check_plan(plan, SPEC)


def test_plan_without_features_is_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": [{"layer": 0, "cache": {"kind": "linear", "window": 8}}]}))
    with pytest.raises(UsageError, match="features: must be given"):
        read_plan(plan)


def test_plan_manifest_and_inspect_show_window_and_state(tmp_path: Path) -> None:
    plan = LinearAttention(window=16, features=24).decide(SPEC, statistics_of(SPEC), Plan.identity(SPEC))
    table = plan_table(plan)
    assert table.header[3] == "sinks + window"
    assert table.rows[0][3] == "4 + 16"
    assert "24 features" in table.rows[0][-1]
    assert "a state of 24 features" in decisions(SPEC, plan).shared

    fill(tmp_path)
    layout = KVLayout.of(SPEC, plan)
    assert KVLayout.model_validate_json(layout.model_dump_json()) == layout
    manifest = read_manifest(tmp_path).model_copy(update={"kv_layout": layout, "plan": plan})
    memory = cache_memory(manifest.spec, artifact_caches(manifest), "fp32", 0, [10, 1000])
    dim = SPEC.head_dim
    size = SPEC.layers * SPEC.kv_heads * 4 * (2 * dim * 20 + 24 * (dim + 1))
    assert {memory.mib[tokens]["as it is"] * 2**20 for tokens in ("10", "1000")} == {size}
    first = memory.layers[0]
    assert (first.key_dim, first.window, first.sinks, first.features) == (dim, 16, 4, 24)
    assert "4 + 16, state 24" in layers_table(memory).rows[0]


def test_graph_tells_what_its_cache_is(session: DecodeSession, tmp_path: Path) -> None:
    layout = layout_of(open_session(tmp_path / "slim"))
    assert layout == session.layout
    assert {tensor.cache for tensor in layout.tensors} == {"linear"}
    assert layout.needs_own_runtime
