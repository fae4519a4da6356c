"""The branch for prompts gives what the integer operator gives, whatever clients do with the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.models import exported, in_chunks, open_prepared, recipe_of

from kvslim.caches import FullCache, SharedCache, WindowCache
from kvslim.contract import WINDOW_SLACK
from kvslim.export import products
from kvslim.export.prompts import LONGEST_STEP, _sums
from kvslim.runtime.opening import layout_of, open_session
from kvslim.runtime.session import DecodeSession
from kvslim.types import LayerPlan, Plan

TOKENS = np.random.default_rng(0).integers(0, 256, 100)  # every tiny tokenizer has all bytes
NEVER, ALWAYS = 1 << 30, 1  # new tokens that a step may have at most
INT4 = FullCache(rank=16, rotation=0, stored="int4", centred=True)
RESIDUALS = FullCache(rank=16, residual=8, rotation=0, stored="int4", centred=True)
CACHES = {
    "int8": FullCache(stored="int8"),
    "one step for all": FullCache(stored="int8", granularity="per_tensor"),
    "int8, coded": FullCache(rank=8, stored="int8"),
    "int4": INT4,
    "int4, no code": FullCache(stored="int4"),
    "residual": FullCache(rank=8, residual=8, value_rank=16, value_residual=0, rotation=0, stored="int4", centred=True),
    "residuals": RESIDUALS,
    "residuals, more of values": FullCache(
        rank=32, residual=8, value_rank=24, value_residual=16, rotation=0, stored="int4", centred=True
    ),
    "shared": INT4,
    "ring": WindowCache(window=24, sinks=3, stored="int8"),
    "ring with residuals": WindowCache(window=24, sinks=3, **RESIDUALS.model_dump(exclude={"kind"})),
    "ring in int4": WindowCache(window=24, sinks=3, rank=8, rotation=0, stored="int4", centred=True),
}
WIDE = "residuals, more of values"  # takes heads of 32
CASES = [("llama", cache) for cache in CACHES if cache != WIDE]
CASES += [("gpt2", "int8"), ("phi3-partial", "int8"), ("phi3-partial", WIDE), ("gemma2", "int8")]

WINDOWED = ("mistral",)

Made = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two graphs of a model with a kind of cache: one never takes the branch, the other always does."""
    folders: dict[tuple[str, str], tuple[Path, Path]] = {}

    def graphs_of(family: str, cache: str) -> tuple[Path, Path]:
        if (family, cache) not in folders:
            recipe = recipe_of().model_copy(update={"window_cache": family in WINDOWED})
            prepared = open_prepared(tiny_model(family), recipe)
            layers = [LayerPlan(layer=layer, cache=CACHES[cache]) for layer in range(prepared.spec.layers)]
            if cache == "shared":
                layers[1] = LayerPlan(layer=1, cache=SharedCache(source=0))
            whole = tmp_path_factory.mktemp("prompts") / "graph"
            exported(prepared, Plan(layers=tuple(layers)), whole)
            folders[family, cache] = (limited(whole, NEVER), limited(whole, ALWAYS))
        return folders[family, cache]

    return graphs_of


def limited(folder: Path, most: int) -> Path:
    """The graph with another limit from which tokens are a prompt."""
    model = onnx.load(folder / "model.onnx")
    (is_prompt,) = (node for node in model.graph.node if node.op_type == "Greater")
    (limit,) = (tensor for tensor in model.graph.initializer if tensor.name == is_prompt.input[1])
    assert onnx.numpy_helper.to_array(limit).tolist() == [LONGEST_STEP]
    is_prompt.input[1] = "limit"  # its own, as others may read an equal constant
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([most]), "limit"))
    made = folder.with_name(f"most-{most}")
    made.mkdir()
    onnx.save(model, made / "model.onnx")
    return made


