"""Values of config.json and generation_config.json: refused by name before weights are read, or read as meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvslim.calibrate.own_text import start_token
from kvslim.cli import app
from kvslim.errors import ModelError
from kvslim.loading.generation import generation_config
from kvslim.loading.model import load_model, load_tokenizer
from kvslim.loading.parameters import count_parameters
from kvslim.loading.source import read_spec, resolve
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.types import KVLayout, Plan

BROKEN = 4
CONFIG, GENERATION = "config.json", "generation_config.json"
ModelOf = Callable[[str], Path]


def changed(folder: Path, out: Path, file: str, changes: dict[str, Any]) -> Path:
    """A copy of a model with other values in a JSON file."""
    shutil.copytree(folder, out)
    (out / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))
    return out


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **values}}


REFUSED: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    # family, file, changes, key, words
    "end_is_text": ("llama", CONFIG, {"eos_token_id": "</s>"}, "eos_token_id", "expected int or list or null"),
    "end_is_text_in_list": ("qwen2", CONFIG, {"eos_token_id": [3, "4"]}, "eos_token_id", "expected"),
    "start_is_a_share": ("gpt2", CONFIG, {"bos_token_id": 0.5}, "bos_token_id", "expected"),
    "no_window_by_zero": ("mistral", CONFIG, {"sliding_window": 0}, "sliding_window", "null is no window"),
    "window_negative": ("gemma2", CONFIG, {"sliding_window": -1}, "sliding_window", "null is no window"),
    "window_of_qwen": (
        "qwen3",
        CONFIG,
        {"sliding_window": 0, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
        "sliding_window",
        "null is no window",
    ),
    "window_huge": ("mistral", CONFIG, {"sliding_window": 10**20}, "sliding_window", "too large"),
    "window_lacking": ("gemma2", CONFIG, {"sliding_window": None}, "sliding_window", "layer_types names layers"),
    "epsilon_infinite": ("qwen2", CONFIG, {"rms_norm_eps": float("inf")}, "rms_norm_eps", "not a finite number"),
    "epsilon_negative": ("gpt_neox", CONFIG, {"layer_norm_eps": -1e-5}, "layer_norm_eps", "not be negative"),
    "theta_of_zero": ("llama", CONFIG, rope(rope_theta=0.0), "rope_theta", "must be positive"),
    "theta_is_null": ("llama", CONFIG, rope(rope_theta=None), "rope_theta", "not a number"),
    "theta_is_text": ("qwen3", CONFIG, rope(rope_theta="1e6"), "rope_theta", "not a number"),
    "factor_negative": ("llama", CONFIG, rope(rope_type="linear", factor=-2.0), "factor", "must be positive"),
    "rotated_share_of_two": ("stablelm", CONFIG, rope(partial_rotary_factor=2.0), "partial_rotary_factor", "at most 1"),
    "factors_of_longrope": (
        "phi3-long",
        CONFIG,
        rope(rope_type="longrope", short_factor=[1.0] * 7 + [0.0], long_factor=[4.0] * 8),
        "short_factor",
        "must be positive",
    ),
    "activation_unknown": ("starcoder2", CONFIG, {"hidden_act": "gelu_best"}, "hidden_act", "no activation"),
    "scale_of_queries": ("gemma3_text", CONFIG, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar", "positive"),
    "multiplier_not_a_number": (
        "granite",
        CONFIG,
        {"residual_multiplier": float("nan")},
        "residual_multiplier",
        "not a finite number",
    ),
    "no_hidden_size": ("llama", CONFIG, {"hidden_size": 0}, "hidden_size", "must be positive"),
    "no_heads": ("gpt2", CONFIG, {"n_head": 0}, "n_head", "must be positive"),
    "no_heads_of_keys": ("mistral", CONFIG, {"num_key_value_heads": 0}, "num_key_value_heads", "must be positive"),
    "heads_without_size": ("qwen3", CONFIG, {"head_dim": 0}, "head_dim", "must be positive"),
    "layers_negative": ("gpt_neox", CONFIG, {"num_hidden_layers": -1}, "num_hidden_layers", "must be positive"),
    "inner_size_negative": ("opt", CONFIG, {"ffn_dim": -96}, "ffn_dim", "must be positive"),
    "half_a_token": ("gemma", CONFIG, {"vocab_size": 256.5}, "vocab_size", "not a whole number"),
    "sizes_of_layers": ("llama", CONFIG, {"intermediate_size": [96, 96]}, "intermediate_size", "not a whole number"),
    "theta_is_a_list": ("olmo2", CONFIG, rope(rope_theta=[1e4]), "rope_theta", "not a number"),
    "share_is_an_object": ("phi", CONFIG, rope(partial_rotary_factor={}), "partial_rotary_factor", "not a number"),
    "theta_below_float32": ("llama", CONFIG, rope(rope_theta=1e-310), "rope_theta", "too small"),
    "softcap_below_float32": ("gemma2", CONFIG, {"final_logit_softcapping": 1e-60}, "final_logit_softcapping", "small"),
    "multiplier_beyond_float32": ("granite", CONFIG, {"residual_multiplier": 1e60}, "residual_multiplier", "too large"),
    "dropout_of_more_than_all": ("gpt2", CONFIG, {"attn_pdrop": 1.5}, "attn_pdrop", "at most 1"),
    "generated_end_is_text": ("llama", GENERATION, {"eos_token_id": "<|im_end|>"}, "eos_token_id", "whole number"),
    "generated_end_in_list": ("llama", GENERATION, {"eos_token_id": [1, None]}, "eos_token_id", "whole number"),
    "generated_pad_is_a_list": ("llama", GENERATION, {"pad_token_id": [1]}, "pad_token_id", "whole number"),
    "generated_start_is_true": ("llama", GENERATION, {"bos_token_id": True}, "bos_token_id", "whole number"),
    "sampling_hot": ("llama", GENERATION, {"temperature": "0.7"}, "temperature", "not a number"),
    "sampling_infinite": ("llama", GENERATION, {"temperature": float("inf")}, "temperature", "not a finite number"),
    "sampling_half_a_token": ("llama", GENERATION, {"top_k": 2.5}, "top_k", "not a whole number"),
    "sampling_over_all": ("llama", GENERATION, {"top_p": 1.5}, "top_p", "at most 1"),
    "sampling_negative": ("llama", GENERATION, {"min_p": -0.1}, "min_p", "not be negative"),
    "sampling_maybe": ("llama", GENERATION, {"do_sample": "yes"}, "do_sample", "neither true nor false"),
    "penalty_below_float32": ("llama", GENERATION, {"repetition_penalty": 1e-310}, "repetition_penalty", "too small"),
    "penalty_of_zero": ("llama", GENERATION, {"repetition_penalty": 0}, "repetition_penalty", "must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_value_that_cannot_be_is_refused_by_name_before_weights_are_read(
    tiny_model: ModelOf, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    family, file, changes, key, words = REFUSED[name]
    model = changed(tiny_model(family), tmp_path / "model", file, changes)
    (model / "model.safetensors").write_bytes(b"read too early")
    assert app.run(["compress", str(model), "-o", str(tmp_path / "out")]) == BROKEN
    error = capsys.readouterr().err
    assert f"error: {key} is " in error
    assert f"where: {model / file}: {key}\n" in error
    assert words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("token", [-1, 999])
def test_padding_token_that_positions_are_counted_from_must_be_in_the_vocabulary(tmp_path: Path, token: int) -> None:
    raw = {
        "model_type": "roberta",
        "pad_token_id": token,
        "vocab_size": 99,
        "num_attention_heads": 4,
        "hidden_size": 64,
    }
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=f"pad_token_id is {token}: positions are counted"):
        read_spec(resolve(str(tmp_path)))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_generation_config_that_is_no_object_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    model = changed(tiny_llama, tmp_path / "model", CONFIG, {})
    (model / GENERATION).write_text(text)
    assert app.run(["compress", str(model), "-o", str(tmp_path / "out")]) == BROKEN
    assert f"where: {model / GENERATION}\n" in capsys.readouterr().err


ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "no_start": ("llama", {"bos_token_id": -1}),
    "no_pad": ("qwen2", {"pad_token_id": -1}),
    "pad_beyond": ("llama", {"pad_token_id": 257}),
    "no_end": ("gpt2", {"eos_token_id": [-1], "bos_token_id": None}),
    "tuples": ("llama", {"return_dict": False, "use_return_dict": False}),
    "flash": ("qwen3", {"_attn_implementation": "flash_attention_2"}),
    "flash_by_its_other_name": ("gpt2", {"attn_implementation": "flash_attention_3"}),
    "half": ("llama", {"torch_dtype": "torch.float16"}),
    "half_by_its_other_name": ("mistral", {"dtype": "torch.bfloat16"}),
    "states": ("gpt_neox", {"output_hidden_states": True, "output_attentions": True, "use_cache": False}),
    "window_of_no_use": ("qwen2", {"sliding_window": 0, "use_sliding_window": False}),
    "window_unread": ("llama", {"sliding_window": 4}),
    "window_unread_of_any_type": ("gpt2", {"sliding_window": "none"}),
    "heads_unread": ("gpt_neox", {"head_dim": 99}),
    "kinds_unread": ("mistral", {"layer_types": ["full_attention"] * 2}),
    "kv_heads_unread": ("gpt2", {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_value_that_changes_nothing_changes_nothing(tiny_model: ModelOf, tmp_path: Path, name: str) -> None:
    family, changes = ACCEPTED[name]
    expected, snapshot = (
        resolve(str(tiny_model(family))),
        resolve(str(changed(tiny_model(family), tmp_path / "model", CONFIG, changes))),
    )
    snapshot.check()
    assert read_spec(snapshot) == read_spec(expected)
    assert count_parameters(snapshot, read_spec(snapshot)) == count_parameters(expected, read_spec(expected))
    assert load_tokenizer(snapshot)("a b").input_ids == load_tokenizer(expected)("a b").input_ids
    found, tokens = load_model(snapshot), torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(found(tokens).logits, load_model(expected)(tokens).logits)
    assert 0 <= start_token(found.config) < found.config.vocab_size


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"top_k": 1, "do_sample": False},
        {"temperature": 0.0, "do_sample": None},
        {"length_penalty": 0.8, "early_stopping": True},
    ],
)
def test_generation_config_that_transformers_would_not_save_is_kept(
    prepared: PreparedDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    monkeypatch.setattr(prepared.model, "generation_config", generation_config({"eos_token_id": 9, **values}, "a file"))
    prepared.write_companions(tmp_path, KVLayout.of(prepared.spec, Plan.identity(prepared.spec)), ("input_ids",))
    written = json.loads((tmp_path / GENERATION).read_text())
    assert written["eos_token_id"] == [9, prepared.tokenizer.eos_token_id]
    assert {key: written.get(key) for key in values} == values
    search = json.loads((tmp_path / "genai_config.json").read_text())["search"]
    assert all(search[key] == value for key, value in values.items() if key in search and value is not None)


def test_negative_tokens_of_a_generation_config_are_none() -> None:
    found = generation_config({"eos_token_id": [7, -1], "bos_token_id": -1, "pad_token_id": -100}, "a file")
    assert (found.eos_token_id, found.bos_token_id, found.pad_token_id) == ([7], None, None)
    assert generation_config({"eos_token_id": [-1]}, "a file").eos_token_id is None
