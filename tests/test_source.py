"""From what the user typed to a snapshot and its spec."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvslim.demo import MODEL_DIR
from kvslim.errors import NotFoundError, UnsupportedError
from kvslim.loading import source
from kvslim.loading.architecture import ARCHITECTURES, architecture_of
from kvslim.loading.source import read_spec, resolve


def config_folder(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_demo_is_the_model_in_the_package() -> None:
    snapshot = resolve("demo")
    assert snapshot.path == MODEL_DIR
    assert snapshot.is_demo


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "../x", "a/b/c", "nowhere"])
def test_name_that_cannot_be_a_hub_id_is_refused_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_from_hub", None)
    with pytest.raises(NotFoundError):
        resolve(name)


def test_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="cannot get 'someone/model' from the hub"):
        resolve("someone/model")


@pytest.mark.parametrize(
    ("config", "heads", "kv_heads", "head_dim", "windows"),
    [
        (
            {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3},
            9,
            3,
            64,
            {None},
        ),
        (
            {"model_type": "qwen3", "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
            16,
            8,
            128,
            {None},
        ),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}, 32, 32, 128, {None}),
        ({"model_type": "gpt2"}, 12, 12, 64, {None}),
        ({"model_type": "mistral", "sliding_window": 4096}, 32, 8, 128, {4096}),
        ({"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096}, 32, 8, 128, {None}),
        ({"model_type": "gemma2"}, 8, 4, 256, {4096, None}),
    ],
)
def test_spec_comes_from_the_config_alone(
    tmp_path: Path, config: dict[str, Any], heads: int, kv_heads: int, head_dim: int, windows: set[int | None]
) -> None:
    spec = read_spec(resolve(str(config_folder(tmp_path, **config))))
    assert (spec.q_heads, spec.kv_heads, spec.head_dim) == (heads, kv_heads, head_dim)
    assert set(spec.windows) == windows
    assert len(spec.windows) == spec.layers


def test_every_architecture_names_modules_that_exist(tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    for family, architecture in ARCHITECTURES.items():
        model = AutoModelForCausalLM.from_pretrained(tiny_model(family))
        attention = model.get_submodule(f"{architecture.layers}.0.{architecture.attention}")
        for name in (architecture.query, architecture.key, architecture.value, architecture.output):
            assert attention.get_submodule(name).weight is not None
        if architecture.rotary is not None:
            assert "RotaryEmbedding" in type(model.get_submodule(architecture.rotary)).__name__


LONGROPE = {
    "model_type": "phi3",
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 48,
        "long_factor": [2.0] * 48,
        "original_max_position_embeddings": 4096,
    },
}


@pytest.mark.parametrize(("context", "expected"), [(None, 4096), (4096, 4096), (8192, 131072)])
def test_longrope_serves_the_context_that_is_wanted(tmp_path: Path, context: int | None, expected: int) -> None:
    assert read_spec(resolve(str(config_folder(tmp_path, **LONGROPE))), context).max_context == expected


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mixtral", "num_local_experts": 8},
        {"model_type": "qwen3_moe", "num_experts": 128},
        {"model_type": "deepseek_v3", "n_routed_experts": 64},
    ],
)
def test_mixtures_of_experts_are_refused_as_such(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="mixture of experts"):
        read_spec(resolve(str(config_folder(tmp_path, **config))))


def test_unknown_family_suggests_the_closest() -> None:
    with pytest.raises(UnsupportedError) as error:
        architecture_of("lama")
    assert "'llama'" in error.value.fix


def test_model_is_refused_when_its_rope_changes_with_the_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = config_folder(tmp_path, model_type="qwen2", rope_parameters=rope)
    with pytest.raises(UnsupportedError, match="dynamic") as error:
        read_spec(resolve(str(folder)))
    assert "with default in its place" in error.value.fix
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    scaled, plain = (
        Qwen2RotaryEmbedding(Qwen2Config(rope_parameters={**rope, "rope_type": kind}))
        for kind in ("dynamic", "default")
    )
    assert scaled.inv_freq.equal(plain.inv_freq)


def test_model_is_refused_when_it_looks_ahead(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, model_type="gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedError, match="bidirectional attention"):
        read_spec(resolve(str(folder)))