@pytest.mark.parametrize(("family", "cache"), CASES)
def test_branch_writes_the_rows_of_the_operator(made: Made, family: str, cache: str) -> None:
    sessions = [DecodeSession(folder, capacity=100, all_positions=True) for folder in made(family, cache)]
    by_step, by_prompt = (in_chunks(session, TOKENS, [40, 1, 20, 39]) for session in sessions)
    assert np.abs(by_step - by_prompt).max() < 0.02 * np.abs(by_step).max()
    assert np.median(np.abs(by_step - by_prompt)) < 1e-4
    held = [[array for layer in session._layers for array in layer.arrays] for session in sessions]
    for index, (expected, found) in enumerate(zip(*held, strict=True)):
        assert expected.any()
        different = np.abs(numbers(expected) - numbers(found))
        # Later layers read what attention gave, which is equal but for the last bits.
        assert different.max() <= (0 if index < 2 else 1)
        assert (different > 0).mean() < 0.002


@pytest.mark.parametrize(
    ("family", "cache"), [*CASES, *((family, cache) for family in WINDOWED for cache in ("int8", "int4, no code"))]
)
def test_prompt_after_a_rewind_is_what_it_is_without_the_detour(made: Made, family: str, cache: str) -> None:
    results = []
    for detour in ([], TOKENS[60:66]):  # short enough that no window drops a row
        session = DecodeSession(made(family, cache)[1], capacity=100)
        session.step(TOKENS[:20])
        if len(detour):
            session.step(detour)
            session.rewind(20)
        results.append(session.step(TOKENS[20:60]))
    assert np.abs(results[0]).max() > 0.1
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("family", "cache", "expected"),
    [
        ("llama", "residuals", [[24, 16]] * 4),
        ("llama", "ring with residuals", [[24, 16]] * 4),
        ("phi3-partial", WIDE, [[40, 32]] * 4 + [[32, 24]]),  # the last is of what values alone hold twice
        ("llama", "residual", []),
        ("llama", "int4", []),
    ],
)
def test_branch_attends_to_sums_of_what_is_held_twice(
    made: Made, family: str, cache: str, expected: list[list[int]]
) -> None:
    model = onnx.load(made(family, cache)[0] / "model.onnx")
    assert not any("value_sum" in name for node in model.graph.node for name in node.input)  # it is in the branches
    branches = [
        attribute.g for node in model.graph.node for attribute in node.attribute if attribute.name == "then_branch"
    ]
    assert branches
    for branch in branches:
        constants = {tensor.name: tensor.dims for tensor in model.graph.initializer}
        factors = [node.input[1] for node in branch.node if node.op_type in ("Mul", "MatMul")]
        matrices = [list(constants[name][-2:]) for name in factors if len(constants.get(name, ())) > 1]
        assert [[rows, columns] for rows, columns in matrices if rows / 2 < columns < rows] == expected


@pytest.mark.parametrize("cache", ["int8", "residuals", "ring in int4"])
def test_branches_read_their_constants_from_the_graph(made: Made, cache: str) -> None:
    """transformers.js cannot read external data of a branch's own."""
    branches = list(branches_of(onnx.load(made("llama", cache)[0] / "model.onnx").graph))
    assert branches
    assert [tensor.name for branch in branches for tensor in branch.initializer] == []


