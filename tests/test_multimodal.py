"""The language part of models that also see computes what the whole computes for text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import open_prepared, recipe_of
from support.tiny_decoders import HEADS, byte_tokenizer

from kvslim.errors import UnsupportedError
from kvslim.loading.model import load_model
from kvslim.loading.source import read_spec, resolve
from kvslim.types import KVLayout, Plan

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
SEES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
QWEN_SEES = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
WHOLES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "gemma3": ({**HEADS, "sliding_window": 16}, {**SEES, "image_size": 16, "patch_size": 4}, "gemma3_text"),
    "mistral3": (
        {**HEADS, "model_type": "mistral", "sliding_window": None},
        {**SEES, "model_type": "pixtral"},
        "mistral",
    ),
    "qwen2_vl": ({**HEADS, "rope_parameters": MROPE}, QWEN_SEES, "qwen2"),
    "qwen2_5_vl": ({**HEADS, "rope_parameters": MROPE}, {**QWEN_SEES, "out_hidden_size": 64}, "qwen2"),
    "qwen3_vl": (
        {**HEADS, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        {**QWEN_SEES, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
        "qwen3",
    ),
}
each_whole = pytest.mark.parametrize("kind", WHOLES)


def save_whole(kind: str, folder: Path) -> Any:
    """A tiny random model that sees, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, sees, _ = WHOLES[kind]
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        kind, text_config={**text, "vocab_size": len(tokenizer), "initializer_range": 0.1}, vision_config=sees
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@each_whole
def test_language_part_computes_what_the_whole_does_for_text(kind: str, tmp_path: Path) -> None:
    whole = save_whole(kind, tmp_path)
    snapshot = resolve(str(tmp_path))
    assert read_spec(snapshot).model_type == WHOLES[kind][2]
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        found, expected = load_model(snapshot)(tokens).logits, whole(input_ids=tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("old", [True, False])
def test_names_of_older_files_are_known(old: bool, tmp_path: Path) -> None:
    whole = save_whole("gemma3", tmp_path)
    prefixes = ("language_model.model.", "language_model.") if old else ("model.language_model.", "")
    named = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        part = name.split("language_model.", 1)
        named[name if len(part) == 1 else prefixes[0] + part[1].removeprefix("model.")] = tensor
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    found = load_model(resolve(str(tmp_path))).state_dict()
    assert torch.equal(found["model.norm.weight"], whole.model.language_model.norm.weight)


def test_flat_config_of_qwen2_vl_is_read(tmp_path: Path) -> None:
    flat = {**HEADS, "model_type": "qwen2_vl", "vocab_size": 257, "tie_word_embeddings": True, "eos_token_id": 5}
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    (tmp_path / "config.json").write_text(json.dumps({**flat, **rope, "vision_config": QWEN_SEES}))
    config = resolve(str(tmp_path)).config()
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert (config["model_type"], config["tie_word_embeddings"], config["eos_token_id"]) == ("qwen2", True, 5)
    assert config["architectures"] == ["Qwen2ForCausalLM"]


def test_artifact_is_that_of_a_language_model(tmp_path: Path) -> None:
    save_whole("qwen3_vl", tmp_path / "model")
    prepared = open_prepared(tmp_path / "model", recipe_of())
    layout = KVLayout.of(prepared.spec, Plan.identity(prepared.spec))
    (tmp_path / "slim").mkdir()
    prepared.write_companions(tmp_path / "slim", layout, ("input_ids", "attention_mask"))
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    assert "vision_config" not in config


@pytest.mark.parametrize("kind", ["mllama", "paligemma", "qwen3_vl_moe"])
def test_models_whose_text_part_differs_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "text_config": {"model_type": "llama"}}))
    with pytest.raises(UnsupportedError, match=repr(kind)):
        read_spec(resolve(str(tmp_path)))
