"""Heads that share attention: chosen, refused, and in the graph what they are in torch, fixed and by prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from pydantic import ValidationError
from support.batches import check_batch
from support.models import (
    cached_logits,
    export_slim,
    in_chunks,
    open_prepared,
    original_logits,
    recipe_of,
    tokens_of,
    torch_logits,
)
from support.numbers_of_a_model import SPEC, statistics_of
from support.trials import MadeUpTrials

from kvslim.caches import Cache, ClusteredCache, FullCache, SharedCache
from kvslim.caches.clustered import ATTENTIONS, CLUSTER_INPUTS, CLUSTERS
from kvslim.caches.clustering import FIRST_TOKENS, Formed
from kvslim.caches.prompt_clusters import ClusteredBuffers
from kvslim.checks import check_methods, check_plan
from kvslim.cli.inputs import read_plan
from kvslim.errors import ArtifactError, UsageError
from kvslim.methods import ClusterHeads, KvQuant, Method, PruneHeads
from kvslim.methods.share_kv import distances
from kvslim.planning.decide import decide, resolved
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.runtime.opening import layout_of, open_session
from kvslim.runtime.session import DecodeSession
from kvslim.types import KVLayout, LayerPlan, Plan

ModelOf = Callable[[str], Path]
Made = Callable[[str], tuple[PreparedDecoder, Path, Plan]]
MHA = SPEC.model_copy(update={"kv_heads": 4})
LENGTH = 48
KINDS: dict[str, tuple[str, ClusterHeads]] = {
    "mha": ("gpt2", ClusterHeads(clusters={0: 2, 1: 1})),
    "mha, dynamic": ("gpt2", ClusterHeads(clusters={0: 1, 1: 2}, mode="dynamic")),
    "mha, RoPE, dynamic": ("gpt_neox", ClusterHeads(clusters={1: 3}, mode="dynamic")),
    "gqa, window and softcap": ("gemma2", ClusterHeads(clusters={0: 2, 1: 2})),
}


@pytest.fixture(scope="module")
def made(tiny_model: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """PreparedDecoder, graph and plan of each kind, made once."""
    found: dict[str, tuple[PreparedDecoder, Path, Plan]] = {}

    def of(kind: str) -> tuple[PreparedDecoder, Path, Plan]:
        if kind not in found:
            family, method = KINDS[kind]
            folder = tmp_path_factory.mktemp("clusters") / "graph"
            prepared = open_prepared(tiny_model(family), recipe_of([method]))
            found[kind] = prepared, folder, export_slim(prepared, folder)
        return found[kind]

    return of


# -- the choice


def decided(method: Method, spec: Any = MHA) -> Plan:
    return method.decide(spec, statistics_of(spec), Plan.identity(spec))


def attending(plan: Plan) -> list[int | None]:
    """Heads that attend in each layer; None where all do without clusters."""
    caches = (layer.cache for layer in plan.layers)
    return [cache.attending if isinstance(cache, ClusteredCache) else None for cache in caches]


def test_fraction_gives_every_named_layer_so_many_clusters() -> None:
    plan = decided(ClusterHeads(fraction=0.5, layers=(1,)))
    assert attending(plan) == [None, 2]
    assert attending(decided(ClusterHeads(fraction=0.1)))[0] == 1
    assert attending(decided(ClusterHeads(fraction=0.1), SPEC))[0] == 2  # one for each kv head
    check_plan(plan, MHA)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_layer_stays_whole_when_its_elbow_is_at_every_head() -> None:
    statistics = statistics_of(MHA)
    pairs = np.kron(np.eye(2), np.ones((2, 2)))
    statistics.sharing_loss[0], statistics.sharing_loss[1] = 1 - np.eye(4), 1 - pairs
    plan = ClusterHeads().decide(MHA, statistics, Plan.identity(MHA))
    assert [layer.cache for layer in plan.layers] == [FullCache(), ClusteredCache(clusters=(0, 0, 2, 2))]


def test_dynamic_plan_names_a_number_alone() -> None:
    plan = decided(ClusterHeads(clusters={0: 3}, mode="dynamic"))
    assert plan.layers[0].cache == ClusteredCache(count=3)
    assert plan.layers[1] == LayerPlan(layer=1)
    check_plan(plan, MHA)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_layers_are_those_that_lose_least_by_measured_kl() -> None:
    asked: list[dict[int, int] | None] = []

    def divergence(method: ClusterHeads) -> float:
        asked.append(method.clusters)
        return {0: 0.5, 1: 0.1}[next(iter(method.clusters or {}))]

    method = ClusterHeads(count=1, fraction=0.5).resolve(MadeUpTrials(MHA, divergence, statistics_of(MHA)))
    assert asked == [{0: 2}, {1: 2}]
    assert method == ClusterHeads(clusters={1: 2})


def test_measured_layers_come_out_of_the_trials(tiny_model: ModelOf) -> None:
    recipe = recipe_of([ClusterHeads(count=1, fraction=0.5)])
    prepared = open_prepared(tiny_model("gpt2"), recipe)
    trials = prepared.trials()
    (method,) = resolved(recipe, trials).methods
    assert isinstance(method, ClusterHeads)
    losses = [trials.divergence(ClusterHeads(clusters={layer: 2})) for layer in (0, 1)]
    assert min(losses) > 0
    assert method.clusters == {int(np.argmin(losses)): 2}


def test_other_methods_leave_clustered_layers_alone() -> None:
    recipe = recipe_of([KvQuant(), ClusterHeads(clusters={1: 2})])
    plan = decide(recipe, MHA, statistics_of(MHA))
    assert [layer.cache.dtype for layer in plan.layers] == ["int8", "float32"]
    assert attending(plan) == [None, 2]
    check_plan(plan, MHA)
    pruned = decide(recipe_of([PruneHeads(heads={1: (0,)}), ClusterHeads(clusters={1: 2})]), MHA, statistics_of(MHA))
    assert pruned.layers[1].cache == FullCache()


@pytest.mark.parametrize(("spec", "keys"), [(MHA, 1), (SPEC, 2)], ids=["mha", "gqa"])
def test_keys_of_representatives_alone_are_cached(spec: Any, keys: int) -> None:
    plan = Plan(layers=(LayerPlan(layer=0, cache=ClusteredCache(clusters=(1, 1, 2, 2))), LayerPlan(layer=1)))
    key, value, *_ = KVLayout.of(spec, plan).tensors
    assert (key.heads, value.heads) == (2, spec.kv_heads)
    alone = Plan(layers=(LayerPlan(layer=0, cache=ClusteredCache(count=1)), LayerPlan(layer=1)))
    saved = KVLayout.of(spec, Plan.identity(spec)).bytes_at(100) - KVLayout.of(spec, alone).bytes_at(100)
    assert saved == (3 * 16 * 4 * 100 if keys == 1 else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": {2: 1}}, "2 layers, not a layer 2"),
        ({"layers": (-1,)}, "not a layer -1"),
        ({"count": 3}, "2 layers, the recipe asks for 3"),
        ({"clusters": {0: 5}}, "5 clusters do not fit"),
        ({"clusters": {0: 0}}, "0 clusters do not fit"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ClusterHeads(**options).check(MHA)


def test_heads_that_share_keys_are_refused_odd_and_dynamic_clusters() -> None:
    with pytest.raises(UsageError, match="3 clusters do not fit"):
        ClusterHeads(clusters={0: 3}).check(SPEC)
    with pytest.raises(UsageError, match="save no cache"):
        ClusterHeads(mode="dynamic").check(SPEC)
    with pytest.raises(UsageError, match="one head"):
        ClusterHeads().check(SPEC.model_copy(update={"q_heads": 1, "kv_heads": 1}))
    with pytest.raises(UsageError, match="attention24 has no clusters"):
        check_methods(recipe_of([ClusterHeads()]).model_copy(update={"layout": "attention24"}))


@pytest.mark.parametrize("options", [{"clusters": {0: 1}, "count": 1}, {"clusters": {0: 1}, "fraction": 0.5}])
def test_two_choices_at_once_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="clusters"):
        ClusterHeads(**options)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"cache": ClusteredCache(clusters=(0, 0, 2))}, "do not name for each of 4"),
        ({"cache": ClusteredCache(clusters=(1, 0, 2, 3))}, "do not name"),
        ({"cache": ClusteredCache(clusters=(0, 0, 0, 9))}, "do not name"),
        ({"cache": ClusteredCache(clusters=(0, 0, 2, 2)), "heads": (0, 1)}, "without heads"),
        ({"cache": ClusteredCache(count=5)}, "5 clusters do not fit"),
    ],
)
def test_impossible_plans_are_refused(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_plan(Plan(layers=(LayerPlan(layer=0, **layer), LayerPlan(layer=1))), MHA)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"count": 2}, "give clusters, or the count of them"),
        ({"rank": 8}, "rank: no such key"),
        ({"stored": "int8"}, "stored: no such key"),
        ({"window": 8}, "window: no such key"),
    ],
)
def test_plans_with_clusters_and_what_goes_without_them_are_refused(
    tmp_path: Path, field: dict[str, Any], message: str
) -> None:
    plan = tmp_path / "plan.json"
    cache = {"kind": "clustered", "clusters": [0, 0, 2, 2]}
    plan.write_text(json.dumps({"layers": [{"layer": 0, "cache": cache}, {"layer": 1}]}))
    check_plan(read_plan(plan), MHA)
    plan.write_text(json.dumps({"layers": [{"layer": 0, "cache": cache | field}, {"layer": 1}]}))
    with pytest.raises(UsageError, match=message):
        read_plan(plan)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (ClusteredCache(clusters=(0, 2, 2, 3)), "do not name"),
        (ClusteredCache(clusters=(0, 0, 2, 3)), "1 to 2 clusters"),
        (ClusteredCache(count=2), "a kv head for every query head"),
    ],
)
def test_plans_that_mix_kv_heads_are_refused(cache: Cache, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_plan(Plan(layers=(LayerPlan(layer=0, cache=cache), LayerPlan(layer=1))), SPEC)


# -- the graph


def clustered(session: DecodeSession) -> list[ClusteredBuffers]:
    """Buffers of the layers whose heads share attention."""
    return [buffers for buffers in session._layers if isinstance(buffers, ClusteredBuffers)]


def arrays(session: DecodeSession) -> list[np.ndarray]:
    """Memory of every tensor of the cache, in the graph's order."""
    return [array for buffers in session._layers for array in buffers.arrays]


