"""Loading weights: one file or shards, any stored type, and nothing of it left after release."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import open_prepared, recipe_of
from transformers import AutoModelForCausalLM

from kvslim.errors import ModelError
from kvslim.loading.model import load_model
from kvslim.loading.source import resolve


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model in bfloat16, in several files."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.generation_config.max_length = 77
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def test_weights_are_the_stored_ones_in_float32_when_bfloat16_in_shards(sharded: Path) -> None:
    loaded = load_model(resolve(str(sharded)))
    expected = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    assert loaded.generation_config.max_length == 77
    assert not loaded.training
    found = loaded.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor)


def test_model_is_refused_when_a_shard_is_missing(sharded: Path) -> None:
    max(sharded.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="which is not a"):
        load_model(resolve(str(sharded)))


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_model_is_gone_after_release(tiny_model: Callable[[str], Path], family: str) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of())
    model = weakref.ref(prepared.model)
    prepared.release()
    gc.collect()
    assert model() is None
