"""Rings and packed codes: the graph computes what torch computes, however the text is cut and the buffers lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from support.batches import check_batch
from support.models import in_chunks, original_logits, tokens_of, torch_logits
from support.streaming_codes import SINKS, WINDOW, export_ring, install_ring
from support.tiny_tokenizer import byte_tokenizer

from kvslim.caches.packed import CODES as BY_BITS
from kvslim.caches.window import RINGS
from kvslim.contract import CacheType
from kvslim.errors import ArtifactError, UsageError
from kvslim.export.manifest import SPECULATIVE_GRAPH
from kvslim.export.speculative import write_speculative_graph
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.runtime.opening import layout_of, open_session
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from kvslim.speculative.estimates import FreeRuns
from kvslim.speculative.loop import write_speculatively
from kvslim.speculative.speculator import Speculator
from kvslim.types import Draft, KVLayout

ModelOf = Callable[[str], Path]
LENGTH = 80  # many times the window
RINGS_OF: tuple[CacheType, ...] = ("float32", "int8", "int4")
CODES = tuple(BY_BITS.values())
OTHER_FAMILIES: tuple[tuple[str, CacheType], ...] = (
    ("gpt2", "float32"),
    ("gpt2", "codes2"),
    ("gemma2", "int4"),
    ("gemma2", "codes2"),
    ("mistral", "float32"),
)


@pytest.fixture(scope="module")
def made(
    tiny_model: ModelOf, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, CacheType], tuple[PreparedDecoder, Path]]:
    """The prepared and the graph of a family with rings in all layers, made once."""
    found: dict[tuple[str, CacheType], tuple[PreparedDecoder, Path]] = {}

    def of(family: str, cache: CacheType) -> tuple[PreparedDecoder, Path]:
        if (family, cache) not in found:
            folder = tmp_path_factory.mktemp("ring") / "graph"
            found[family, cache] = export_ring(tiny_model(family), folder, cache), folder
        return found[family, cache]

    return of


Made = Callable[[str, CacheType], tuple[PreparedDecoder, Path]]


@pytest.mark.parametrize(
    ("family", "cache"),
    [*(("llama", cache) for cache in (*RINGS_OF, *CODES)), *OTHER_FAMILIES],
)
def test_graph_equals_torch_when_text_comes_in_chunks_of_16(made: Made, family: str, cache: CacheType) -> None:
    prepared, folder = made(family, cache)
    tokens = tokens_of(prepared, LENGTH)
    expected = torch_logits(prepared, tokens)
    session = DecodeSession(folder, capacity=LENGTH, all_positions=True)
    error = np.abs(in_chunks(session, tokens, [16]) - expected).max(1)
    # A number on the edge between two steps may round to either side, which moves what follows.
    assert np.median(error) < 1e-4
    assert error.max() < (1e-4 if cache == "float32" else 0.1 * np.abs(expected).max())


@pytest.mark.parametrize("cache", RINGS_OF)
@pytest.mark.parametrize("chunks", [[1], [LENGTH], [5], [WINDOW + SINKS + 9, 2, 1, 30], [2, 1, 1]])
def test_ring_gives_one_result_however_the_text_is_cut(made: Made, cache: CacheType, chunks: list[int]) -> None:
    prepared, folder = made("llama", cache)
    tokens = tokens_of(prepared, LENGTH)
    session = DecodeSession(folder, capacity=LENGTH, all_positions=True)
    expected = in_chunks(session, tokens, [16])
    session.reset()
    error = np.abs(in_chunks(session, tokens, chunks) - expected).max(1)
    assert np.median(error) < 1e-4
    assert error.max() < (1e-4 if cache == "float32" else 0.1 * np.abs(expected).max())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_ring_equals_the_model_when_the_text_fits(tiny_model: ModelOf, tmp_path: Path, family: str) -> None:
    prepared = export_ring(tiny_model(family), tmp_path / "graph", "float32", window=40, sinks=3)
    tokens = tokens_of(prepared, 43)
    session = DecodeSession(tmp_path / "graph", capacity=43, all_positions=True)
    expected = original_logits(tiny_model(family), tokens)
    np.testing.assert_allclose(in_chunks(session, tokens, [20, 1, 3]), expected, atol=1e-4)


@pytest.mark.parametrize("cache", CODES)
def test_packed_equals_the_model_when_no_token_has_left_the_ring(
    made: Made, tiny_model: ModelOf, cache: CacheType
) -> None:
    prepared, folder = made("llama", cache)
    tokens = tokens_of(prepared, WINDOW + SINKS + 20)
    session = DecodeSession(folder, capacity=len(tokens), all_positions=True)
    found = in_chunks(session, tokens, [WINDOW + SINKS, 20])
    np.testing.assert_allclose(found, original_logits(tiny_model("llama"), tokens), atol=1e-4)


def naive_packed(prepared: PreparedDecoder, tokens: np.ndarray, chunk: int) -> np.ndarray:
    """[n, vocab] logits as torch gives them for chunks of another size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvslim.caches.attention.packed.EVALUATION_CHUNK", chunk)
        return torch_logits(prepared, tokens)