@pytest.mark.parametrize("kind", KINDS)
def test_graph_equals_torch_however_the_text_is_cut(made: Made, kind: str) -> None:
    prepared, folder, plan = made(kind)
    tokens = tokens_of(prepared, LENGTH)
    expected = torch_logits(prepared, tokens)
    assert np.abs(expected - original_logits(prepared.snapshot.path, tokens)).max() > 1e-3
    session = DecodeSession(folder, capacity=LENGTH, all_positions=True)
    assert session.layout == KVLayout.of(prepared.spec, plan)
    for chunks in ([LENGTH], [16], [1], [3, 1, 9]):
        session.reset()
        np.testing.assert_allclose(in_chunks(session, tokens, chunks), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["mha", "mha, dynamic"])
def test_cache_grows_with_the_text(made: Made, kind: str) -> None:
    prepared, folder, _ = made(kind)
    tokens = tokens_of(prepared, 270)
    session = DecodeSession(folder, capacity=300, all_positions=True)
    in_chunks(session, tokens[:20], [20])
    assert {array.shape[2] for buffers in clustered(session) for array in buffers.arrays} == {256}
    session.reset()
    found = in_chunks(session, tokens, [130, 10])
    assert {array.shape[2] for buffers in clustered(session) for array in buffers.arrays} == {300}
    np.testing.assert_allclose(found, torch_logits(prepared, tokens), atol=1e-4)


