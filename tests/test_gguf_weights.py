"""Blocks of a GGUF are carried over as they are: the graph computes with the file's own numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import onnx_ir as ir
import pytest
from support.blocks import graph_rows
from support.models import in_chunks, open_prepared, recipe_of, tokens_of, torch_logits
from support.tiny_decoders import save_decoder
from support.tiny_gguf import write_gguf
from torch.nn import Embedding, Linear

from kvslim.checks import check_files
from kvslim.errors import UsageError
from kvslim.loading.gguf_blocks import CARRIED, bytes_in_graph, stored_rows
from kvslim.loading.model import load_model
from kvslim.loading.source import read_spec, resolve
from kvslim.methods import KvQuant
from kvslim.pipeline import compress
from kvslim.report.matrices import formats_line, matrix_formats, rounded_again
from kvslim.runtime.session import DecodeSession
from kvslim.types import Plan
from kvslim.validation.quality import measure_quality
from kvslim.weight_format import WeightFormat

RANDOM = np.random.default_rng(0)
STORED = WeightFormat(type="stored")
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q8_0": (0,),
}


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int, scale: float) -> np.ndarray:
    """The bytes of a matrix of a type, of random bits; its scales spread by `scale`."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = RANDOM.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    for place in HALVES[kind.name]:
        data[:, place : place + 2] = RANDOM.normal(0, scale, (len(data), 1)).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def random_tensor(kind: str, width: int = 512) -> SimpleNamespace:
    """A matrix [6, width]; the scale of its first block is 0."""
    quantised = gguf.GGMLQuantizationType[kind]
    data = random_blocks(quantised, 6, width, 0.01)
    data[0, :2] = 0
    return SimpleNamespace(tensor_type=quantised, shape=(width, 6), n_elements=6 * width, data=data)


@pytest.mark.parametrize("kind", CARRIED)
def test_blocks_are_the_numbers_of_the_file(kind: str) -> None:
    tensor = random_tensor(kind)
    numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
    found = stored_rows([tensor]).stored(numbers[[4, 0, 1]])
    assert found.bits == (4 if kind.startswith("Q4") else 8)
    allowed = 0 if found.offsets is None else found.offsets.steps.max() / 2 * 1.001
    assert np.abs(found.numbers(512) - numbers[[4, 0, 1]]).max() <= allowed
    assert (found.offsets is None) == (kind in ("Q4_0", "Q5_0", "Q8_0"))


@pytest.mark.parametrize("kind", CARRIED)
@pytest.mark.parametrize("width", [512, 1024])
def test_size_in_the_graph_is_told_from_the_type(kind: str, width: int) -> None:
    tensor = random_tensor(kind, width)
    found = stored_rows([tensor]).stored(gguf.dequantize(tensor.data, tensor.tensor_type)).widened()
    zeros = 0 if found.zero_points is None else found.zero_points.nbytes
    assert bytes_in_graph(tensor) == found.codes.nbytes + found.scales.nbytes + zeros


@pytest.mark.parametrize("width", [576, 1536, 2048])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_graph_takes_little_more_than_the_file(kind: str, width: int) -> None:
    tensor = random_tensor(kind, width)
    assert tensor.data.nbytes < bytes_in_graph(tensor) <= 1.15 * tensor.data.nbytes


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_K"])
def test_offsets_are_columns_for_the_sums_of_blocks(kind: str) -> None:
    tensor = random_tensor(kind)
    numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
    found = stored_rows([tensor]).stored(numbers)
    x = RANDOM.normal(size=(512, 3)).astype(np.float32)
    sums = np.zeros((32, 3), np.float32)
    sums[:16] = x.reshape(16, 32, 3).sum(1)
    wide = np.concatenate([x, *[sums] * (2 if found.bits == 4 else 1)])
    columns = found.widened().numbers(len(wide))
    assert found.widened().offsets is None
    assert np.allclose(columns @ wide, found.numbers(512) @ x, atol=1e-5 * np.abs(columns @ wide).max())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q8_0"])