def branches_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """All branches, those of branches included."""
    for branch in (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        yield branch
        yield from branches_of(branch)


@pytest.mark.parametrize("count", [8, 16, 24])
def test_last_coordinates_are_added_to_those_that_they_refine(count: int) -> None:
    exact = np.random.default_rng(0).normal(size=(5, 40))
    coarse = exact.round()
    stored = np.concatenate([coarse, (exact - coarse)[:, :count]], axis=1)
    added = stored @ _sums(40 + count, count, 8)
    np.testing.assert_allclose(added[:, count - 8 : count], exact[:, count - 8 : count])
    np.testing.assert_array_equal(
        np.delete(added, range(count - 8, count), axis=1),
        np.delete(stored, [*range(count - 8, count), *range(32 + count, 40 + count)], axis=1),
    )


@pytest.mark.parametrize("cache", ["int8", "int4, no code"])
@pytest.mark.parametrize("chunks", [[40, 1, 20, 39], [5, 9, 17, 1, 68], [100]])
def test_branch_drops_the_rows_that_the_operator_drops(made: Made, cache: str, chunks: list[int]) -> None:
    sessions = [DecodeSession(folder, capacity=100, all_positions=True) for folder in made("mistral", cache)]
    by_step, by_prompt = (in_chunks(session, TOKENS, chunks) for session in sessions)
    assert np.abs(by_step - by_prompt).max() < 0.02 * np.abs(by_step).max()
    held = 100
    while held > 16 + WINDOW_SLACK:
        held -= WINDOW_SLACK + 1
    for pair in zip(*(session._layers for session in sessions), strict=True):
        for expected, found in zip(*(layer.arrays for layer in pair), strict=True):
            assert expected.shape[2] == 16 + WINDOW_SLACK
            different = np.abs(numbers(expected[:, :, :held]) - numbers(found[:, :, :held]))
            assert different.max() <= 1
            assert (different > 0).mean() < 0.002


def test_window_keeps_the_operator_for_several_sequences(made: Made) -> None:
    results = []
    for folder in made("mistral", "int8"):
        session = DecodeSession(folder, capacity=100, all_positions=True, batch=2)
        results.append(session.step(TOKENS.reshape(2, 50)))
    np.testing.assert_array_equal(*results)


def numbers(stored: np.ndarray) -> np.ndarray:
    """The integers of a cache."""
    if stored.dtype == np.int8:
        return stored.astype(int)
    return np.stack([stored % 16, stored // 16]).astype(int)


@pytest.mark.parametrize("cache", ["int8", "int4"])
@pytest.mark.parametrize("has_room", [True, False])
def test_batch_of_unequal_lengths_is_the_same_with_and_without_room(made: Made, cache: str, has_room: bool) -> None:
    """Clients that do not allocate the cache get one that is as long as the text."""
    results = []
    for folder in made("llama", cache):
        session = open_session(folder, all_positions=True)
        caches = {
            tensor.past: np.zeros(
                (2, tensor.heads, 90 if has_room else 0, tensor.columns), np.int8 if cache == "int8" else np.uint8
            )
            for tensor in layout_of(session).tensors
        }
        names, wanted = ([node.name for node in nodes] for nodes in (session.get_outputs(), session.get_inputs()))
        ids, lengths, logits = TOKENS.reshape(2, 50), np.array([[40], [23]]), []
        mask, positions = (np.arange(40) < lengths).astype(np.int64), np.tile(np.arange(40), (2, 1))
        for step in range(10):
            new = ids[:, :40] if step == 0 else ids[:, 39 + step : 40 + step]
            given = {"input_ids": new, "attention_mask": mask, "position_ids": positions} | caches
            outputs = session.run(names, {name: array for name, array in given.items() if name in wanted})
            found = dict(zip(names, outputs, strict=True))
            caches = {name: found[name.replace("past_key_values", "present")] for name in caches}
            logits.append(found["logits"] * mask[:, -new.shape[1] :, None])
            mask, positions = np.pad(mask, ((0, 0), (0, 1)), constant_values=1), lengths + step
        assert {array.shape[2] for array in caches.values()} == {90 if has_room else 49}
        results.append(np.concatenate(logits, axis=1))
    by_step, by_prompt = results
    assert np.abs(by_step).max() > 0.1
    assert np.abs(by_step - by_prompt).max() < 0.02 * np.abs(by_step).max()


def test_sums_of_values_stay_as_they_are_beside_quantised_weights(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are matrices too, and large ones in real models."""
    monkeypatch.setattr(products, "SMALLEST_MATRIX", 40 * 24)
    prepared = open_prepared(tiny_model("phi3-partial"), recipe_of((), "int4"))
    layers = [LayerPlan(layer=layer, cache=CACHES[WIDE]) for layer in range(prepared.spec.layers)]
    exported(prepared, Plan(layers=tuple(layers)), tmp_path / "graph")
    graphs = limited(tmp_path / "graph", NEVER), limited(tmp_path / "graph", ALWAYS)
    by_step, by_prompt = (
        in_chunks(DecodeSession(graph, capacity=100, float_activations=True), TOKENS, [40, 20, 39]) for graph in graphs
    )
    np.testing.assert_allclose(by_prompt, by_step, atol=1e-3)