@pytest.mark.parametrize(("family", "clusters"), [("gpt2", (0, 1, 2, 3)), ("llama", (0, 1, 2, 3))])
def test_plain_logits_come_out_when_every_head_is_its_own_cluster(
    tiny_model: ModelOf, tmp_path: Path, family: str, clusters: tuple[int, ...]
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of())
    plan = Plan(layers=tuple(LayerPlan(layer=layer, cache=ClusteredCache(clusters=clusters)) for layer in range(2)))
    prepared.install(prepared.codes(plan))
    prepared.export(plan, tmp_path)
    tokens = tokens_of(prepared)
    np.testing.assert_allclose(cached_logits(tmp_path, tokens), original_logits(tiny_model(family), tokens), atol=1e-4)


def test_batch_of_unequal_lengths_equals_each_text_alone(made: Made) -> None:
    prepared, folder, _ = made("mha")
    lengths, steps = (11, 6), 4
    texts = [tokens_of(prepared, length + steps)[::-1] for length in lengths]
    alone = [in_chunks(DecodeSession(folder, capacity=20, all_positions=True), text, [len(text)]) for text in texts]
    session = open_session(folder, all_positions=True)
    caches = {t.past: np.zeros((2, t.heads, 20, t.columns), np.float32) for t in layout_of(session).tensors}
    ids, mask = np.zeros((2, max(lengths)), np.int64), np.zeros((2, max(lengths)), np.int64)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        ids[row, :length], mask[row, :length] = text[:length], 1
    positions, found = np.tile(np.arange(max(lengths)), (2, 1)), []
    for step in range(steps + 1):
        found.append(run(session, caches, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}))
        positions = np.array([[length + step] for length in lengths])
        ids = np.array([[text[at[0]]] for text, at in zip(texts, np.minimum(positions, [[14], [9]]), strict=True)])
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
    for row, length in enumerate(lengths):
        logits = np.concatenate([found[0]["logits"][row, :length], *(step["logits"][row] for step in found[1:])])
        np.testing.assert_allclose(logits, alone[row], atol=1e-4)