@pytest.mark.parametrize("cache", CODES)
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_packed_equals_torch_when_chunks_have_another_size(made: Made, cache: CacheType, chunk: int) -> None:
    prepared, folder = made("llama", cache)
    tokens = tokens_of(prepared, LENGTH)
    expected = naive_packed(prepared, tokens, chunk)
    session = DecodeSession(folder, capacity=LENGTH, all_positions=True)
    error = np.abs(in_chunks(session, tokens, [chunk]) - expected).max(1)
    assert np.median(error) < 1e-4
    assert error.max() < 0.1 * np.abs(expected).max()
    plain = original_logits_of(prepared, tokens)
    assert np.abs(plain - expected)[-20:].max() > 1e-2  # the codes are in use


def original_logits_of(prepared: PreparedDecoder, tokens: np.ndarray) -> np.ndarray:
    return original_logits(prepared.snapshot.path, tokens)


@pytest.mark.parametrize("cache", RINGS_OF)
@pytest.mark.parametrize("shared", [False, True])
def test_batch_of_unequal_lengths_equals_each_text_alone(made: Made, cache: CacheType, shared: bool) -> None:
    prepared, folder = made("llama", cache)
    session = open_session(folder, all_positions=True)
    lengths, steps = (WINDOW + SINKS + 6, 5), 30
    texts = [tokens_of(prepared, length + steps)[::-1][: length + steps] for length in lengths]
    alone = [in_chunks(DecodeSession(folder, capacity=80, all_positions=True), text, [len(text)]) for text in texts]
    caches = [np.zeros((2, *shape), dtype) for shape, dtype in cache_shapes(session)]
    ids = np.zeros((2, max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        ids[row, :length], mask[row, :length] = text[:length], 1
    positions = np.tile(np.arange(max(lengths)), (2, 1))
    found = [run(session, caches, ids, mask, positions, shared)]
    for step in range(steps):
        at = np.array([[length + step] for length in lengths])
        ids = np.array([[text[place[0]]] for text, place in zip(texts, at, strict=True)])
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        found.append(run(session, caches, ids, mask, at, shared))
    for row, length in enumerate(lengths):
        logits = np.concatenate([found[0][row, :length], *(step[row] for step in found[1:])])
        assert np.median(np.abs(logits - alone[row]).max(1)) < 1e-4
        assert np.abs(logits - alone[row]).max() < (1e-4 if cache == "float32" else 0.1 * np.abs(logits).max())


@pytest.mark.parametrize("cache", RINGS_OF)
def test_session_keeps_sequences_of_different_lengths_apart(made: Made, cache: CacheType) -> None:
    check_batch(made("llama", cache)[1])


def cache_shapes(session: onnxruntime.InferenceSession) -> list[tuple[tuple[int, int, int], type]]:
    types = {"float32": np.float32, "int8": np.int8, "int4": np.uint8}
    return [((t.heads, t.rows(0), t.columns), types[t.dtype]) for t in layout_of(session).tensors]


def run(
    session: onnxruntime.InferenceSession,
    caches: list[np.ndarray],
    ids: np.ndarray,
    mask: np.ndarray,
    positions: np.ndarray,
    shared: bool,
) -> np.ndarray:
    """One step of a batch; past and present lie in one memory or in two."""
    binding = session.io_binding()
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    for name, array in feed.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    presents = caches if shared else [np.full_like(cache, 7) for cache in caches]
    for tensor, past, present in zip(layout_of(session).tensors, caches, presents, strict=True):
        binding.bind_ortvalue_input(tensor.past, onnxruntime.OrtValue.ortvalue_from_numpy(past))
        binding.bind_ortvalue_output(tensor.present, onnxruntime.OrtValue.ortvalue_from_numpy(present))
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    for past, present in zip(caches, presents, strict=True):
        past[...] = present
    logits: np.ndarray = binding.copy_outputs_to_cpu()[-1]
    return logits


@pytest.mark.parametrize("cache", [*RINGS_OF, *CODES])
def test_layout_of_the_graph_is_that_of_the_plan(made: Made, tiny_model: ModelOf, cache: CacheType) -> None:
    prepared, folder = made("llama", cache)
    _, plan = install_ring(tiny_model("llama"), cache)
    layout = layout_of(open_session(folder))
    assert layout == KVLayout.of(prepared.spec, plan)
    width = prepared.spec.layers * 2 * prepared.spec.kv_heads * prepared.spec.head_dim
    exact = {"int8": 1, "int4": 0.5}.get(cache, 4)
    ring = width * (WINDOW + SINKS) * exact
    coded = width * (1000 - WINDOW - SINKS) * int(cache[-1]) / 8 if cache in CODES else 0
    assert layout.bytes_at(1000) == ring + coded


@pytest.mark.parametrize("cache", [*RINGS_OF, "codes3"])
def test_ring_is_written_after_every_read_of_it(made: Made, tmp_path: Path, cache: CacheType) -> None:
    """In the graph that onnxruntime runs: past and present may lie in one memory."""
    _, folder = made("llama", cache)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(folder / "model.onnx", options)
    graph = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph
    count = Counter(node.op_type for node in graph.node)
    integers, codes = cache in ("int8", "int4"), cache == "codes3"
    assert count["ScatterND"] == 4
    assert (count["Softmax"], count["GroupQueryAttention"], count["If"]) == (
        (2, 0, 0) if codes else (0, 0, 2) if integers else (0, 2, 0)
    )
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type == "ScatterND":
            readers = {reader.output[0] for reader in graph.node if node.input[0] in read_by(reader)} - set(node.output)
            assert readers
            assert readers <= ancestors(node, makers)


def ancestors(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> set[str]:
    """The values that a node needs, directly or not."""
    found: set[str] = set()
    pending = read_by(node)
    while pending:
        name = pending.pop()
        if name in makers and name not in found:
            found.add(name)
            pending += read_by(makers[name])
    return found


def read_by(node: onnx.NodeProto) -> list[str]:
    """The values that a node reads; those that its branches do, too."""
    branches = [attribute.g.node for attribute in node.attribute if attribute.HasField("g")]
    return [*node.input, *(name for inner in branches for each in inner for name in read_by(each))]


@pytest.mark.parametrize("cache", ["float32", "codes2"])
def test_rewind_is_refused_when_the_ring_has_moved_on(made: Made, cache: CacheType) -> None:
    prepared, folder = made("llama", cache)
    tokens = tokens_of(prepared, 40)
    session = DecodeSession(folder, capacity=40, all_positions=True)
    first = session.step(tokens[: WINDOW + SINKS])
    session.rewind(5)
    np.testing.assert_allclose(session.step(tokens[5 : WINDOW + SINKS]), first[5:], atol=1e-5)
    later = session.step(tokens[WINDOW + SINKS :])
    session.rewind(40)
    with pytest.raises(UsageError, match="window has dropped tokens"):
        session.rewind(39)
    session.reset()
    session.step(tokens[: WINDOW + SINKS])
    np.testing.assert_allclose(session.step(tokens[WINDOW + SINKS :]), later, atol=1e-5)


@pytest.mark.parametrize("cache", RINGS_OF)
def test_short_run_can_be_taken_back_where_the_ring_is_full(made: Made, cache: CacheType) -> None:
    """As if it had ended with the last token that stays; what came before the run stays gone."""
    prepared, folder = made("llama", cache)
    tokens = tokens_of(prepared, LENGTH)
    session = DecodeSession(folder, capacity=LENGTH, all_positions=True)
    session.step(tokens[:8])
    session.step(tokens[8:11])
    session.rewind(6)  # nothing is overwritten yet
    session.step(tokens[6:40])
    assert session.takes_back(WINDOW)
    assert not session.takes_back(WINDOW + 1)  # two of its tokens share a row
    for kept in (1, 3, 5):  # of runs of five
        length = session.length + kept
        session.step([*tokens[session.length : length], *tokens[: 5 - kept]])
        if kept < 5:
            with pytest.raises(UsageError, match="window has dropped tokens"):
                session.rewind(length - kept - 1)
        session.rewind(length)
    with pytest.raises(UsageError, match="window has dropped tokens"):
        session.rewind(session.length - 1)
    found = session.step(tokens[49:])
    session.reset()
    for start, stop in ((0, 40), (40, 41), (41, 44), (44, 49)):
        session.step(tokens[start:stop])
    np.testing.assert_allclose(found, session.step(tokens[49:]), atol=1e-5)


@pytest.mark.parametrize("cache", [*RINGS_OF, "codes2"])
def test_draft_goes_on_behind_a_full_ring_but_for_packed_codes(made: Made, cache: CacheType) -> None:
    _, folder = made("llama", cache)
    write_speculative_graph(folder)
    session = DecodeSession(folder / SPECULATIVE_GRAPH, capacity=3 * LENGTH)
    ids = [5, 6, 7, 8] * (LENGTH // 4)
    plain, drafted = (Completion(byte_tokenizer(), ids, LENGTH) for _ in range(2))
    list(write(session, [plain], session.prefill(ids)[None]))
    session.reset()
    logits = session.prefill(ids)
    list(write_speculatively(session, drafted, logits, Speculator(session, Draft(kind="lookup"), costs=FreeRuns())))
    assert drafted.tokens == plain.tokens
    assert any(taken < proposed for proposed, taken in drafted.rounds) == (cache in RINGS_OF)
    assert all(proposed < WINDOW for proposed, _ in drafted.rounds)


def codes_of(session: DecodeSession) -> list[np.ndarray]:
    """The buffers of packed codes."""
    held = [pair for layer in session._layers for pair in zip(layer.tensors, layer.arrays, strict=True)]
    return [array for tensor, array in held if tensor.kind.endswith("_codes")]


@pytest.mark.parametrize("length", [3, WINDOW + SINKS, 50])
def test_fill_sets_ring_and_codes_when_packed(made: Made, length: int) -> None:
    _, folder = made("llama", "codes2")
    session = DecodeSession(folder, capacity=60)
    session.fill(length, seed=1)
    codes = codes_of(session)
    left = max(0, length - WINDOW - SINKS)
    assert all(buffer[:, left:].any() == 0 for buffer in codes)
    assert all(buffer[:, :left].any(axis=(0, 2, 3)).all() for buffer in codes)
    assert np.isfinite(session.step([1])).all()


def test_codes_are_appended_in_place_when_tokens_leave(made: Made) -> None:
    prepared, folder = made("llama", "codes3")
    session = DecodeSession(folder, capacity=60)
    tokens = tokens_of(prepared, 60)
    session.step(tokens[:30])
    codes = codes_of(session)
    before = [buffer.copy() for buffer in codes]
    session.step(tokens[30:31])
    left = 30 - WINDOW - SINKS
    for buffer, old in zip(codes, before, strict=True):
        np.testing.assert_array_equal(buffer[:, :left], old[:, :left])
        assert buffer[:, left].any()
        assert not buffer[:, left + 1 :].any()


def test_layout_is_refused_when_the_metadata_is_broken(made: Made, tmp_path: Path) -> None:
    _, folder = made("gpt2", "codes2")
    model = onnx.load(folder / "model.onnx", load_external_data=True)
    for value in ('{"0": 3}', "{}"):
        onnx.helper.set_model_props(model, {RINGS: value})
        onnx.save(model, tmp_path / "broken.onnx")
        with pytest.raises(ArtifactError):
            layout_of(open_session(tmp_path / "broken.onnx"))
