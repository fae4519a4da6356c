"""What people give in place of a model that can be read: each is recognised before weights are, with what helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_artifact import fill
from support.tiny_gguf import write_gguf

from kvslim.cli import app
from kvslim.errors import NotFoundError, UnsupportedError
from kvslim.loading.architecture import architecture_of
from kvslim.loading.model import load_model
from kvslim.loading.source import read_spec, resolve

USAGE, BROKEN, MISSING = 2, 4, 5
Tensors = dict[str, torch.Tensor]
CONFIG = "config.json"


class Place:
    """A folder to put things in, and a tiny Llama to copy.

    Args:
        root: The folder.
        tiny: The model.
    """

    def __init__(self, root: Path, tiny: Path) -> None:
        self.root, self.tiny = root, tiny

    def file(self, name: str, content: str | bytes = b"") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def model(self, name: str = "model") -> Path:
        return Path(shutil.copytree(self.tiny, self.root / name))

    def instead(self, *files: str) -> Path:
        """The model with these files in place of its weights."""
        folder = self.model()
        (folder / "model.safetensors").unlink()
        for name in files:
            self.file(f"model/{name}")
        return folder

    def pointer(self) -> Path:
        folder = self.model()
        text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        (folder / "model.safetensors").write_text(text)
        return folder

    def artifact(self) -> Path:
        folder = self.root / "artifact"
        folder.mkdir()
        fill(folder)
        return folder

    def gguf(self, **metadata: Any) -> Path:
        return write_gguf(self.tiny, self.root / "a.gguf", **metadata)

    def config(self, **config: Any) -> Path:
        return self.file(f"model/{CONFIG}", json.dumps(config)).parent

    def stored(self, edit: Callable[[Tensors], Tensors]) -> Path:
        """The model with its tensors as `edit` gives them."""
        folder = self.model()
        tensors = edit(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {new + name.removeprefix(old): tensor for name, tensor in tensors.items()}


def with_(name: str, tensor: torch.Tensor | None = None) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(4, 4) if tensor is None else tensor}


def emptied(tensors: Tensors) -> Tensors:
    return {name: torch.zeros(0) if "mlp" in name else tensor for name, tensor in tensors.items()}


def in_int8(tensors: Tensors) -> Tensors:
    return {name: tensor.mul(99).to(torch.int8) if "mlp" in name else tensor for name, tensor in tensors.items()}


def as_gptq(tensors: Tensors) -> Tensors:
    return {
        name.replace("proj.weight", "proj.qweight"): tensor.int() if "proj" in name else tensor
        for name, tensor in tensors.items()
    }


SEES = {"text_config": {"model_type": "llama"}, "vision_config": {}}
QWEIGHT = r"qweight' holds codes of GPTQ or AWQ"
CASES: dict[str, tuple[Callable[[Place], Path], int, str, str]] = {
    # where the model should be
    "artifact": (lambda p: p.artifact(), USAGE, "an artifact of KVSlim", "made from: "),
    "hub_cache": (lambda p: p.file("hub/models--org--name/refs/main").parents[2], MISSING, "hub's cache", "org/name"),
    "hub_home": (lambda p: p.file("hub/models--a--b-c/refs/main").parents[3], MISSING, "hub's cache", "a/b-c"),
    "hub_repository": (
        lambda p: p.file("models--a--b/snapshots/12ab/config.json").parents[2],
        MISSING,
        "one model of the hub's cache",
        "snapshots/12ab",
    ),
    "training_run": (lambda p: p.model("run/checkpoint-20").parent, MISSING, "a training run", "checkpoint-20"),
    "folder_around": (lambda p: p.model("outer/inner").parent, MISSING, "a model inside", "outer/inner"),
    "weights_alone": (
        lambda p: p.model() / "model.safetensors",
        MISSING,
        "not a model folder",
        "the folder that holds",
    ),
    "graph_alone": (lambda p: p.file("a.onnx"), MISSING, "not a model folder", "exported from"),
    "archive": (lambda p: p.file("model.tar.gz"), MISSING, "not a model folder", "unpack it"),
    "deepspeed": (
        lambda p: p.instead("zero_to_fp32.py", "global_step9/a.pt"),
        MISSING,
        "DeepSpeed checkpoint",
        "python zero_to_fp32.py",
    ),
    "fsdp": (lambda p: p.instead("pytorch_model_fsdp_0/__0_0.distcp"), MISSING, "FSDP checkpoint", "merge them"),
    "of_its_maker": (
        lambda p: p.instead("consolidated.00.pth", "params.json"),
        MISSING,
        "the model's maker",
        "convert",
    ),
    "flax": (lambda p: p.instead("flax_model.msgpack"), MISSING, "Flax weights", "from_flax=True"),
    "onnx_export": (lambda p: p.instead("onnx/model.onnx"), MISSING, "an ONNX export", "exported from"),
    "openvino": (
        lambda p: p.instead("openvino_model.xml", "openvino_model.bin"),
        MISSING,
        "an OpenVINO export",
        "exported from",
    ),
    "executorch": (lambda p: p.instead("model.pte"), MISSING, "an ExecuTorch export", "exported from"),
    "shards_alone": (
        lambda p: p.instead("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        MISSING,
        "shards without their index",
        "add model.safetensors.index.json",
    ),
    "half_precision": (
        lambda p: p.instead("model.fp16.safetensors"),
        MISSING,
        "safetensors of another name",
        "name the file model.safetensors",
    ),
    "pickles": (lambda p: p.instead("pytorch_model-00001-of-00002.bin"), MISSING, "can run code", "save_pretrained"),
    "pointer": (lambda p: p.pointer(), BROKEN, "a pointer of Git LFS", "git lfs pull"),
    "gguf_of_an_adapter": (lambda p: p.gguf(general__type="adapter"), BROKEN, "no model but 'adapter'", "merged"),
    "gguf_that_sees": (lambda p: p.gguf(general__type="mmproj"), BROKEN, "no model but 'mmproj'", "own file"),
    # kinds of models
    "llava": (
        lambda p: p.config(model_type="llava", **SEES),
        BROKEN,
        "parts that see",
        "language model alone, a llama",
    ),
    "idefics": (lambda p: p.config(model_type="idefics3"), BROKEN, "parts that see or hear", "gemma3, mistral3"),
    "hears": (lambda p: p.config(model_type="qwen2_audio"), BROKEN, "parts that see or hear", "qwen2_5_vl"),
    "new_and_sees": (lambda p: p.config(model_type="seer", **SEES), BROKEN, "parts that see", "language model alone"),
    "t5": (lambda p: p.config(model_type="t5"), BROKEN, "an encoder and writes with a decoder", "a decoder alone"),
    "whisper": (lambda p: p.config(model_type="whisper"), BROKEN, "writes with a decoder", "a decoder alone"),
    "mamba": (lambda p: p.config(model_type="mamba2"), BROKEN, "layers that keep a state", "layers all have attention"),
    "jamba": (lambda p: p.config(model_type="jamba"), BROKEN, "layers that keep a state", "all have attention"),
    "lfm2": (lambda p: p.config(model_type="lfm2"), BROKEN, "layers that keep a state", "all have attention"),
    "qwen3_next": (
        lambda p: p.config(model_type="qwen3_next"),
        BROKEN,
        "layers that keep a state",
        "all have attention",
    ),
    "rwkv": (lambda p: p.config(model_type="rwkv"), BROKEN, "layers that keep a state", "all have attention"),
    "new_hybrid": (
        lambda p: p.config(model_type="hydra", layer_types=["full_attention", "delta"]),
        BROKEN,
        "layers that keep a state",
        "all have attention",
    ),
    "experts": (lambda p: p.config(model_type="mixtral"), BROKEN, "a mixture of experts", "dense"),
    "rope_unknown": (
        lambda p: p.config(model_type="llama", rope_scaling={"type": "su", "factor": 2.0}),
        BROKEN,
        "'su' is not known",
        "longrope",
    ),
    # tensors
    "compiled": (lambda p: p.stored(renamed("", "_orig_mod.")), BROKEN, "inside torch.compile", "model._orig_mod"),
    "parallel": (lambda p: p.stored(renamed("", "module.")), BROKEN, "DataParallel", "model.module"),
    "fsdp_names": (
        lambda p: p.stored(renamed("model", "model._fsdp_wrapped_module")),
        BROKEN,
        "FSDP",
        "full state dict",
    ),
    "value_head": (lambda p: p.stored(renamed("", "pretrained_model.")), BROKEN, "TRL", "model.pretrained_model"),
    "adapted": (lambda p: p.stored(renamed("", "base_model.model.")), BROKEN, "an adapter that is not merged", "merge"),
    "lora": (lambda p: p.stored(with_("model.layers.0.mlp.up_proj.lora_A.default.weight")), BROKEN, "adapter", "merge"),
    "zero3": (lambda p: p.stored(emptied), BROKEN, "6 tensors are empty", "zero_to_fp32.py"),
    "wrapped": (lambda p: p.stored(renamed("", "language_model.")), BROKEN, "also sees", "text_config"),
    "vision": (lambda p: p.stored(with_("model.visual.patch_embed.weight")), BROKEN, "also sees", "text_config"),
    "gptq": (lambda p: p.stored(as_gptq), BROKEN, QWEIGHT, "put the quantization_config back"),
    "nf4": (lambda p: p.stored(with_("lm_head.weight.absmax")), BROKEN, "codes of bitsandbytes", "quantization_config"),
    "mlx": (lambda p: p.stored(with_("lm_head.biases")), BROKEN, "codes of MLX", "quantization_config"),
    "hqq": (lambda p: p.stored(with_("lm_head.W_q")), BROKEN, "codes of HQQ", "quantization_config"),
    "fp8": (lambda p: p.stored(with_("lm_head.weight_scale")), BROKEN, "codes of FP8", "quantization_config back"),
    "int8": (lambda p: p.stored(in_int8), BROKEN, "holds whole numbers", "quantization_config"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_model_is_answered_by_what_helps(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, code, message, fix = CASES[name]
    model = make(Place(tmp_path, tiny_llama))
    assert app.run(["compress", str(model), "-o", str(tmp_path / "out")]) == code
    lines = capsys.readouterr().err.splitlines()[-3:]
    assert message in lines[0]
    assert fix in lines[2]
    assert "download" not in lines[2] or name == "pointer"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "close"),
    [("lama", "llama"), ("qwen_3", "qwen3"), ("gpt-neox", "gpt_neox"), ("starcoder-2", "starcoder2")],
)
def test_slip_in_the_name_of_a_family_is_corrected(name: str, close: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        architecture_of(name)
    assert error.value.fix == f"did you mean {close!r}?"


@pytest.mark.parametrize("name", ["gemma4", "qwen4", "olmo", "mixtral", "bloom", "cohere2", "llama4_text", "phi5"])
def test_another_family_is_no_slip(name: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        architecture_of(name)
    assert error.value.fix.startswith("supported: gemma, gemma2")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("old", [{"type": "su"}, {"type": "yarn"}, {"rope_type": "su", "type": "su"}])
def test_longrope_is_known_by_its_first_names(
    tiny_model: Callable[[str], Path], tmp_path: Path, key: str, old: dict[str, str]
) -> None:
    model = tiny_model("phi3-long")
    raw = json.loads((model / CONFIG).read_text())
    rope = raw.pop("rope_parameters")
    raw["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    factors = {name: rope[name] for name in ("short_factor", "long_factor")}
    (shutil.copytree(model, tmp_path / "old") / CONFIG).write_text(json.dumps({**raw, key: {**factors, **old}}))
    snapshot = resolve(str(tmp_path / "old"))
    for context in (None, 2048):
        assert read_spec(snapshot, context) == read_spec(resolve(str(model)), context)
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(load_model(snapshot)(tokens).logits, load_model(resolve(str(model)))(tokens).logits)


@pytest.mark.parametrize(
    "page",
    ["https://huggingface.co/org/name", "huggingface.co/org/name/tree/main", "https://hf.co/org/name?library=gguf"],
)
def test_page_of_a_model_is_answered_by_its_id(page: str) -> None:
    with pytest.raises(NotFoundError) as error:
        resolve(page)
    assert error.value.fix == "give the hub id: org/name"


@pytest.mark.parametrize("name", ["", "gone/", "/gone", "./a/b", "~/gone", "a/b/c", "a//b", "a/b.gguf"])
def test_what_cannot_be_an_id_is_not_looked_for_on_the_hub(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tiny_llama)
    with pytest.raises(NotFoundError, match="is not a model folder"):
        resolve(name)


def test_folder_that_could_be_an_id_is_not_looked_for_on_the_hub_when_it_is_gone(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "models/mine")
    (tmp_path / "models/sha256-12ab").write_bytes(write_gguf(tiny_llama, tmp_path / "a.gguf").read_bytes())
    found = [resolve(name) for name in ("models/mine", "models/sha256-12ab")]
    shutil.rmtree("models")
    for snapshot in found:
        with pytest.raises(NotFoundError, match="is not a model folder"):
            resolve(snapshot.model)


def test_gguf_is_known_by_its_first_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, tmp_path / "a.gguf").rename(tmp_path / "sha256-12ab")
    assert read_spec(resolve(str(path))) == read_spec(resolve(str(tiny_llama)))
