"""Stored weights that are not those of the model, or that nobody trained, are refused by name; idle ones are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_codes import fp8_whole, write_codes
from support.tiny_encoders import save_encoder

from kvslim import memory
from kvslim.errors import ModelError
from kvslim.loading.model import load_encoder, load_model
from kvslim.loading.source import read_spec, resolve

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], Any]
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.1.mlp"
SAVED_CONFIG = "config.json that was saved with these weights"


def edited(folder: Path, out: Path, edit: Edit, **changes: Any) -> Path:
    """A copy of a model whose tensors went through `edit`, which changes them in place, and its config with changes."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def added(name: str, *shape: int) -> Edit:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def scaled(name: str, factor: float, shift: float = 0.0) -> Edit:
    return lambda tensors: tensors[name].mul_(factor).add_(shift)


def inside(*fronts: str) -> Edit:
    """The names that a tool writes which saves a module of its own, with the model in it."""

    def edit(tensors: Tensors) -> None:
        stored = dict(tensors)
        tensors.clear()
        tensors.update({front + name: tensor.clone() for front in fronts for name, tensor in stored.items()})

    return edit


def in_float8(tensors: Tensors) -> None:
    """Codes of float8 whose scales are gone too."""
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = (weight * 448 / weight.abs().max()).to(torch.float8_e4m3fn)


BROKEN: dict[str, tuple[Edit, dict[str, Any], str, str]] = {
    "bias": (added(f"{MLP}.down_proj.bias", 64), {}, "does not use: .*down_proj.bias", SAVED_CONFIG),
    "value_head": (added("v_head.summary.weight", 1, 64), {}, "1 tensor is stored .*v_head", SAVED_CONFIG),
    "norm": (added(f"{ATTENTION}.q_norm.weight", 16), {}, "q_norm", SAVED_CONFIG),
    "layer": (lambda _: None, {"num_hidden_layers": 1}, r"9 tensors are stored .*layers\.1\.", "has 1 layers"),
    "scale": (added(f"{ATTENTION}.q_proj.weight_scale_2"), {}, "weight_scale_2", "quantization_config"),
    "scales_of_rows": (added(f"{MLP}.up_proj.scales", 96), {}, "up_proj.scales", "quantization_config"),
    "hidden_size": (lambda _: None, {"intermediate_size": 128}, r"has shape \[64, 96\]", SAVED_CONFIG),
    "vocabulary": (lambda _: None, {"vocab_size": 270}, r"asks for \[270, 64\]", "set vocab_size to 257"),
    "lacking": (lambda tensors: tensors.pop("model.norm.weight"), {}, "1 weight is missing", SAVED_CONFIG),
    "head": (lambda tensors: tensors.pop("lm_head.weight"), {}, "1 weight is missing", "tie_word_embeddings to true"),
    "in_ema": (inside("ema_model."), {}, "parts of something larger, 'ema_model'$", "the part that is the model alone"),
    "in_policy": (inside("policy.net."), {}, "something larger, 'policy.net'$", "the part that is the model alone"),
    "in_two": (inside("teacher.", "student."), {}, "larger, 'student' and 'teacher'$", "is the model alone"),
    "rows_of_the_head": (
        lambda tensors: tensors.update({"lm_head.weight": torch.ones(264, 64)}),
        {},
        r"\[264, 64\], and config.json asks for \[257, 64\]",
        SAVED_CONFIG,
    ),
    "norm_of_zeros": (scaled("model.norm.weight", 0), {}, "model.norm.* makes all zeros", "trained"),
    "norm_of_a_layer": (scaled("model.layers.1.input_layernorm.weight", 0), {}, r"1\.input_.* all zeros", "trained"),
    "zero": (scaled(f"{ATTENTION}.o_proj.weight", 0), {}, "nobody trained .*o_proj.* all zero", "trained"),
    "constant": (scaled(f"{MLP}.gate_proj.weight", 0, 0.02), {}, "gate_proj.* all alike", "trained"),
    "vanishing": (scaled("model.embed_tokens.weight", 1e-12), {}, "embed_tokens.* all alike", "trained"),
    "large": (scaled("lm_head.weight", 1e4), {}, r"lm_head.* spread by 99", "trained"),
    "overflowing": (scaled(f"{MLP}.up_proj.weight", 1e30), {}, r"up_proj.* spread by 1e\+29", "trained"),
    "norm_of_millions": (scaled("model.norm.weight", 1e7), {}, r"norm.* an entry is 1e\+07", "trained"),
    "codes": (in_float8, {}, "spread by .* without their scales", "trained"),
    "infinite": (scaled("model.norm.weight", torch.inf), {}, "not finite, first 'model.norm", "diverged"),
}


