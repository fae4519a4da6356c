"""GGUF files: the same model as from safetensors, whole artifacts, and clear errors for what cannot be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import open_prepared, recipe_of
from support.tiny_decoders import save_decoder
from support.tiny_gguf import TEMPLATE, TURN_END, write_gguf

from kvslim.cli import app
from kvslim.errors import ModelError, UnsupportedError, UsageError
from kvslim.loading.files import POINTER
from kvslim.loading.model import load_model, load_tokenizer
from kvslim.loading.source import read_spec, resolve
from kvslim.runtime.generate import load_tokenizer as artifact_tokenizer
from kvslim.runtime.template import ChatTemplate
from kvslim.types import KVLayout, Plan

FAMILIES = ("llama", "llama-yarn", "qwen2", "qwen3", "phi3", "phi3-long", "gpt2", "stablelm")
# What a GGUF does not say has the value that llama.cpp gives it.
UNSAID = {
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "starcoder2": {"sliding_window": None},
}


@pytest.fixture
def gguf(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama in float32, alone in a folder."""
    (tmp_path / "model").mkdir()
    return write_gguf(tiny_llama, tmp_path / "model" / "tiny.gguf")


@pytest.mark.parametrize("family", [*FAMILIES, *UNSAID])
def test_model_is_that_of_the_safetensors_when_a_gguf_holds_the_same_weights(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = save_decoder(family, tmp_path / "model", **UNSAID[family]) if family in UNSAID else tiny_model(family)
    from_gguf, from_folder = resolve(str(write_gguf(folder, tmp_path / "x.gguf"))), resolve(str(folder))
    assert read_spec(from_gguf) == read_spec(from_folder)
    from_gguf.check()
    found, expected = load_model(from_gguf), load_model(from_folder)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=2e-7)  # Gemma's norms plus one
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(found(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-4)


def test_weights_are_equal_to_the_bit_when_stored_in_float32(gguf: Path, tiny_llama: Path) -> None:
    found, expected = load_model(resolve(str(gguf))).state_dict(), load_model(resolve(str(tiny_llama))).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_rope_of_llama_3_is_recovered_from_its_divisors(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama-3-rope"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"original_max_position_embeddings": 8192, "factor": 32.0}
    (folder / "config.json").write_text(json.dumps(config))
    snapshot = resolve(str(write_gguf(folder, tmp_path / "x.gguf")))
    assert snapshot.config()["rope_parameters"] == config["rope_parameters"]


def test_divisors_of_another_rope_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama-3-rope"), tmp_path / "x.gguf")  # its original context is 256, not 8,192
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        read_spec(resolve(str(path)))


def test_quantised_tensors_are_what_the_gguf_package_makes_of_them(tiny_llama: Path, tmp_path: Path) -> None:
    import gguf as package

    path = write_gguf(tiny_llama, tmp_path / "x.gguf", "Q8_0")
    found = load_model(resolve(str(path))).state_dict()["model.layers.1.mlp.down_proj.weight"]
    stored = load_model(resolve(str(tiny_llama))).state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    kind = package.GGMLQuantizationType.Q8_0
    expected = package.dequantize(package.quantize(stored, kind), kind)
    assert 0 < abs(expected - stored).max() < 0.01
    assert (found.numpy() == expected).all()


def test_artifact_is_the_same_to_the_byte_and_whole(gguf: Path, tiny_llama: Path, tmp_path: Path) -> None:
    for model, name in ((gguf, "a"), (tiny_llama, "b")):
        prepared, folder = open_prepared(model, recipe_of()), tmp_path / name
        plan = Plan.identity(prepared.spec)
        folder.mkdir()
        inputs = prepared.export(plan, folder)
        prepared.write_companions(folder, KVLayout.of(prepared.spec, plan), inputs)
    a, b = tmp_path / "a", tmp_path / "b"
    for name in ("model.onnx", "model.onnx_data"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert ChatTemplate.exists(a)
    assert artifact_tokenizer(a).encode("a b").ids == artifact_tokenizer(b).encode("a b").ids
    end = json.loads((b / "generation_config.json").read_text())["eos_token_id"]
    assert json.loads((a / "generation_config.json").read_text())["eos_token_id"] == [end, TURN_END]
    assert json.loads((a / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_digest_is_that_of_the_file_alone(gguf: Path) -> None:
    before = resolve(str(gguf)).sha256
    (gguf.parent / "config.json").write_text("{}")
    assert resolve(str(gguf)).sha256 == before
    gguf.write_bytes(gguf.read_bytes()[:-1] + b"x")
    assert resolve(str(gguf)).sha256 != before


def test_tokenizer_and_template_come_from_the_file_even_if_others_lie_beside_it(gguf: Path) -> None:
    (gguf.parent / "tokenizer.json").write_text("{}")
    (gguf.parent / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    tokenizer = load_tokenizer(resolve(str(gguf)))
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer("a b\n").input_ids) == "a b\n"


def test_sampling_of_the_file_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    settings = {"general__sampling__temp": 0.5, "general__sampling__top_k": 7}
    generation = resolve(str(write_gguf(tiny_llama, tmp_path / "x.gguf", **settings))).generation_config()
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 0.5, 7)


def test_folder_with_one_gguf_is_that_file(gguf: Path) -> None:
    (gguf.parent / "mmproj-tiny.gguf").write_bytes(b"a tower that sees")
    assert resolve(str(gguf.parent)).path == gguf


def test_folder_with_several_ggufs_asks_for_one(gguf: Path) -> None:
    shutil.copyfile(gguf, gguf.parent / "other.gguf")
    with pytest.raises(UsageError, match=r"several GGUF files: other\.gguf, tiny\.gguf") as error:
        resolve(str(gguf.parent))
    assert f"{gguf.parent}/other.gguf" in error.value.fix


def test_file_on_the_hub_carries_its_name_and_revision(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def download(repo_id: str, filename: str, *, revision: str | None) -> str:
        asked.extend((repo_id, filename, revision))
        return str(gguf)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    snapshot = resolve("org/name:sub/tiny.gguf@v2")
    assert asked == ["org/name", "sub/tiny.gguf", "v2"]
    assert (snapshot.path, snapshot.model, snapshot.revision) == (gguf, "org/name:sub/tiny.gguf", "v2")


@pytest.mark.parametrize(
    ("kept", "why"), [(3, ""), *((kept, "it ends too early") for kept in (0, 20, 700, -64))], ids=str
)
def test_truncated_file_is_refused_before_weights_are_read(gguf: Path, kept: int, why: str) -> None:
    gguf.write_bytes(gguf.read_bytes()[:kept])
    snapshot = resolve(str(gguf))
    with pytest.raises(ModelError, match=f"the GGUF file cannot be read: {why}"):
        read_spec(snapshot)
        snapshot.check()


def test_big_endian_file_is_told_as_such_and_can_be_read_when_it_is_turned(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gguf.scripts import gguf_convert_endian

    def turned(order: str) -> None:
        monkeypatch.setattr("sys.argv", ["gguf-convert-endian", str(gguf), order])
        monkeypatch.setattr("builtins.input", lambda _: "YES")
        gguf_convert_endian.main()

    little = gguf.read_bytes()
    turned("big")
    assert app.run(["inspect", str(gguf)]) == UnsupportedError.exit_code
    error = capsys.readouterr().err
    assert "this GGUF file is big-endian" in error
    assert "gguf-convert-endian COPY.gguf little" in error
    turned("little")
    assert gguf.read_bytes() == little


def test_pointer_of_git_lfs_is_told_from_a_broken_file(gguf: Path) -> None:
    gguf.write_bytes(POINTER + b"/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match="a pointer of Git LFS") as error:
        read_spec(resolve(str(gguf)))
    assert "git lfs pull" in error.value.fix


def test_architecture_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    import gguf as package

    writer = package.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="architecture 'mamba'"):
        read_spec(resolve(str(tmp_path / "x.gguf")))


def test_mixture_of_experts_in_a_gguf_is_refused_as_such(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, tmp_path / "x.gguf", llama__expert_count=8)
    with pytest.raises(UnsupportedError, match="mixture of experts"):
        read_spec(resolve(str(path)))


def test_part_of_a_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, tmp_path / "x.gguf", split__count=3)
    with pytest.raises(UnsupportedError, match="one part of a model"):
        read_spec(resolve(str(path)))


def test_folder_with_parts_of_a_model_is_refused_as_such(tiny_llama: Path, tmp_path: Path) -> None:
    for number in (2, 1):
        write_gguf(tiny_llama, tmp_path / f"x-{number:05}-of-00002.gguf", split__count=2)
        with pytest.raises(UnsupportedError, match="one part of a model"):
            read_spec(resolve(str(tmp_path)))


def test_quantisation_in_place_of_a_file_on_the_hub_is_refused_before_the_network() -> None:
    with pytest.raises(UsageError, match="'Q4_K_M' is not the name of") as error:
        resolve("org/name:Q4_K_M")
    assert "org/name:FILE.gguf" in error.value.fix


def test_tokenizer_that_is_not_known_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, tmp_path / "x.gguf", tokenizer__ggml__model="rwkv")
    with pytest.raises(UnsupportedError, match="tokenizers of kind 'rwkv'"):
        resolve(str(path)).check()


def test_tensor_that_the_family_has_no_place_for_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    sinks = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    with pytest.raises(UnsupportedError, match=r"no place for tensor 'blk\.0\.attn_sinks\.weight'"):
        load_model(resolve(str(write_gguf(tiny_llama, tmp_path / "x.gguf", more=sinks))))


def test_text_starts_as_the_file_says(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, tmp_path / "x.gguf", tokenizer__ggml__add_bos_token=True)
    load_tokenizer(resolve(str(path))).save_pretrained(tmp_path / "saved")
    start = json.loads((tiny_llama / "config.json").read_text())["bos_token_id"]
    assert artifact_tokenizer(tmp_path / "saved").encode("a").ids[0] == start


def test_tensor_type_that_cannot_be_read_is_refused_by_name(gguf: Path, tiny_llama: Path, tmp_path: Path) -> None:
    import gguf as package

    writer = package.GGUFWriter(tmp_path / "x.gguf", "llama")
    kind = package.GGMLQuantizationType.Q8_K
    writer.add_tokenizer_model("gpt2")
    writer.add_tensor("token_embd.weight", np.zeros((2, package.GGML_QUANT_SIZES[kind][1]), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="type Q8_K cannot be read"):
        resolve(str(tmp_path / "x.gguf")).check()


def test_inspect_tells_the_same_of_a_gguf_as_of_the_folder(
    gguf: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for model in (gguf, tiny_llama):
        assert app.run(["inspect", str(model), "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
