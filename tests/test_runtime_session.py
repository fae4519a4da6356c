from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.batches import check_batch
from support.tiny_graph import KV_HEADS, write_tiny

from kvslim.contract import WINDOW_SLACK, KVTensor
from kvslim.errors import ArtifactError, NotFoundError, UsageError
from kvslim.runtime.opening import layout_of, open_session
from kvslim.runtime.session import DecodeSession
from kvslim.types import KVLayout

TOKENS = np.random.default_rng(0).integers(24, size=40)
VARIANTS = pytest.mark.parametrize(
    "variant", [{}, {"int8": True}, {"positions": 64}], ids=["fp32", "int8", "positions"]
)


@VARIANTS
def test_step_equals_one_shot_when_tokens_come_one_by_one(tmp_path: Path, variant: dict[str, bool]) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx", **variant), capacity=64)
    whole = session.step(TOKENS)
    session.reset()
    single = np.concatenate([session.step([token]) for token in TOKENS])
    np.testing.assert_allclose(single, whole, atol=1e-5)


@VARIANTS
def test_sequences_of_different_lengths_equal_each_alone(tmp_path: Path, variant: dict[str, bool]) -> None:
    check_batch(write_tiny(tmp_path / "model.onnx", **variant))


@VARIANTS
def test_prefill_equals_one_shot_when_chunked(tmp_path: Path, variant: dict[str, bool]) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx", **variant), capacity=40)
    whole = session.step(TOKENS)[-1]
    session.reset()
    last = session.prefill(TOKENS, chunk=7)
    np.testing.assert_allclose(last, whole, atol=1e-5)
    assert session.length == len(TOKENS)


def test_step_equals_reference_attention_when_computed_in_numpy(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.onnx", layers=(0,), dims=(8,))
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    hidden = weights["embedding"][TOKENS]
    heads = {name: (hidden @ weights[f"{name}.0.weight"]).reshape(len(TOKENS), -1, 8) for name in "qkv"}
    keys, values = (np.repeat(heads[name], 2, axis=1) for name in "kv")
    scores = np.einsum("qhd,khd->hqk", heads["q"], keys) / np.sqrt(8)
    scores[:, ~np.tri(len(TOKENS), dtype=bool)] = -np.inf
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    attended = np.einsum("hqk,khd->qhd", weight, values).reshape(len(TOKENS), -1)
    expected = (hidden + attended @ weights["o.0.weight"]) @ weights["head"]
    np.testing.assert_allclose(DecodeSession(path, capacity=40).step(TOKENS), expected, atol=1e-4)


def test_step_appends_in_place_when_past_and_present_share_memory(tmp_path: Path) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=64)
    buffers = [array for layer in session._layers for array in layer.arrays]
    addresses = [buffer.ctypes.data for buffer in buffers]
    session.step(TOKENS)
    head = [buffer[:, :, :40].copy() for buffer in buffers]
    session.step([3])
    outputs = {
        value.data_ptr()
        for value in session._binding.get_outputs()
        if value.shape()[1:3] == [KV_HEADS, 64] and value.data_type() == "tensor(float)"
    }
    assert outputs == set(addresses)
    for buffer, before in zip(buffers, head, strict=True):
        np.testing.assert_array_equal(buffer[:, :, :40], before)
        assert buffer[:, :, 40].any()
        assert not buffer[:, :, 41:].any()


def test_step_ignores_what_lies_beyond_when_rewound(tmp_path: Path) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx", int8=True), capacity=64)
    session.step(TOKENS[:20])
    first = session.step(TOKENS[20:])
    session.rewind(20)
    assert session.length == 20
    np.testing.assert_allclose(session.step(TOKENS[20:]), first, atol=1e-6)


def test_step_raises_usage_error_when_capacity_is_exceeded(tmp_path: Path) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=4)
    session.step([1, 2, 3])
    with pytest.raises(UsageError, match="5 tokens exceed the cache of 4"):
        session.step([4, 5])
    assert session.length == 3


def test_prefill_appends_nothing_when_capacity_is_exceeded(tmp_path: Path) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=4)
    with pytest.raises(UsageError, match="exceed"):
        session.prefill([1, 2, 3, 4, 5], chunk=2)
    assert session.length == 0