@pytest.mark.parametrize("room", [2**40, 0], ids=["in memory", "mapped"])
@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_are_not_the_models_are_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, room: int
) -> None:
    monkeypatch.setattr(memory, "usable_memory", lambda: room)
    edit, config, message, fix = BROKEN[name]
    snapshot = resolve(str(edited(tiny_llama, tmp_path / "model", edit, **config)))
    with pytest.raises(ModelError, match=message) as error:
        load_model(snapshot)
    assert fix in error.value.fix
    assert error.value.where == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {"n_embd": 2**20}), ("llama", {"hidden_size": 2**20}), ("gpt_neox", {"intermediate_size": 2**40})],
)
def test_other_shapes_are_refused_before_there_is_room_for_them(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, changes: dict[str, int]
) -> None:
    snapshot = resolve(str(edited(tiny_model(family), tmp_path / "model", lambda _: None, **changes)))
    with pytest.raises(ModelError, match=r"has shape .*, and config.json asks for") as error:
        load_model(snapshot)
    assert SAVED_CONFIG in error.value.fix


@pytest.mark.parametrize("quantization", [None, {}])
def test_codes_are_refused_when_the_config_no_longer_tells_of_their_scales(
    tiny_llama: Path, tmp_path: Path, quantization: Any
) -> None:
    write_codes(tiny_llama, tmp_path / "model", quantization, fp8_whole)
    with pytest.raises(ModelError, match=r"14 tensors are stored .*weight_scale_inv") as error:
        load_model(resolve(str(tmp_path / "model")))
    assert "put the quantization_config of the weights back" in error.value.fix


def test_codes_are_refused_when_the_scale_of_one_of_them_is_lost(tiny_llama: Path, tmp_path: Path) -> None:
    quantization = {"quant_method": "fp8", "weight_block_size": None}
    write_codes(tiny_llama, tmp_path / "codes", quantization, fp8_whole)
    lost = edited(tmp_path / "codes", tmp_path / "model", lambda tensors: tensors.pop(f"{MLP}.up_proj.weight"))
    with pytest.raises(ModelError, match="1 weight is missing"):
        load_model(resolve(str(lost)))


def test_norm_of_zeros_is_one_that_passes_all_on_where_the_family_adds_one(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = edited(tiny_model("gemma"), tmp_path / "model", scaled("model.norm.weight", 0))
    assert load_model(resolve(str(model))).model.norm(torch.ones(1, 64)).all()


IDLE: dict[str, tuple[str, Edit]] = {
    "rope": ("llama", added(f"{ATTENTION}.rotary_emb.inv_freq", 8)),
    "rope_tables": ("llama", added(f"{ATTENTION}.rotary_emb.cos_cached", 1, 1, 2048, 16)),
    "masks": ("gpt2", added("transformer.h.0.attn.masked_bias")),
    "triangles": ("gpt2", added("transformer.h.1.attn.bias", 1, 1, 2048, 2048)),
    "rope_of_neox": ("gpt_neox", added("gpt_neox.layers.0.attention.rotary_emb.inv_freq", 8)),
}


@pytest.mark.parametrize("name", IDLE)
def test_buffers_that_follow_from_the_config_may_be_stored(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    family, edit = IDLE[name]
    found = load_model(resolve(str(edited(tiny_model(family), tmp_path / "model", edit)))).state_dict()
    expected = load_model(resolve(str(tiny_model(family)))).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_scales_of_inputs_and_caches_may_be_stored_beside_those_of_weights(tiny_llama: Path, tmp_path: Path) -> None:
    quantization = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    expected = write_codes(tiny_llama, tmp_path / "codes", quantization, fp8_whole)

    def add(tensors: Tensors) -> None:
        tensors |= {f"{ATTENTION}.{name}": torch.tensor(0.5) for name in ("q_proj.input_scale", "k_proj.k_scale")}

    found = load_model(resolve(str(edited(tmp_path / "codes", tmp_path / "model", add)))).state_dict()
    torch.testing.assert_close(found[f"{ATTENTION}.q_proj.weight"], expected[f"{ATTENTION}.q_proj.weight"])


@pytest.mark.parametrize("head", ["pooler.dense", "cls.seq_relationship", "bert.pooler.dense"])
def test_encoders_may_store_heads_but_nothing_else_that_is_idle(tmp_path: Path, head: str) -> None:
    model = save_encoder("bert", "feature-extraction", tmp_path / "bert")
    kept, strange = (
        edited(model, tmp_path / name, added(f"{name}.weight", 64, 64)) for name in (head, "encoder.layer.2.extra")
    )
    spec = read_spec(resolve(str(kept)))
    found = load_encoder(resolve(str(kept)), spec).state_dict()
    assert torch.equal(
        found["encoder.layer.1.output.dense.weight"],
        load_file(model / "model.safetensors")["encoder.layer.1.output.dense.weight"],
    )
    with pytest.raises(ModelError, match="extra"):
        load_encoder(resolve(str(strange)), spec)
