"""The files beside the graph from which its clients learn tokens, sampling and file names."""

from __future__ import annotations

import json

import pytest
from support.tiny_artifact import SPEC

from kvslim.caches import FullCache
from kvslim.export.genai import end_tokens, genai_config
from kvslim.export.transformers_js import with_transformers_js_config
from kvslim.types import KVLayout, LayerPlan, Plan

LAYOUT = KVLayout.of(SPEC, Plan.identity(SPEC))
INPUTS = ("input_ids", "attention_mask")
BEYOND = SPEC.vocab_size


def test_genai_config_follows_the_layout() -> None:
    layers = tuple(LayerPlan(layer=layer, cache=FullCache(rank=8)) for layer in range(2))
    layout = KVLayout.of(SPEC, Plan(layers=layers))
    config = genai_config(SPEC, layout, {"bos_token_id": 1, "eos_token_id": [2, 3]}, inputs=INPUTS)
    assert config["model"]["type"] == "decoder"
    assert config["model"]["pad_token_id"] == 2
    assert config["model"]["decoder"]["head_size"] == 8
    assert set(config["model"]["decoder"]["inputs"]) == {*INPUTS, "past_key_names", "past_value_names"}
    assert config["search"]["past_present_share_buffer"] is True
    assert config["search"]["max_length"] == SPEC.max_context


def test_genai_config_keeps_the_buffers_modest_when_the_context_is_long() -> None:
    spec = SPEC.model_copy(update={"max_context": 131072})
    config = genai_config(spec, LAYOUT, {"eos_token_id": 0}, inputs=INPUTS)
    assert config["model"]["context_length"] == 131072
    assert config["search"]["max_length"] == 2048
    assert "bos_token_id" not in config["model"]


@pytest.mark.parametrize("generation", [{}, {"eos_token_id": [BEYOND], "pad_token_id": -1, "bos_token_id": None}])
def test_genai_config_names_no_token_when_the_vocabulary_has_none_of_them(generation: dict[str, object]) -> None:
    model = genai_config(SPEC, LAYOUT, generation, inputs=INPUTS)["model"]
    assert [name for name in model if name.endswith("token_id")] == []


def test_genai_config_samples_as_the_model_asks() -> None:
    generation = {"do_sample": True, "temperature": 0.7, "top_k": None, "repetition_penalty": 1.1}
    search = genai_config(SPEC, LAYOUT, generation, inputs=INPUTS)["search"]
    assert (search["do_sample"], search["temperature"], search["repetition_penalty"]) == (True, 0.7, 1.1)
    assert (search["top_k"], search["top_p"]) == (50, 1.0)


@pytest.mark.parametrize(
    ("generation", "tokenizer", "expected"),
    [(1, 2, [1, 2]), ([1, 2], 2, [1, 2]), (None, 2, [2]), (1, None, [1]), ([], None, []), ([-1, BEYOND], 3, [3])],
)
def test_end_tokens_hold_the_tokenizers_own_once(
    generation: int | list[int] | None, tokenizer: int | None, expected: list[int]
) -> None:
    assert end_tokens(generation, tokenizer, BEYOND) == expected


def test_config_keeps_all_but_the_key_of_transformers_js() -> None:
    own = {"model_type": "llama", "vocab_size": 9, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}
    written = json.loads(with_transformers_js_config(own))
    assert written.pop("transformers.js_config") == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    assert written == {"model_type": "llama", "vocab_size": 9}