def run(
    session: onnxruntime.InferenceSession, caches: dict[str, np.ndarray], feed: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """One step whose past and present lie in memories of their own; all outputs but the present, by name."""
    names = [node.name for node in session.get_outputs()]
    inputs = {node.name for node in session.get_inputs()}
    given = {name: value for name, value in {**feed, **caches}.items() if name in inputs}
    found = dict(zip(names, session.run(names, given), strict=True))
    for past in caches:
        caches[past] = found.pop(past.replace("past_key_values", "present"))
    return found


def test_dynamic_graph_equals_the_static_one_when_the_membership_is_the_same(
    made: Made, tiny_model: ModelOf, tmp_path: Path
) -> None:
    prepared, folder, _ = made("mha, dynamic")
    clusters = {0: (2, 2, 2, 2), 1: (0, 3, 0, 3)}
    fixed = open_prepared(tiny_model("gpt2"), recipe_of())
    caches = {layer: ClusteredCache(clusters=own) for layer, own in clusters.items()}
    plan = Plan(layers=tuple(LayerPlan(layer=layer, cache=cache) for layer, cache in caches.items()))
    fixed.install(fixed.codes(plan))
    fixed.export(plan, tmp_path)
    tokens = tokens_of(prepared, 20)
    expected = in_chunks(DecodeSession(tmp_path, capacity=20, all_positions=True), tokens, [20])
    session = open_session(folder, all_positions=True)
    caches = {t.past: np.zeros((1, t.heads, 20, t.columns), np.float32) for t in layout_of(session).tensors}
    feed = {"input_ids": tokens[None], "attention_mask": np.ones((1, 20), np.int64)}
    feed["position_ids"] = np.arange(20)[None]
    for layer, own in clusters.items():
        parts = np.unique(np.array(own), return_inverse=True)
        feed |= {name.format(layer): part.astype(np.int64) for name, part in zip(CLUSTER_INPUTS, parts, strict=True)}
    found = run(session, caches, feed)
    np.testing.assert_allclose(found["logits"][0], expected, atol=1e-4)
    weights = found[ATTENTIONS.format(1)]
    assert weights.shape == (1, 2, 20, 20)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


# -- the runtime


def test_prompts_form_clusters_of_their_own(made: Made) -> None:
    """Each from its first tokens, whatever prompt came before, and the same again for the same prompt."""
    prepared, folder, _ = made("mha, dynamic")
    session = DecodeSession(folder, capacity=LENGTH, all_positions=True)
    formed, logits = [], []
    for seed in (0, 1, 2, 3, 0):
        session.reset()
        tokens = np.random.default_rng(seed).integers(0, prepared.spec.vocab_size, LENGTH)
        logits.append(in_chunks(session, tokens, [9]))
        formed.append([buffers.heads for buffers in clustered(session)])
    assert formed[0] == formed[-1]
    assert len({str(heads) for heads in formed}) > 1
    np.testing.assert_array_equal(logits[0], logits[-1])


def test_all_heads_attend_until_the_first_tokens_are_there(made: Made) -> None:
    prepared, folder, _ = made("mha, dynamic")
    tokens = tokens_of(prepared, FIRST_TOKENS + 1)
    session = DecodeSession(folder, capacity=8, all_positions=True)
    found = in_chunks(session, tokens[:FIRST_TOKENS], [1])
    expected = original_logits(prepared.snapshot.path, tokens)
    np.testing.assert_allclose(found, expected[:FIRST_TOKENS], atol=1e-4)
    assert [buffer.shape[1] for buffer in arrays(session)] == [1, 4, 2, 4]
    assert np.abs(session.step(tokens[FIRST_TOKENS:]) - expected[FIRST_TOKENS:]).max() > 1e-3
    with pytest.raises(UsageError, match="clusters of heads were formed"):
        session.rewind(2)
    session.rewind(FIRST_TOKENS)


def test_session_is_filled_for_timing_when_clusters_are_dynamic(made: Made) -> None:
    prepared, folder, _ = made("mha, dynamic")
    session = DecodeSession(folder, capacity=40)
    session.fill(30)
    assert [buffer.shape[1:3] for buffer in arrays(session)] == [(1, 40), (4, 40), (2, 40), (4, 40)]
    assert session.step([3]).shape == (1, prepared.spec.vocab_size)
    session.reset()
    assert session.prefill(tokens_of(prepared, 30)).shape == (prepared.spec.vocab_size,)


@pytest.mark.parametrize("note", ["[1]", '{"0": {"count": "two"}}'])
def test_broken_notes_on_clusters_are_refused(made: Made, tmp_path: Path, note: str) -> None:
    _, folder, _ = made("mha, dynamic")
    model = onnx.load(folder / "model.onnx")
    next(entry for entry in model.metadata_props if entry.key == CLUSTERS).value = note
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match=CLUSTERS):
        DecodeSession(tmp_path, capacity=8)


