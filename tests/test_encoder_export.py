"""Encoders: the graph computes what torch computes, alone and in padded batches, for every family and task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.tiny_encoders import FAMILIES, TASKS, save_encoder

from kvslim.loading.source import read_spec, resolve
from kvslim.prepared.encoder import PreparedEncoder
from kvslim.progress import Silent
from kvslim.recipe import Recipe
from kvslim.runtime.encoder import EncoderSession, mean_pool, pad
from kvslim.types import Plan
from kvslim.weight_format import Weights

TEXTS = [[2, 40, 50, 60, 3], [2, 9, 3], [2, *range(30, 55), 3]]


Made = tuple[PreparedEncoder, Path]
Make = Callable[[str, str], Made]


def export(folder: Path, family: str, task: str, weights: Weights = "int8") -> Made:
    """A tiny encoder with its graphs in `folder`: `plain`, and `slim` in the given weights."""
    snapshot = resolve(str(save_encoder(family, task, folder / "model")))
    prepared = PreparedEncoder(snapshot, read_spec(snapshot), Recipe(name="test", weights=weights), Silent())
    for name in ("plain", "slim"):
        (folder / name).mkdir()
    prepared.export_plain(folder / "plain")
    prepared.export(Plan.identity(prepared.spec), folder / "slim")
    return prepared, folder


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Each encoder's graphs, made once."""
    made: dict[tuple[str, str], Made] = {}

    def of(family: str, task: str) -> Made:
        if (family, task) not in made:
            made[family, task] = export(tmp_path_factory.mktemp(family), family, task)
        return made[family, task]

    return of


def torch_outputs(prepared: PreparedEncoder, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Hidden states and logits of transformers' own model, with its own attention."""
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM

    loader = AutoModelForMaskedLM if prepared.spec.task == "fill-mask" else AutoModel
    model = loader.from_pretrained(prepared.snapshot.path, attn_implementation="eager").eval()
    tokens = {"input_ids": torch.from_numpy(np.where(mask, ids, model.config.pad_token_id))}
    tokens["attention_mask"] = torch.from_numpy(mask)
    with torch.inference_mode():
        hidden = model.base_model(**tokens).last_hidden_state.numpy()
        logits = model(**tokens).logits.numpy() if prepared.spec.task == "fill-mask" else None
    return hidden, logits


def operators(folder: Path) -> Counter[str]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_equals_torch_when_a_batch_is_padded(make: Make, family: str, task: str) -> None:
    prepared, folder = make(family, task)
    session = EncoderSession(folder / "plain")
    ids, mask = pad(TEXTS)
    hidden, logits = torch_outputs(prepared, ids, mask)
    seen = mask.astype(bool)
    assert np.abs(hidden[seen]).max() > 0.5
    assert np.abs(session.hidden_states(ids, mask) - hidden)[seen].max() < 1e-4
    assert session.has_logits == (logits is not None)
    if logits is not None:
        assert np.abs(session.logits(ids, mask) - logits)[seen].max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_do_not_depend_on_padding_when_in_fp32(make: Make, family: str) -> None:
    session = EncoderSession(make(family, "feature-extraction")[1] / "plain")
    alone = np.concatenate([session.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(session.embed(TEXTS), alone, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1


def test_padding_may_be_on_the_left_when_positions_count_attended_tokens(make: Make) -> None:
    session = EncoderSession(make("roberta", "feature-extraction")[1] / "plain")
    ids, mask = np.array([[0, 0, *TEXTS[0]]]), np.array([[0, 0, 1, 1, 1, 1, 1]])
    np.testing.assert_allclose(mean_pool(session.hidden_states(ids, mask), mask), session.embed(TEXTS[:1]), atol=1e-5)


def test_token_types_change_the_states_when_the_family_has_them(make: Make) -> None:
    session = EncoderSession(make("bert", "feature-extraction")[1] / "plain")
    ids, mask = pad(TEXTS[:1])
    first, second = (session.hidden_states(ids, mask, types) for types in (None, np.ones_like(ids)))
    assert np.abs(first - second).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_is_fused(make: Make, family: str) -> None:
    prepared, folder = make(family, "feature-extraction")
    count, layers = operators(folder / "plain"), prepared.spec.layers
    assert count["Attention"] == layers
    assert count["MatMul"] == 4 * layers
    assert count["SkipLayerNormalization"] >= 2 * layers
    assert count["SkipLayerNormalization"] + count["LayerNormalization"] == 2 * layers + 1
    assert count["BiasGelu"] == layers
    assert count["Split"] == layers
    assert count["Add"] <= layers + 3  # the packed bias of each layer, and the sum of the embeddings
    assert not {"Softmax", "Transpose", "Reshape", "Gelu", "Erf", "Gemm"}.intersection(count)
    assert b".py" not in (folder / "plain" / "model.onnx").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_quantised_when_weights_are_int8(make: Make, family: str) -> None:
    prepared, folder = make(family, "fill-mask")
    count, layers = operators(folder / "slim"), prepared.spec.layers
    assert count["MatMulInteger"] == 3 * layers + 1  # packed projections, output and up; the head's own matrix
    assert count["MatMulNBits"] == layers + 1  # down, behind the activation; the head, which the embedding shares
    assert count["MatMul"] == count["Gemm"] == count["FusedMatMul"] == 0
    ids, mask = pad(TEXTS)
    _, logits = torch_outputs(prepared, ids, mask)
    assert logits is not None
    seen = mask.astype(bool)
    found = EncoderSession(folder / "slim").logits(ids, mask)[seen]
    assert np.abs(found - logits[seen]).max() > 1e-4
    assert np.corrcoef(found.ravel(), logits[seen].ravel())[0, 1] > 0.998


def test_int4_keeps_blocks_everywhere(tmp_path: Path) -> None:
    prepared, folder = export(tmp_path, "bert", "feature-extraction", "int4")
    count = operators(folder / "slim")
    assert count["MatMulNBits"] == 4 * prepared.spec.layers
    nodes = onnx.load(folder / "slim" / "model.onnx", load_external_data=False).graph.node
    found = [
        part.i for node in nodes if node.op_type == "MatMulNBits" for part in node.attribute if part.name == "bits"
    ]
    assert set(found) == {4}
    assert count["MatMulInteger"] == count["MatMul"] == 0


def test_two_exports_are_equal_to_the_byte(make: Make, tmp_path: Path) -> None:
    first, (_, second) = make("bert", "fill-mask")[1], export(tmp_path, "bert", "fill-mask")
    for file in ("plain/model.onnx", "plain/model.onnx_data", "slim/model.onnx", "slim/model.onnx_data"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_dimensions_have_the_names_of_the_field(make: Make) -> None:
    folder = make("bert", "fill-mask")[1]
    graph = onnx.load(folder / "plain" / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    tokens = ["batch_size", "sequence_length"]
    assert shapes == {
        **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), tokens),
        "last_hidden_state": [*tokens, 64],
        "logits": [*tokens, 261],
    }