def test_graph_of_a_file_loses_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = tiny_llama
    if kind == "Q4_K":  # whose blocks are wider than the tiny Llama, and which the gguf package does not write
        wide = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 16}
        model = save_decoder("llama", tmp_path / "wide", **wide)
        monkeypatch.setattr(gguf, "quantize", lambda values, of: random_blocks(of, *values.shape, 0.0003))
    path = write_gguf(model, tmp_path / "model.gguf", kind)
    prepared = open_prepared(path, recipe_of((), STORED))
    folder, tokens = tmp_path / "plain", tokens_of(prepared)
    folder.mkdir()
    prepared.export(Plan.identity(prepared.spec), folder)
    original, stored = (
        DecodeSession(graph, capacity=48, all_positions=True, float_activations=True)
        for graph in (prepared.original, folder)
    )
    # What is left of a minimum is rounded to 8 bits. Those of random blocks of Q4_K are many steps from their range.
    most = {"Q4_0": 1e-7, "Q5_0": 1e-7, "Q8_0": 1e-7, "Q4_K": 1e-3}.get(kind, 1e-4)
    assert measure_quality(original, stored, prepared.text.held_out_windows).kl_mean < most
    in_torch = [module.weight for module in prepared.model.modules() if isinstance(module, Linear | Embedding)]
    assert {row.tobytes() for weight in in_torch for row in weight.detach().numpy()} <= graph_rows(folder)
    assert prepared.weights_like == ("int4" if kind.startswith("Q4") else "int8")
    expected = torch_logits(prepared, tokens)
    stored.reset()
    logits = in_chunks(stored, tokens, [len(tokens) - 4, 1])
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    bits = 4 if kind.startswith("Q4") else 8
    nodes = Counter((node.op_type, node.attributes.get_int("bits", 0)) for node in ir.load(folder / "model.onnx").graph)
    assert nodes["GatherBlockQuantized", bits] == 1
    assert nodes["MatMulNBits", bits] == 4 * prepared.spec.layers + 1
    formats = matrix_formats(folder) or {}
    assert set(formats.values()) == {f"int{bits}, blocks of 32"}
    assert formats_line(formats) == f"{len(formats)} matrices in int{bits}, blocks of 32"
    own_table = not prepared.model.config.tie_word_embeddings
    assert len(formats) == 4 * prepared.spec.layers + 1 + own_table
    assert "model.embed_tokens.weight" in formats or not own_table


def test_types_may_differ_by_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    def kind(name: str) -> str:
        return "Q8_0" if "ffn_down" in name else "F16" if "attn_v" in name else "Q4_1"

    path = write_gguf(tiny_llama, tmp_path / "model.gguf", kind)
    assert resolve(str(path)).block_types == ("Q4_1", "Q8_0")
    prepared, folder = open_prepared(path, recipe_of((), STORED)), tmp_path / "plain"
    folder.mkdir()
    prepared.export(Plan.identity(prepared.spec), folder)
    in_torch = [module.weight for module in prepared.model.modules() if isinstance(module, Linear | Embedding)]
    assert {row.tobytes() for weight in in_torch for row in weight.detach().numpy()} <= graph_rows(folder)
    formats = matrix_formats(folder) or {}
    layers = range(prepared.spec.layers)
    assert {formats[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in layers} == {"int8, blocks of 32"}
    assert {formats[f"model.layers.{layer}.self_attn.v_proj.weight"][:4] for layer in layers} == {"int8"}
    assert {formats[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in layers} == {"int4, blocks of 32"}


def test_other_types_become_eight_bits_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 16}
    model = save_decoder("llama", tmp_path / "wide", **wide)
    monkeypatch.setattr(gguf, "quantize", lambda values, of: random_blocks(of, *values.shape, 0.0003))
    snapshot = resolve(str(write_gguf(model, tmp_path / "model.gguf", "Q6_K")))
    assert snapshot.block_types == ("Q6_K",)
    spec = read_spec(snapshot)
    recipe = recipe_of((), "auto").settled(spec, has_blocks=snapshot.has_blocks)
    assert recipe.weights == STORED
    check_files(snapshot, spec, recipe)
    prepared, folder = open_prepared(snapshot.path, recipe), tmp_path / "plain"
    folder.mkdir()
    prepared.export(Plan.identity(spec), folder)
    assert set((matrix_formats(folder) or {}).values()) == {"int8, blocks of 128"}
    floats = load_model(snapshot).state_dict()
    for name, weight in prepared.model.state_dict().items():
        if name.endswith("_proj.weight"):
            assert (weight - floats[name]).abs().max() < floats[name].abs().max() / 150


@pytest.mark.parametrize(("weights", "again"), [("int4", True), ("stored", False)])
def test_second_rounding_is_told_with_its_cost(tiny_llama: Path, tmp_path: Path, weights: str, again: bool) -> None:
    path = write_gguf(tiny_llama, tmp_path / "model.gguf", "Q4_1")
    manifest = compress(str(path), recipe_of((KvQuant(bits=8),), weights), tmp_path / "out")
    assert manifest.source.blocks == ("Q4_1",)
    assert manifest.report is not None
    told = rounded_again(manifest)
    loss = f"at a KL of {manifest.report.plain.kl_to_original:.2g}"
    assert told == (
        f"weights that the file has in Q4_1 were rounded a second time, {loss}; stored keeps them" if again else None
    )
    for file in ("README.md", "report.html"):
        assert (loss in (tmp_path / "out" / file).read_text()) == again


def test_model_without_blocks_is_refused_before_weights_are_read(tiny_llama: Path, tmp_path: Path) -> None:
    def check(path: Path) -> None:
        snapshot = resolve(str(path))
        check_files(snapshot, read_spec(snapshot), recipe_of((), STORED))

    floats = [
        tiny_llama,
        write_gguf(tiny_llama, tmp_path / "f16.gguf", "F16"),
        write_gguf(tiny_llama, tmp_path / "f32.gguf"),
    ]
    for path in floats:
        with pytest.raises(UsageError, match="and this model has none"):
            check(path)
    check(write_gguf(tiny_llama, tmp_path / "q8.gguf", "Q8_0"))