@pytest.mark.parametrize(
    ("kind", "opens"), [("mha", False), ("mha, dynamic", False), ("gqa, window and softcap", True)]
)
def test_genai_config_is_written_when_genai_can_open_the_graph(
    made: Made, tmp_path: Path, kind: str, opens: bool
) -> None:
    prepared, _, plan = made(kind)
    prepared.write_companions(tmp_path, KVLayout.of(prepared.spec, plan), ("input_ids", "attention_mask"))
    assert (tmp_path / "genai_config.json").exists() is opens


def test_clusters_follow_calibration_when_a_session_forms_them(made: Made) -> None:
    """What the graph notes of calibration is what torch used."""
    prepared, folder, _ = made("mha, dynamic")
    noted = {buffers.tensors[0].layer: buffers.formed for buffers in clustered(DecodeSession(folder, capacity=8))}
    loss = prepared.statistics.sharing_loss
    assert noted.keys() == {0, 1}
    for layer, how in noted.items():
        assert isinstance(how, Formed)
        np.testing.assert_allclose(how.calibrated, loss[layer] / loss[layer].max(), atol=1e-4)


def test_layers_that_share_caches_have_no_clusters(tmp_path: Path) -> None:
    deep = MHA.model_copy(update={"layers": 3, "windows": (None,) * 3})
    caches = ClusteredCache(count=2), SharedCache(source=0), FullCache()
    with pytest.raises(UsageError, match="layer 0 has clusters of heads"):
        check_plan(Plan(layers=tuple(LayerPlan(layer=layer, cache=cache) for layer, cache in enumerate(caches))), deep)
    for layer, pairs in {0: {(2, 1)}, 1: {(2, 0)}}.items():
        plan = decided(ClusterHeads(clusters={layer: 2}, mode="dynamic"), deep)
        assert distances(deep, statistics_of(deep), plan).keys() == pairs
    both = tmp_path / "plan.json"
    layers = [{"layer": 0}, {"layer": 1, "cache": {"kind": "shared", "source": 0, "count": 2}}, {"layer": 2}]
    both.write_text(json.dumps({"layers": layers}))
    with pytest.raises(UsageError, match="count: no such key"):
        read_plan(both)


def test_dynamic_clusters_are_formed_for_one_sequence(made: Made) -> None:
    _, folder, _ = made("mha, dynamic")
    with pytest.raises(UsageError, match="one prompt at a time"):
        DecodeSession(folder, capacity=8, batch=2)


def test_sequences_side_by_side_equal_each_alone_when_clusters_are_fixed(made: Made) -> None:
    prepared, folder, _ = made("mha")
    tokens = tokens_of(prepared, 24).reshape(2, 12)
    session = DecodeSession(folder, capacity=12, all_positions=True, batch=2)
    found = np.concatenate([session.step(tokens[:, :10]), session.step(tokens[:, 10:11])], axis=1)
    for row in (0, 1):
        alone = DecodeSession(folder, capacity=12, all_positions=True).step(tokens[row])
        np.testing.assert_allclose(found[row], alone[:11], atol=1e-4)


@pytest.mark.parametrize("kind", ["mha", "gqa, window and softcap"])
def test_sequences_of_different_lengths_equal_each_alone(made: Made, kind: str) -> None:
    check_batch(made(kind)[1])