@pytest.mark.parametrize("action", ["step", "prefill"])
def test_session_raises_usage_error_when_there_are_no_tokens(tmp_path: Path, action: str) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=4)
    with pytest.raises(UsageError, match="no tokens"):
        getattr(session, action)([])


def test_rewind_raises_usage_error_when_cache_is_shorter(tmp_path: Path) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=4)
    with pytest.raises(UsageError, match="rewind"):
        session.rewind(1)


def test_session_raises_usage_error_when_capacity_is_not_positive(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 tokens"):
        DecodeSession(tmp_path, capacity=0)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("length", [3, 300, 600])
def test_fill_sets_exactly_the_context_when_called(tmp_path: Path, int8: bool, length: int) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx", int8=int8), capacity=601)
    session.fill(length, seed=1)
    assert session.length == length
    for buffer in (array for layer in session._layers for array in layer.arrays):
        assert buffer[:, :, :length].any(axis=(0, 1, 3)).all()
        assert not buffer[:, :, length:].any()
    logits = session.step([1])
    session.fill(length, seed=1)
    np.testing.assert_array_equal(session.step([1]), logits)
    assert np.isfinite(logits).all()


def test_fill_raises_usage_error_when_capacity_is_exceeded(tmp_path: Path) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=4)
    with pytest.raises(UsageError, match="exceed"):
        session.fill(5)


def test_layout_tells_dims_and_bytes_when_layers_differ_and_have_gaps(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.onnx", layers=(0, 3), dims=(8, 16), int8=True)
    layout = layout_of(open_session(path))
    assert [(tensor.past, tensor.dim, tensor.dtype) for tensor in layout.tensors] == [
        ("past_key_values.0.key", 8, "int8"),
        ("past_key_values.0.value", 8, "int8"),
        ("past_key_values.3.key", 16, "int8"),
        ("past_key_values.3.value", 16, "int8"),
    ]
    assert layout.bytes_per_token(10) == 2 * KV_HEADS * (8 + 16)


def test_session_opens_folder_when_it_holds_a_graph(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model.onnx", vocab=17)
    assert DecodeSession(tmp_path, capacity=1, threads=1).vocab == 17


def test_session_raises_not_found_when_there_is_no_graph(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no ONNX graph"):
        DecodeSession(tmp_path, capacity=1)


def test_session_raises_artifact_error_when_graph_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="cannot load") as caught:
        DecodeSession(path, capacity=1)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_session_raises_artifact_error_when_external_data_is(tmp_path: Path, damage: str) -> None:
    path = write_tiny(tmp_path / "model.onnx", vocab=400)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data")
    data = tmp_path / "model.onnx_data"
    data.unlink() if damage == "missing" else data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot load"):
        DecodeSession(path, capacity=1)


def test_session_raises_artifact_error_when_graph_breaks_the_contract(tmp_path: Path) -> None:
    shape = ["batch", 3]
    value = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    graph = helper.make_graph([helper.make_node("Identity", ["pixels"], ["logits"])], "g", [value], [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match="'pixels'"):
        DecodeSession(tmp_path / "m.onnx", capacity=1)


def test_step_raises_artifact_error_when_positions_run_out(tmp_path: Path) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx", positions=4), capacity=8)
    with pytest.raises(ArtifactError, match=r"tokens 0\.\.5"):
        session.step([1, 2, 3, 4, 5])
    assert session.length == 0


def test_runtime_imports_neither_torch_nor_transformers_when_loaded() -> None:
    script = "import kvslim.runtime.generate, sys; print({'torch', 'transformers'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_cache_of_a_window_does_not_grow_with_the_context(tmp_path: Path) -> None:
    layout = KVLayout(
        tensors=tuple(
            KVTensor(layer=layer, kind=kind, heads=2, dim=16, dtype="float32", window=window)
            for layer, window in ((0, 64), (1, None))
            for kind in ("key", "value")
        )
    )
    full = 2 * 2 * 16 * 4
    assert layout.bytes_at(1000) == full * (1000 + 64 + WINDOW_SLACK)
    assert layout.bytes_per_token(1000) == layout.bytes_at(1000) / 1000


def test_threads_rest_between_runs(tmp_path: Path) -> None:
    """Spinning threads of one session would take the cores from the next, which is timed in turns with it."""
    options = open_session(write_tiny(tmp_path / "tiny.onnx")).get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
