"""`kvslim inspect` on published configs against bytes worked out by hand, and on an artifact's graph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from support.models import export_slim, open_prepared, recipe_of
from support.tiny_artifact import SPEC, fill

from kvslim.cli import app
from kvslim.devices.demand import StoredWeights
from kvslim.devices.profile import load_device
from kvslim.devices.stored_weights import artifact_weights
from kvslim.errors import ArtifactError, UnsupportedError, UsageError
from kvslim.export.manifest import read_manifest
from kvslim.loading.parameters import Parameters, count_parameters
from kvslim.loading.source import read_spec, resolve
from kvslim.methods import KvPca
from kvslim.report.inspect import inspect
from kvslim.report.memory import artifact_caches, cache_memory
from kvslim.report.tables import caches_table, layers_table
from kvslim.runtime.session import DecodeSession
from kvslim.types import KVLayout, LayerPlan, Plan


@dataclass(frozen=True)
class Published:
    """A config as its makers published it, less what no shape depends on, and what follows from it.

    Attributes:
        config: config.json.
        token: Bytes of one token in float32: layers x 2 sides x kv heads x head_dim x 4.
        cache: Bytes of the float32 cache at 4,096 tokens.
        products: Numbers in the matrices of all layers.
        head: Numbers in the output head.
        rest: Numbers in all else.
        rope: Numbers in the graph's cosines and sines, of 32,768 positions at most.
    """

    config: dict[str, Any]
    token: int
    cache: int
    products: int
    head: int
    rest: int
    rope: int


PUBLISHED = {
    "Llama-3.2-1B": Published(
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        token=16 * 2 * 8 * 64 * 4,
        cache=16 * 2 * 8 * 64 * 4 * 4096,
        products=16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192),
        head=128256 * 2048,
        rest=16 * 2 * 2048 + 2048,
        rope=32768 * 64,
    ),
    "Qwen3-0.6B": Published(
        {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        token=28 * 2 * 8 * 128 * 4,
        cache=28 * 2 * 8 * 128 * 4 * 4096,
        products=28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072),
        head=151936 * 1024,
        rest=28 * (2 * 1024 + 2 * 128) + 1024,  # with a norm of queries and one of keys
        rope=32768 * 128,
    ),
    "SmolLM2-135M": Published(
        {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        token=30 * 2 * 3 * 64 * 4,
        cache=30 * 2 * 3 * 64 * 4 * 4096,
        products=30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536),
        head=49152 * 576,
        rest=30 * 2 * 576 + 576,
        rope=8192 * 64,
    ),
    # Layers 5, 11 and 17 see everything; the others 512 tokens, in a cache of 16 rows more.
    "gemma-3-270m": Published(
        {
            "model_type": "gemma3_text",
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(18)],
        },
        token=18 * 2 * 1 * 256 * 4,
        cache=3 * 2 * 256 * 4 * 4096 + 15 * 2 * 256 * 4 * (512 + 16),
        products=18 * (2 * 640 * 1024 + 2 * 640 * 256 + 3 * 640 * 2048),
        head=262144 * 640,
        rest=18 * (4 * 640 + 2 * 256) + 640,
        rope=2 * 32768 * 256,  # one for layers with a window, one for those without
    ),
    "OPT-1.3B": Published(
        {
            "model_type": "opt",
            "hidden_size": 2048,
            "ffn_dim": 8192,
            "word_embed_proj_dim": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
        },
        token=24 * 2 * 32 * 64 * 4,
        cache=24 * 2 * 32 * 64 * 4 * 4096,
        products=24 * (4 * 2048 * 2048 + 2 * 2048 * 8192),
        head=50272 * 2048,
        rest=2050 * 2048 + 24 * (4 * 2048 + 8192 + 2048 + 4 * 2048) + 2 * 2048,  # positions, biases, norms
        rope=0,
    ),
    # All layers see 2,047 tokens; the embedding is not the head.
    "Phi-3-mini-4k": Published(
        {
            "model_type": "phi3",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
        },
        token=32 * 2 * 32 * 96 * 4,
        cache=32 * 2 * 32 * 96 * 4 * (2047 + 16),
        products=32 * (3072 * 9216 + 3072 * 3072 + 3 * 3072 * 8192),
        head=32064 * 3072,
        rest=32064 * 3072 + 32 * 2 * 3072 + 3072,
        rope=4096 * 96,
    ),
}
each_published = pytest.mark.parametrize("name", PUBLISHED)
SMALL = {"fp32": 1, "fp16": 2, "int8": 4, "int4": 8}  # times smaller


def config_only(folder: Path, name: str) -> Path:
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name].config))
    return folder


@each_published
def test_inspect_tells_the_bytes_worked_out_by_hand(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = PUBLISHED[name]
    command = ["inspect", str(config_only(tmp_path, name)), "--weights", "fp32", "--context", "4k", "--json"]
    assert app.run(command) == 0
    memory = json.loads(capsys.readouterr().out)
    weights = (published.products + published.head + published.rest + published.rope) * 4
    for kind, times in SMALL.items():
        assert sum(layer["bytes_per_token"][kind] for layer in memory["layers"]) == published.token // times
        assert memory["kv_bytes_per_token"][kind] == published.cache / times / 4096
    assert memory["mib"]["4096"] == {kind: published.cache / times / 2**20 for kind, times in SMALL.items()}
    assert memory["weights_mib"] == weights / 2**20
    share = {kind: published.cache / times / (published.cache / times + weights) for kind, times in SMALL.items()}
    assert memory["share"]["4096"] == pytest.approx(share, rel=1e-12)


@each_published
def test_parameters_are_those_of_the_published_model(name: str, tmp_path: Path) -> None:
    published, snapshot = PUBLISHED[name], resolve(str(config_only(tmp_path, name)))
    found = count_parameters(snapshot, read_spec(snapshot))
    assert (found.products, found.head) == (published.products, published.head)
    assert found.total - found.products - found.head == published.rest


def test_rows_that_are_looked_up_are_stored_but_not_read() -> None:
    parameters = Parameters(products=3200, head=320, embedding=640, positions=10, others=5, width=1)
    weights = StoredWeights.of(parameters, "int4")
    assert weights.read == (3200 + 320) // 32 * 20.5 + 5 * 4
    assert weights.stored == weights.read + 640 // 32 * 20.5 + 10 * 4
    assert StoredWeights.of(parameters, "fp32").stored == 4 * parameters.total


def test_config_and_graph_agree_on_int4_weights(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of(weights="int4"))
    export_slim(prepared, tmp_path / "plain")
    expected = StoredWeights.of(count_parameters(prepared.snapshot, prepared.spec), "int4")
    found = artifact_weights(tmp_path / "plain", prepared.spec, "int4", expected.stored)
    assert (found.products, found.head, found.width) == (expected.products, expected.head, expected.width)
    assert found.read == pytest.approx(expected.read, rel=0.02)  # equal norms are stored once
    assert found.resident == pytest.approx(expected.resident + prepared.spec.rope_bytes, rel=0.02)


def test_cache_of_an_artifact_has_the_bytes_of_its_graph(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvPca(rank=8, rank_ratio=None),)))
    plan = export_slim(prepared, tmp_path / "slim")
    fill(tmp_path)
    manifest = read_manifest(tmp_path).model_copy(
        update={"spec": prepared.spec, "plan": plan, "kv_layout": KVLayout.of(prepared.spec, plan)}
    )
    plain, slim = artifact_caches(manifest)
    assert slim.bytes_at(100) == DecodeSession(tmp_path / "slim", capacity=100).layout.bytes_at(100)
    assert plain.bytes_at(100) == 2 * slim.bytes_at(100)


def test_a_layer_without_attention_has_no_cache(tmp_path: Path) -> None:
    fill(tmp_path)
    plan = Plan(layers=(LayerPlan(layer=0, heads=()), LayerPlan(layer=1)))
    manifest = read_manifest(tmp_path).model_copy(update={"plan": plan, "kv_layout": KVLayout.of(SPEC, plan)})
    memory = cache_memory(SPEC, artifact_caches(manifest), "fp32", 100, [64])
    assert memory.layers[0].heads == 0
    assert memory.layers[0].bytes_per_token == {"plain": 2 * 2 * 16 * 4, "as it is": 0}
    assert memory.kv_bytes_per_token["plain"] == 2 * memory.kv_bytes_per_token["as it is"]


def test_artifact_with_devices_shows_the_gain(tmp_path: Path) -> None:
    fill(tmp_path)
    write_graph(tmp_path / "model.onnx")
    memory = inspect(str(tmp_path), [256], None, [load_device("raspberry-pi-5-8gb")])
    plain, slim = memory.devices
    assert (plain.cache, slim.cache) == ("plain", "as it is")
    for before, after in zip(plain.stages, slim.stages, strict=True):
        assert after.demand.bytes_per_token < before.demand.bytes_per_token
    decode = slim.stages[-1].demand
    cache = 256 * (2 * 4 * 8 + 2 * 4 * 16 * 4)  # for each of 4 query heads
    assert decode.bytes_per_token == 64 * 257 * 4 + 96 * 2 * 20 + cache
    assert decode.flops_per_token == 2 * (64 * 257 + 96 * 64) + 2 * 4 * 256 * (2 * 8 + 2 * 16)


def write_graph(path: Path) -> None:
    """A graph that nobody runs: a lookup, a quantised product with scales, and a head."""
    constants = [
        helper.make_tensor("table", TensorProto.FLOAT, [257, 64], bytes(257 * 64 * 4), raw=True),
        helper.make_tensor("codes", TensorProto.UINT8, [96, 2, 16], bytes(96 * 2 * 16), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT, [96, 2], bytes(96 * 2 * 4), raw=True),
        helper.make_tensor("head", TensorProto.FLOAT, [64, 257], bytes(64 * 257 * 4), raw=True),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=64, N=96),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "still", [], [], constants)), path)


def test_artifact_refuses_another_kind_of_weights(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(UsageError, match="stored already"):
        inspect(str(tmp_path), [64], "int4", [])


def test_artifact_without_a_graph_to_read_is_broken(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(ArtifactError, match="graph"):
        inspect(str(tmp_path), [64], None, [load_device("raspberry-pi-5-8gb")])


def test_weights_are_sized_as_compress_stores_them(tmp_path: Path) -> None:
    folder = str(config_only(tmp_path, "SmolLM2-135M"))
    found, int4 = (inspect(folder, [64], kind, []) for kind in (None, "int4"))
    assert (found.weights, found.weights_mib) == ("int4", int4.weights_mib)


def test_encoders_have_no_device_limits(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = {"model_type": "bert", "vocab_size": 100, "architectures": ["BertModel"], **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    memory = inspect(str(tmp_path), [64], "int8", [])
    assert (memory.layers, memory.mib["64"]["fp32"], memory.share["64"]["fp32"]) == ((), 0, 0)
    with pytest.raises(UnsupportedError, match="encoder"):
        inspect(str(tmp_path), [64], None, [load_device("raspberry-pi-5-8gb")])


def test_tables_show_devices_and_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_only(tmp_path, "SmolLM2-135M")
    devices = ("--device", "raspberry-pi-5-8gb", "--device", "phone-8gb")
    assert app.run(["inspect", str(folder), "--weights", "int4", "--context", "1k,8k", *devices]) == 0
    out = capsys.readouterr().out
    assert out.count("training at 8,192") == 2
    assert "training at 1,024" not in out
    assert out.count("8,192 (positions)") == 6
    assert "decode at 1,024" in out
    assert "weights: 84.3 MiB, int4" in out


@pytest.mark.parametrize(("name", "expected"), [("SmolLM2-135M", ["4096", "8192"]), ("Phi-3-mini-4k", ["4096"])])
def test_contexts_nobody_asked_for_are_within_the_positions(name: str, expected: list[str], tmp_path: Path) -> None:
    assert list(inspect(str(config_only(tmp_path, name)), None, None, []).mib) == expected


def test_last_lines_answer_for_each_device_and_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_only(tmp_path, "Llama-3.2-1B")
    devices = ("--device", "raspberry-pi-4-4gb", "--device", "laptop-16gb")
    command = ["inspect", str(folder), "--weights", "int4", "--context", "16k,64k", *devices]
    assert app.run(command) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.partition(":")[0] for line in lines] == [
        f"{tokens} tokens on {device}"
        for device in ("Raspberry Pi 4, 4 GB", "laptop, 16 GB")
        for tokens in ("16,384", "65,536")
    ]
    # 0.86 GiB of packed weights, 0.16 of the table, 0.09 of the runtime, 0.14 of activations, and a cache of 64 KiB a
    # token, read for 32 heads, not 8; with int8 a quarter of it and 0.16 GiB for a layer's rows in float32
    assert "plain 2.2 GiB, up to 2.52 tokens/s; balanced and lossless 1.7 GiB, up to 3.85 tokens/s" in lines[0]
    assert "plain does not fit (5.2 GiB)" in lines[1]
    assert app.run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipes"] == {"balanced": "int8", "lossless": "int8", "small": "int4"}
    assert [entry["cache"] for entry in found["devices"]] == ["fp32", "int8", "int4"] * 2
    rate = {entry["cache"]: 1 / entry["stages"][-1]["seconds_per_token"] for entry in found["devices"][:3]}
    prompt = {entry["cache"]: entry["stages"][-2]["seconds_per_token"] for entry in found["devices"][:3]}
    assert rate["fp32"] < rate["int4"] < rate["int8"] < 2 * rate["fp32"]
    assert prompt["fp32"] < prompt["int8"] == prompt["int4"]


def test_devices_are_named_where_none_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["inspect", str(config_only(tmp_path, "SmolLM2-135M"))]) == 0
    assert "raspberry-pi-5-8gb" in capsys.readouterr().err
    assert app.run(["inspect", str(tmp_path), "--device", "laptop-8gb"]) == 0
    assert "--device" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "rows"),
    [("SmolLM2-135M", ["0-29"]), ("gemma-3-270m", ["0-4, 6-10, 12-16", "5, 11, 17"]), ("Phi-3-mini-4k", ["0-31"])],
)
def test_layers_that_are_alike_share_a_row(name: str, rows: list[str], tmp_path: Path) -> None:
    memory = inspect(str(config_only(tmp_path, name)), [4096], None, [])
    assert [row[0] for row in layers_table(memory).rows] == [*rows, "all together"]
    assert len(memory.layers) == PUBLISHED[name].config["num_hidden_layers"]


def test_recipes_have_rows_beside_fp32_and_fp16(tmp_path: Path) -> None:
    memory = inspect(str(config_only(tmp_path, "SmolLM2-135M")), [4096, 8192], "int4", [])
    rows = {row[0]: row[1:] for row in caches_table(memory).rows}
    assert list(rows) == ["plain", "fp16", "balanced and lossless", "small"]
    assert rows["plain"][:4] == ("fp32", "46,080", "1.00x", "0.50x")
    assert rows["small"][:4] == ("int4", "5,760", "8.00x", "4.00x")
    assert rows["balanced and lossless"] == ("int8", "11,520", "4.00x", "2.00x", "45.0 (35%)", "90.0 (52%)")
