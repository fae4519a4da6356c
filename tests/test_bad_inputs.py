"""Bad inputs, one row each: the exit code, a word of the message, and no trace of an output folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from support.tiny_artifact import fill
from support.tiny_gguf import write_gguf

from kvslim.caches import Cache, FullCache, SharedCache, WindowCache
from kvslim.cli import app
from kvslim.export.manifest import MANIFEST
from kvslim.types import LayerPlan, Plan

ROOT = Path(__file__).parent.parent
USAGE, BROKEN, MISSING = 2, 4, 5
SMALL = ("calibration.samples=2", "calibration.length=16", "validation.samples=2", "validation.length=32")


SMALL_SETTINGS = tuple(part for override in SMALL for part in ("--set", override))
ENCODER = json.dumps(
    {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 257,
    }
)
GPTQ = {"quant_method": "gptq", "bits": 4}
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)) + "bomb: *a39\n"
PROFILE = """name: mine
ram_gib: {value: 8, source: a}
usable_share: {value: 0.5, source: a}
bandwidth_gb_s: {value: 20, source: a}
gflops: {value: 100, source: a}
"""


class Trap:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("a pickle was loaded",)


@dataclass(frozen=True)
class Inputs:
    """A folder to spoil things in."""

    root: Path
    tiny: Path

    def file(self, name: str, content: str | bytes = "") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def model(self, without: str = "", **files: str | bytes) -> Path:
        """A copy of the tiny model, less a file or with others in place: `config_json` stands for config.json."""
        folder = self.root / "model"
        shutil.copytree(self.tiny, folder, ignore=shutil.ignore_patterns(without) if without else None)
        for name, content in files.items():
            self.file(f"model/{name.replace('_json', '.json').replace('_safetensors', '.safetensors')}", content)
        return folder

    def config(self, **changes: Any) -> Path:
        config = json.loads((self.tiny / "config.json").read_text())
        return self.model(config_json=json.dumps({**config, **changes}))

    def truncated_weights(self) -> Path:
        return self.model(model_safetensors=(self.tiny / "model.safetensors").read_bytes()[:-1000])

    def truncated_gguf(self) -> Path:
        path = write_gguf(self.tiny, self.root / "a.gguf")
        path.write_bytes(path.read_bytes()[:-64])
        return path

    def artifact(self, **files: str | bytes) -> Path:
        """An artifact whose graph is garbage, with the files of a tokenizer."""
        folder = self.root / "artifact"
        folder.mkdir()
        for name in ("tokenizer.json", "generation_config.json"):
            shutil.copyfile(self.tiny / name, folder / name)
        fill(folder)
        for name, content in files.items():
            self.file(f"artifact/{name.replace('_', '.')}", content)
        return folder

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        return path

    def without(self, name: str) -> Path:
        folder = self.artifact()
        (folder / name).unlink()
        return folder

    def utf16_manifest(self) -> Path:
        folder = self.artifact()
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text(), encoding="utf-16")
        return folder

    def rope(self, **parameters: Any) -> Path:
        return self.config(rope_parameters={"rope_theta": 10000.0, **parameters})

    def pickled(self) -> Path:
        folder = self.model("model.safetensors")
        self.file("model/pytorch_model.bin", pickle.dumps(Trap()))
        return folder

    def sharded(self, index: str) -> Path:
        folder = self.model("model.safetensors")
        self.file("model/pytorch_model.bin", pickle.dumps(Trap()))
        self.file("model/model.safetensors.index.json", index)
        return folder

    def nan_weights(self) -> Path:
        tensors = load_file(self.tiny / "model.safetensors")
        next(iter(tensors.values()))[0] = np.nan
        return self.model(model_safetensors=save(tensors, {"format": "pt"}))

    def device(self, text: str) -> list[object]:
        return self.inspect(self.file("mine.yaml", text))

    def profile(self, line: str) -> list[object]:
        """A device's profile with one line in place of its own, or more than its own."""
        key = line.partition(":")[0]
        kept = [own for own in PROFILE.splitlines() if not own.startswith(f"{key}:")]
        return self.device("\n".join([*kept, line]))

    def inspect(self, device: object) -> list[object]:
        return ["inspect", self.tiny, "--device", device]

    def recipe(self, text: str) -> list[object]:
        return self.compress("-r", self.file("mine.yaml", text))

    def settings(self, *overrides: str) -> list[object]:
        return self.compress(*(part for override in overrides for part in ("--set", override)))

    def calibration(self, name: str, content: str | bytes, *overrides: str) -> list[object]:
        return self.settings(f"calibration.source={self.file(name, content)}", *overrides)

    def plan(self, plan: str | Plan) -> list[object]:
        text = plan if isinstance(plan, str) else plan.model_dump_json()
        return self.compress("--plan", self.file("plan.json", text))

    def compress(self, *options: object, model: object = None, out: object = None) -> list[object]:
        return ["compress", model or self.tiny, "-o", out or self.root / "out", *options]


def layers(*ranks: int) -> Plan:
    return Plan(layers=tuple(LayerPlan(layer=index, cache=FullCache(rank=rank)) for index, rank in enumerate(ranks)))


def planned(cache: Cache | None = None, heads: tuple[int, ...] | None = None) -> Plan:
    """Layer 1 with these entries; layer 0 is kept."""
    return Plan(layers=(LayerPlan(layer=0), LayerPlan(layer=1, cache=cache or FullCache(), heads=heads)))


def cached(cache: object) -> str:
    """The JSON of a plan whose layer 0 has that cache."""
    return json.dumps({"layers": [{"layer": 0, "cache": cache}]})


Case = Callable[[Inputs], list[object]]
CASES: dict[str, tuple[Case, int, str]] = {
    # the model
    "model_missing": (lambda i: i.compress(model="./nowhere"), MISSING, "'./nowhere' is not a model folder"),
    "model_is_a_file": (lambda i: i.compress(model=i.file("model.bin")), MISSING, "not a model folder"),
    "model_without_config": (lambda i: i.compress(model=i.model("config.json")), MISSING, "no config.json"),
    "config_not_json": (lambda i: i.compress(model=i.model(config_json="{'a'")), BROKEN, "not JSON"),
    "config_not_text": (lambda i: i.compress(model=i.model(config_json=b"\xff\xfe")), BROKEN, "not JSON"),
    "config_a_list": (lambda i: i.compress(model=i.model(config_json="[]")), BROKEN, "model_type"),
    "config_without_type": (lambda i: i.compress(model=i.model(config_json="{}")), BROKEN, "model_type"),
    "config_of_wrong_type": (lambda i: i.compress(model=i.config(num_hidden_layers="two")), BROKEN, "config.json"),
    "config_with_no_layers": (lambda i: i.compress(model=i.config(num_hidden_layers=0)), BROKEN, "config.json"),
    "family_unknown": (lambda i: i.compress(model=i.config(model_type="lama")), BROKEN, "'llama'"),
    "family_unsupported": (lambda i: i.compress(model=i.config(model_type="mamba")), BROKEN, "mamba"),
    "heads_do_not_divide": (lambda i: i.compress(model=i.config(num_key_value_heads=3)), BROKEN, "kv heads"),
    "head_dim_odd": (lambda i: i.compress(model=i.config(head_dim=12)), BROKEN, "head_dim"),
    "weights_missing": (lambda i: i.compress(model=i.model("model.safetensors")), MISSING, "model.safetensors"),
    "weights_truncated": (lambda i: i.compress(model=i.truncated_weights()), BROKEN, "weights"),
    "weights_garbage": (lambda i: i.compress(model=i.model(model_safetensors=b"\0" * 99)), BROKEN, "weights"),
    "weights_of_other_shape": (lambda i: i.compress(model=i.config(intermediate_size=128)), BROKEN, "weights"),
    "weights_of_fewer_layers": (lambda i: i.compress(model=i.config(num_hidden_layers=3)), BROKEN, "weights"),
    "tokenizer_missing": (lambda i: i.compress(model=i.model("tokenizer*")), BROKEN, "tokenizer"),
    "tokenizer_broken": (lambda i: i.compress(model=i.model(tokenizer_json="{")), BROKEN, "tokenizer"),
    "model_named_nothing": (lambda i: i.compress(model=i.root / ""), MISSING, "no config.json"),
    "model_id_malformed": (lambda i: i.compress(model="a/b c"), MISSING, "a/b c"),
    "config_too_deep": (lambda i: i.compress(model=i.model(config_json="[" * 100_000)), BROKEN, "not JSON"),
    "config_a_folder": (lambda i: i.compress(model=i.folder("model/config.json").parent), MISSING, "no config.json"),
    "config_vocabulary_of_0": (lambda i: i.compress(model=i.config(vocab_size=0)), BROKEN, "config.json"),
    "config_positions_negative": (lambda i: i.compress(model=i.config(max_position_embeddings=-1)), BROKEN, "config"),
    "config_heads_of_0": (lambda i: i.compress(model=i.config(num_attention_heads=0)), BROKEN, "config.json"),
    "config_kv_heads_negative": (lambda i: i.compress(model=i.config(num_key_value_heads=-2)), BROKEN, "config.json"),
    "config_rope_no_mapping": (lambda i: i.compress(model=i.config(rope_parameters=[1])), BROKEN, "config.json"),
    "config_rope_unknown": (lambda i: i.compress(model=i.rope(rope_type="spiral")), BROKEN, "spiral"),
    "config_rope_dynamic": (lambda i: i.compress(model=i.rope(rope_type="dynamic", factor=2.0)), BROKEN, "dynamic"),
    "config_mixture_of_experts": (
        lambda i: i.compress(model=i.config(num_local_experts=8)),
        BROKEN,
        "mixture of experts",
    ),
    "config_huge": (
        lambda i: i.compress(model=i.config(hidden_size=2**40, vocab_size=2**40)),
        BROKEN,
        "no model can be built",
    ),
    "config_of_an_encoder": (lambda i: i.compress(model=i.model(config_json=ENCODER)), BROKEN, "-r encoder"),
    "weights_pickled": (lambda i: i.compress(model=i.pickled()), MISSING, "safetensors"),
    "weights_nan": (lambda i: i.compress(*SMALL_SETTINGS, model=i.nan_weights()), BROKEN, "not finite"),
    "weights_left_over": (lambda i: i.compress(model=i.config(num_hidden_layers=1)), BROKEN, "does not use"),
    "weights_empty": (lambda i: i.compress(model=i.model(model_safetensors=b"")), BROKEN, "weights"),
    "weights_header_huge": (lambda i: i.compress(model=i.model(model_safetensors=b"\xff" * 64)), BROKEN, "weights"),
    "index_not_json": (lambda i: i.compress(model=i.sharded("{")), BROKEN, "index"),
    "index_without_map": (lambda i: i.compress(model=i.sharded("{}")), BROKEN, "index"),
    "index_no_mapping": (lambda i: i.compress(model=i.sharded("[]")), BROKEN, "index"),
    "index_leads_out": (
        lambda i: i.compress(model=i.sharded('{"weight_map": {"a": "../x.safetensors"}}')),
        BROKEN,
        "index",
    ),
    "index_names_no_file": (
        lambda i: i.compress(model=i.sharded('{"weight_map": {"a": "b.safetensors"}}')),
        BROKEN,
        "b.safe",
    ),
    "index_names_a_pickle": (
        lambda i: i.compress(model=i.sharded('{"weight_map": {"a": "pytorch_model.bin"}}')),
        BROKEN,
        "index",
    ),
    "generation_config_broken": (
        lambda i: i.compress(model=i.model(generation_config_json="{")),
        BROKEN,
        "generation_config.json is not JSON",
    ),
    "gguf_missing": (lambda i: i.compress(model="models/mine.gguf"), MISSING, "models/mine.gguf"),
    "gguf_garbage": (lambda i: i.compress(model=i.file("a.gguf", "GGUF")), BROKEN, "GGUF file cannot be read"),
    "gguf_truncated": (lambda i: i.compress(model=i.truncated_gguf()), BROKEN, "GGUF file cannot be read"),
    "gguf_several": (lambda i: i.compress(model=i.file("a.gguf", i.file("b.gguf").name).parent), USAGE, "a.gguf, b"),
    "codes_unknown": (
        lambda i: i.compress(model=i.config(quantization_config={"quant_method": "gptq"})),
        BROKEN,
        "gptq",
    ),
    "adapter_without_base": (lambda i: i.compress(model=i.file("l/adapter_config.json", "{}").parent), BROKEN, "base"),
    "adapter_broken": (lambda i: i.compress(model=i.file("l/adapter_config.json", "{").parent), BROKEN, "not JSON"),
    # the recipe
    "recipe_unknown": (lambda i: i.compress("-r", "balancd"), MISSING, "'balanced'"),
    "recipe_not_yaml": (lambda i: i.recipe("methods: ["), USAGE, "mine.yaml"),
    "recipe_a_list": (lambda i: i.recipe("- kv_pca"), USAGE, "mapping"),
    "recipe_key_unknown": (lambda i: i.recipe("method: [kv_quant]"), USAGE, "method:"),
    "recipe_value_of_wrong_type": (lambda i: i.recipe("weights: 7"), USAGE, "weights:"),
    "recipe_gate_out_of_range": (lambda i: i.recipe("gates: {max_kl: -1}"), USAGE, "gates.max_kl"),
    "method_unknown": (lambda i: i.recipe("methods: [kv_pcaa]"), USAGE, "'kv_pca'"),
    "method_option_unknown": (lambda i: i.recipe("methods: [{kv_quant: {bit: 8}}]"), USAGE, "bit"),
    "rank_no_multiple_of_8": (lambda i: i.recipe("methods: [{kv_pca: {rank: 12}}]"), USAGE, "rank 12"),
    "rank_over_head_dim": (lambda i: i.recipe("methods: [{kv_pca: {rank: 24}}]"), USAGE, "head_dim 16"),
    "rank_negative": (lambda i: i.recipe("methods: [{kv_pca: {rank: -8}}]"), USAGE, "rank"),
    "rank_and_energy": (lambda i: i.recipe("methods: [{kv_pca: {rank: 8, energy: 0.9}}]"), USAGE, "rank or energy"),
    "hdc_with_quant": (lambda i: i.recipe("methods: [kv_hdc, kv_quant]"), USAGE, "drop one"),
    "hdc_in_attention24": (lambda i: i.recipe("layout: attention24\nmethods: [kv_hdc]"), USAGE, "attention24 has no"),
    "hdc_bits_unknown": (lambda i: i.recipe("methods: [{kv_hdc: {bits: 5}}]"), USAGE, "bits"),
    "set_without_value": (lambda i: i.settings("weights"), USAGE, "--set"),
    "set_unknown_key": (lambda i: i.settings("calibration.sample=4"), USAGE, "calibration.sample"),
    "set_unknown_method": (
        lambda i: i.compress("-r", "lossless", "--set", "methods.kv_quan.bits=8"),
        USAGE,
        "'kv_quant'",
    ),
    "set_method_of_a_budget": (lambda i: i.settings("methods.kv_pca.rank=8"), USAGE, "no method 'kv_pca'"),
    "set_broken_yaml": (lambda i: i.settings("weights=[1"), USAGE, "--set"),
    "samples_negative": (lambda i: i.settings("calibration.samples=-1"), USAGE, "calibration.samples"),
    "context_too_long": (lambda i: i.settings("validation.contexts=[4096]"), USAGE, "validation.contexts"),
    "contexts_empty": (lambda i: i.settings("validation.contexts=[]"), USAGE, "validation.contexts"),
    "length_too_long": (lambda i: i.settings("calibration.length=4096"), USAGE, "calibration.length"),
    "recipe_binary": (lambda i: i.compress("-r", i.file("mine.yaml", b"\x00\xff")), USAGE, "mine.yaml"),
    "recipe_nul": (lambda i: i.recipe("name: a\0b"), USAGE, "mine.yaml"),
    "recipe_empty": (lambda i: i.recipe(""), USAGE, "mapping"),
    "recipe_a_folder": (lambda i: i.compress("-r", i.folder("mine.yaml")), MISSING, "mine.yaml"),
    "recipe_too_deep": (lambda i: i.recipe("[" * 20_000), USAGE, "mine.yaml"),
    "recipe_makes_objects": (lambda i: i.recipe("!!python/object/apply:os.system [id]"), USAGE, "mine.yaml"),
    "recipe_of_aliases": (lambda i: i.recipe(BOMB), USAGE, "bomb"),
    "recipe_key_no_text": (lambda i: i.recipe("1: 2"), USAGE, "1"),
    "recipe_not_a_number": (lambda i: i.recipe("gates: {max_kl: .nan}"), USAGE, "gates.max_kl"),
    "recipe_number_too_long": (lambda i: i.recipe("calibration: {samples: " + "9" * 5000 + "}"), USAGE, "mine.yaml"),
    "methods_no_list": (lambda i: i.recipe("methods: 7"), USAGE, "methods"),
    "method_of_two_names": (lambda i: i.recipe("methods: [{kv_pca: {}, kv_quant: {}}]"), USAGE, "one `name: options`"),
    "method_options_no_mapping": (lambda i: i.recipe("methods: [{kv_pca: 8}]"), USAGE, "methods"),
    "method_null": (lambda i: i.recipe("methods: [null]"), USAGE, "a method must be"),
    "window_negative": (lambda i: i.recipe("methods: [{kv_window: {window: -1}}]"), USAGE, "window"),
    "heads_of_no_layer": (lambda i: i.recipe("methods: [{prune_heads: {heads: {9: [0]}}}]"), USAGE, "9"),
    "layer_out_of_range": (lambda i: i.recipe("methods: [{prune_layers: {layers: {7: mlp}}}]"), USAGE, "layer 7"),
    "set_empty": (lambda i: i.settings(""), USAGE, "--set"),
    "set_of_a_value": (lambda i: i.settings("name.x=1"), USAGE, "name"),
    "set_too_deep": (lambda i: i.settings("weights=" + "[" * 20_000), USAGE, "--set"),
    "encoder_recipe_for_a_decoder": (lambda i: i.compress("-r", "encoder"), BROKEN, "-r balanced"),
    # the text
    "text_missing": (lambda i: i.settings("calibration.source=nowhere.txt"), MISSING, "nowhere.txt"),
    "text_empty": (lambda i: i.calibration("text.txt", ""), USAGE, "empty"),
    "text_blank": (lambda i: i.calibration("text.txt", " \n\n"), USAGE, "empty"),
    "text_binary": (lambda i: i.calibration("text.txt", b"\xff\xfe\x00\x01"), USAGE, "UTF-8"),
    "text_too_short": (lambda i: i.calibration("text.txt", "A few words.", *SMALL[2:]), USAGE, "tokens"),
    "jsonl_broken_line": (lambda i: i.calibration("t.jsonl", '{"text": "a"}\n{"text"'), USAGE, "t.jsonl"),
    "jsonl_without_text": (lambda i: i.calibration("t.jsonl", '{"words": "a"}'), USAGE, "text"),
    "text_a_folder": (lambda i: i.settings(f"calibration.source={i.folder('text.txt')}"), MISSING, "text.txt"),
    "text_with_nul": (lambda i: i.calibration("text.txt", b"\x00\x80"), USAGE, "UTF-8"),
    "jsonl_too_deep": (lambda i: i.calibration("t.jsonl", "[" * 100_000), USAGE, "t.jsonl"),
    "jsonl_no_object": (lambda i: i.calibration("t.jsonl", '["text"]'), USAGE, "t.jsonl"),
    "jsonl_text_no_text": (lambda i: i.calibration("t.jsonl", '{"text": 7}'), USAGE, "t.jsonl"),
    "jsonl_prompt_alone": (lambda i: i.calibration("t.jsonl", '{"prompt": "a"}'), USAGE, "t.jsonl"),
    "jsonl_not_utf8": (lambda i: i.calibration("t.jsonl", b'{"text": "\xff"}'), USAGE, "UTF-8"),
    "jsonl_half_a_character": (
        lambda i: i.calibration("t.jsonl", '{"text": "' + "\\ud800" * 999 + '"}', *SMALL),
        USAGE,
        "t.jsonl",
    ),
    "text_of_the_held_out": (lambda i: i.settings("validation.source=nowhere.jsonl"), MISSING, "nowhere.jsonl"),
    "analyze_text_missing": (lambda i: ["analyze", i.tiny, "--data", "nowhere.txt"], MISSING, "nowhere.txt"),
    # the plan
    "plan_missing": (lambda i: i.compress("--plan", "nowhere.json"), MISSING, "nowhere.json"),
    "plan_not_json": (lambda i: i.plan('{"layers": ['), USAGE, "JSON"),
    "plan_not_a_plan": (lambda i: i.plan('{"layers": [{"rank": 8}]}'), USAGE, "layers.0.layer"),
    "plan_of_another_model": (lambda i: i.plan(layers(8, 8, 8)), USAGE, "3 layers"),
    "plan_rank_no_multiple_of_8": (lambda i: i.plan(layers(8, 12)), USAGE, "rank 12"),
    "plan_rank_over_head_dim": (lambda i: i.plan(layers(8, 32)), USAGE, "head_dim 16"),
    "plan_widths_differ": (
        lambda i: i.plan(planned(FullCache(rank=8, value_rank=16))),
        USAGE,
        "one size, not 8 and 16",
    ),
    "plan_residual_odd": (
        lambda i: i.plan(planned(FullCache(rank=16, residual=4, stored="int4"))),
        USAGE,
        "4 residual coordinates do not fit",
    ),
    "plan_residual_over_rank": (
        lambda i: i.plan(planned(FullCache(rank=8, residual=16, stored="int4"))),
        USAGE,
        "16 residual coordinates do not fit",
    ),
    "plan_residual_negative": (
        lambda i: i.plan(planned(FullCache(rank=16, residual=-8, stored="int4"))),
        USAGE,
        "-8 residual coordinates do not fit",
    ),
    "plan_residual_in_float": (
        lambda i: i.plan(planned(FullCache(rank=8, residual=8))),
        USAGE,
        "need a rank and an integer cache",
    ),
    "plan_residual_per_tensor": (
        lambda i: i.plan(planned(FullCache(rank=16, residual=8, stored="int4", granularity="per_tensor"))),
        USAGE,
        "steps of their own",
    ),
    "plan_residual_without_rank": (
        lambda i: i.plan(planned(FullCache(residual=8, stored="int8"))),
        USAGE,
        "need a rank and an integer cache",
    ),
    "plan_rotation_without_rank": (
        lambda i: i.plan(planned(FullCache(rotation=0, stored="int8"))),
        USAGE,
        "a rotation needs a rank",
    ),
    "plan_packed_without_window": (
        lambda i: i.plan(cached({"kind": "packed", "rank": 8, "bits": 2})),
        USAGE,
        "layers.0.cache.window: must be given",
    ),
    "plan_packed_in_4_bits": (
        lambda i: i.plan(cached({"kind": "packed", "bits": 4, "window": 8})),
        USAGE,
        "layers.0.cache.bits",
    ),
    "plan_clusters_twice": (
        lambda i: i.plan(cached({"kind": "clustered", "clusters": [0, 0, 2, 2], "count": 2})),
        USAGE,
        "give clusters, or the count",
    ),
    "plan_source_missing": (lambda i: i.plan(cached({"kind": "shared"})), USAGE, "layers.0.cache.source"),
    "plan_source_of_no_layer": (lambda i: i.plan(planned(SharedCache(source=-1))), USAGE, "layer -1"),
    "plan_source_is_the_layer": (lambda i: i.plan(planned(SharedCache(source=1))), USAGE, "comes no earlier"),
    "plan_cache_no_mapping": (lambda i: i.plan(cached("int8")), USAGE, "layers.0.cache"),
    "plan_cache_unknown": (
        lambda i: i.plan(cached({"kind": "ful"})),
        USAGE,
        "unknown kind of cache 'ful'",
    ),
    "plan_cache_kind_no_text": (lambda i: i.plan(cached({"kind": ["full"]})), USAGE, "unknown kind of cache ['full']"),
    "plan_stored_unknown": (lambda i: i.plan(cached({"stored": "int3"})), USAGE, "layers.0.cache.stored"),
    "plan_stored_of_packed": (lambda i: i.plan(cached({"stored": "codes2"})), USAGE, "layers.0.cache.stored"),
    "plan_a_list": (lambda i: i.plan("[]"), USAGE, "plan"),
    "plan_binary": (lambda i: i.compress("--plan", i.file("plan.json", b"\xff\xfe\x00")), USAGE, "JSON"),
    "plan_a_folder": (lambda i: i.compress("--plan", i.folder("plan.json")), MISSING, "plan.json"),
    "plan_too_deep": (lambda i: i.plan("[" * 100_000), USAGE, "JSON"),
    "plan_layer_twice": (
        lambda i: i.plan(Plan(layers=(LayerPlan(layer=0), LayerPlan(layer=0)))),
        USAGE,
        "layers",
    ),
    "plan_rank_of_0": (lambda i: i.plan(planned(FullCache(rank=0))), USAGE, "rank 0"),
    "plan_rank_huge": (lambda i: i.plan(planned(FullCache(rank=8 * 10**20))), USAGE, "rank"),
    "plan_window_of_0": (lambda i: i.plan(planned(WindowCache(window=0))), USAGE, "window of 0"),
    "plan_sinks_without_window": (lambda i: i.plan(cached({"sinks": 4})), USAGE, "layers.0.cache.sinks"),
    "plan_sinks_negative": (lambda i: i.plan(planned(WindowCache(window=8, sinks=-1))), USAGE, "-1 sinks"),
    "plan_head_out_of_range": (lambda i: i.plan(planned(heads=(0, 9))), USAGE, "layers.1"),
    "plan_head_twice": (lambda i: i.plan(planned(heads=(0, 0))), USAGE, "layers.1"),
    "plan_head_negative": (lambda i: i.plan(planned(heads=(-1, 0))), USAGE, "layers.1"),
    "plan_score_nan": (lambda i: i.plan('{"layers": [{"layer": 0, "score": NaN}]}'), USAGE, "layers.0.score"),
    "plan_attention24_int8": (
        lambda i: i.plan(planned(FullCache(stored="int8")).model_copy(update={"layout": "attention24"})),
        USAGE,
        "no integer cache",
    ),
    # the budget
    "budget_with_methods": (lambda i: i.recipe("methods: [kv_quant]\nbudget: {kv_ratio: 8}"), USAGE, "not both"),
    "budget_empty": (lambda i: i.recipe("budget: {}"), USAGE, "budget"),
    "budget_in_attention24": (lambda i: i.recipe("layout: attention24\nbudget: {kv_ratio: 8}"), USAGE, "gqa"),
    "ratio_of_1": (lambda i: i.compress("--kv-ratio", "1"), USAGE, "--kv-ratio"),
    "ratio_no_number": (lambda i: i.compress("--kv-ratio", "eight"), USAGE, "--kv-ratio"),
    "ratio_not_finite": (lambda i: i.compress("--kv-ratio", "inf"), USAGE, "--kv-ratio"),
    "ratio_beside_mib": (lambda i: i.compress("--kv-ratio=8", "--kv-mib-at=1k=1"), USAGE, "not both"),
    "mib_without_tokens": (lambda i: i.compress("--kv-mib-at", "64"), USAGE, "--kv-mib-at"),
    "mib_without_equals": (lambda i: i.compress("--kv-mib-at", "16k"), USAGE, "write 16k=64"),
    "mib_no_number": (lambda i: i.compress("--kv-mib-at", "16k=many"), USAGE, "write 16k=64"),
    "mib_beyond_positions": (lambda i: i.compress("--kv-mib-at", "900k=64"), USAGE, "give the limit at"),
    "memory_without_equals": (lambda i: i.compress("--memory-mib", "16k"), USAGE, "write 16k=300"),
    "memory_beside_ratio": (
        lambda i: i.compress("--kv-ratio=8", "--memory-mib=64=300"),
        USAGE,
        "or --memory-mib, not both",
    ),
    "memory_beside_file": (
        lambda i: i.compress("--memory-mib=64=300", "--file-mib=3"),
        USAGE,
        "leave the limit of the file out",
    ),
    "mib_at_no_length": (lambda i: i.compress("--kv-mib-at", "16q=64"), USAGE, "'16q'"),
    "mib_of_nothing": (lambda i: i.compress("--kv-mib-at", "16k=0"), USAGE, "--kv-mib-at"),
    "mib_at_few_tokens": (lambda i: i.compress("--kv-mib-at", "4=64"), USAGE, "--kv-mib-at"),
    "kl_of_0": (lambda i: i.compress("--max-kl", "0"), USAGE, "--max-kl"),
    "recall_drop_over_100": (lambda i: i.compress("--max-recall-drop", "150"), USAGE, "--max-recall-drop"),
    "recall_drop_negative": (lambda i: ["plan", i.tiny, "--max-recall-drop", "-1"], USAGE, "--max-recall-drop"),
    "plan_ratio_of_0": (lambda i: ["plan", i.tiny, "--kv-ratio", "0"], USAGE, "--kv-ratio"),
    "time_ratio_of_1": (lambda i: i.compress("--time-ratio", "1"), USAGE, "--time-ratio"),
    "kl_not_a_number": (lambda i: i.compress("--max-kl", "nan"), USAGE, "--max-kl"),
    "mib_at_endless_digits": (lambda i: i.compress("--kv-mib-at", "9" * 5000 + "=64"), USAGE, "--kv-mib-at"),
    # the output
    "out_not_ours": (lambda i: i.compress("--force", out=i.file("mine/thesis.txt").parent), USAGE, "not an artifact"),
    "out_is_a_file": (lambda i: i.compress("--force", out=i.file("thesis.txt")), USAGE, "this is a file"),
    "out_below_a_file": (lambda i: i.compress(out=i.file("file") / "out"), USAGE, "a folder is needed"),
    "out_not_writable": (lambda i: i.compress(out="/proc/kvslim/out"), USAGE, "cannot write"),
    "out_exists_without_force": (lambda i: i.compress(out=i.artifact()), USAGE, "--force"),
    "out_name_too_long": (lambda i: i.compress(out=i.root / ("x" * 300)), USAGE, "cannot write"),
    "out_missing": (lambda i: ["compress", i.tiny], USAGE, "--out"),
    "out_is_the_model": (lambda i: i.compress("--force", out=i.model()), USAGE, "not an artifact"),
    "out_is_here": (
        lambda i: i.compress("--force", out=i.file("here/thesis.txt").parent / "."),
        USAGE,
        "not an artifact",
    ),
    "out_a_device": (lambda i: i.compress("--force", out="/dev/null"), USAGE, "this is a file"),
    "plan_out_in_no_folder": (lambda i: ["plan", i.tiny, "-o", i.root / "no" / "p.json"], USAGE, "does not exist"),
    "junit_a_folder": (lambda i: i.compress("--junit", i.folder("gates.xml")), USAGE, "it is a folder"),
    "svg_in_no_folder": (lambda i: ["analyze", i.tiny, "--svg", i.root / "no" / "a.svg"], USAGE, "does not exist"),
    # devices
    "device_unknown": (lambda i: i.inspect("laptop-8g"), USAGE, "'laptop-8gb'"),
    "device_in_capitals": (lambda i: i.inspect("LAPTOP-8GB"), USAGE, "'laptop-8gb'"),
    "device_of_an_artifact_without_graph": (
        lambda i: ["inspect", i.without("model.onnx"), "--device", "laptop-8gb"],
        MISSING,
        "no ONNX graph",
    ),
    "device_missing": (lambda i: i.inspect("nowhere.yaml"), MISSING, "nowhere.yaml"),
    "device_a_folder": (lambda i: i.inspect(i.folder("mine.yaml")), MISSING, "mine.yaml"),
    "device_not_yaml": (lambda i: i.device("name: ["), USAGE, "mine.yaml"),
    "device_not_text": (lambda i: i.inspect(i.file("mine.yaml", b"\xff\xfe")), USAGE, "mine.yaml"),
    "device_too_deep": (lambda i: i.device("[" * 20_000), USAGE, "mine.yaml"),
    "device_empty": (lambda i: i.device(""), USAGE, "mine.yaml"),
    "device_a_list": (lambda i: i.device("- name: a"), USAGE, "mine.yaml"),
    "device_with_holes": (lambda i: i.device("name: a"), USAGE, "ram_gib"),
    "device_without_source": (lambda i: i.profile("gflops: {value: 8}"), USAGE, "gflops.source"),
    "device_memory_negative": (lambda i: i.profile("ram_gib: {value: -8, source: a}"), USAGE, "ram_gib.value"),
    "device_bandwidth_of_0": (lambda i: i.profile("bandwidth_gb_s: {value: 0, source: a}"), USAGE, "bandwidth_gb_s"),
    "device_not_finite": (lambda i: i.profile("gflops: {value: .inf, source: a}"), USAGE, "gflops.value"),
    "device_no_number": (lambda i: i.profile("gflops: {value: fast, source: a}"), USAGE, "gflops.value"),
    "device_share_over_1": (lambda i: i.profile("usable_share: {value: 2, source: a}"), USAGE, "usable_share"),
    "device_key_unknown": (lambda i: i.profile("cores: 4"), USAGE, "cores"),
    # artifacts
    "artifact_missing": (lambda i: ["verify", i.root / "nowhere"], MISSING, "no such artifact"),
    "artifact_is_a_model": (lambda i: ["generate", i.tiny, "-p", "a"], MISSING, MANIFEST),
    "manifest_truncated": (lambda i: ["verify", i.artifact(kvslim_json='{"format": 1')], BROKEN, "not JSON"),
    "manifest_of_the_future": (lambda i: ["verify", i.artifact(kvslim_json='{"format": 2}')], BROKEN, "newer"),
    "manifest_with_holes": (lambda i: ["validate", i.artifact(kvslim_json='{"format": 1}')], BROKEN, "source"),
    "file_changed": (lambda i: ["verify", i.artifact(model_onnx="x")], BROKEN, "model.onnx: changed"),
    "graph_garbage": (lambda i: ["generate", i.artifact(), "-p", "a"], BROKEN, "graph"),
    "prompt_empty": (lambda i: ["generate", i.artifact(), "-p", ""], USAGE, "prompt is empty"),
    "top_p_over_1": (lambda i: ["generate", i.artifact(), "-p", "a", "--top-p", "2"], USAGE, "--top-p"),
    "threads_endless": (
        lambda i: ["generate", i.artifact(), "-p", "a", "--threads", "99999999999"],
        USAGE,
        "not between 1 and 1024",
    ),
    "threads_of_bench_endless": (
        lambda i: ["bench", i.artifact(), "--threads", "1,2048"],
        USAGE,
        "2048 threads are not between",
    ),
    "tokens_negative": (lambda i: ["generate", i.artifact(), "-p", "a", "--max-new-tokens", "-1"], USAGE, "-tokens"),
    "against_another_model": (lambda i: ["validate", i.artifact(), "--against", i.tiny], USAGE, "another SHA-256"),
    "manifest_binary": (lambda i: ["verify", i.artifact(kvslim_json=b"\xff\x00")], BROKEN, "not JSON"),
    "manifest_utf16": (lambda i: ["verify", i.utf16_manifest()], BROKEN, "kvslim.json: changed"),
    "manifest_too_deep": (lambda i: ["generate", i.artifact(kvslim_json="[" * 100_000), "-p", "a"], BROKEN, "not JSON"),
    "manifest_a_folder": (lambda i: ["verify", i.folder("artifact/kvslim.json").parent], MISSING, MANIFEST),
    "file_missing": (lambda i: ["verify", i.without("model.onnx")], BROKEN, "model.onnx: missing"),
    "file_added": (lambda i: ["verify", i.artifact(more_txt="x")], BROKEN, "more.txt: not part"),
    "graph_missing": (lambda i: ["generate", i.without("model.onnx"), "-p", "a"], MISSING, "no ONNX graph"),
    "tokenizer_of_artifact_missing": (
        lambda i: ["generate", i.without("tokenizer.json"), "-p", "a"],
        MISSING,
        "tokenizer",
    ),
    "tokenizer_of_artifact_broken": (
        lambda i: ["generate", i.artifact(tokenizer_json="{"), "-p", "a"],
        BROKEN,
        "tokenizer",
    ),
    "tokenizer_of_artifact_binary": (
        lambda i: ["generate", i.artifact(tokenizer_json=b"\xff"), "-p", "a"],
        BROKEN,
        "not UTF-8",
    ),
    "prompt_not_unicode": (lambda i: ["generate", i.artifact(), "-p", "\udcff"], USAGE, "not Unicode"),
    "prompts_missing": (lambda i: ["generate", i.artifact(), "--file", "nowhere.jsonl"], MISSING, "nowhere.jsonl"),
    "prompts_twice": (lambda i: ["generate", i.artifact(), "-p", "a", "--file", "a"], USAGE, "give one of"),
    "chat_without_template": (lambda i: ["generate", i.artifact(), "-p", "a", "--chat"], USAGE, "no chat template"),
    "compare_missing": (lambda i: ["compare", i.root / "nowhere"], MISSING, "no such artifact"),
    "compare_baseline_broken": (lambda i: ["compare", i.artifact(), "--against", i.file("b.json", "{")], USAGE, "JSON"),
    "compare_baseline_too_deep": (
        lambda i: ["compare", i.artifact(), "--against", i.file("b.json", "[" * 100_000)],
        USAGE,
        "JSON",
    ),
    "bench_missing": (lambda i: ["bench", i.root / "nowhere"], MISSING, "nowhere"),
    "speculative_unknown": (
        lambda i: ["bench", i.artifact(), "--speculative", "foo"],
        USAGE,
        "'--speculative': 'foo' is not one of 'auto', 'none'",
    ),
    "bench_context_negative": (lambda i: ["bench", i.artifact(), "--context=-4"], USAGE, "'-4'"),
    "inspect_context_no_number": (lambda i: ["inspect", i.tiny, "--context", "4q"], USAGE, "'4q'"),
    "inspect_nothing": (lambda i: ["inspect", i.root / "nowhere"], MISSING, "nowhere"),
}


@pytest.fixture
def inputs(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.chdir(tmp_path)
    return Inputs(tmp_path, tiny_llama)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_error(inputs: Inputs, capsys: pytest.CaptureFixture[str], name: str) -> None:
    case, code, word = CASES[name]
    arguments = [str(argument) for argument in case(inputs)]
    before = sorted(inputs.root.rglob("*"))
    assert app.run(arguments) == code
    captured = capsys.readouterr()
    error = captured.err[captured.err.index("error: ") :].splitlines()
    assert captured.out == ""
    assert [line.split(":")[0] for line in error] == ["error", "  where", "  fix"]
    assert word in "\n".join(error)
    assert sorted(inputs.root.rglob("*")) == before


def test_a_disk_too_small_is_seen_before_the_weights_are_read(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30, 0))
    assert app.run([str(argument) for argument in inputs.compress()]) == USAGE
    assert "not enough space" in capsys.readouterr().err
    assert not (inputs.root / "out").exists()


def test_no_pickle_is_loaded_when_a_checkpoint_has_one(inputs: Inputs) -> None:
    with pytest.raises(BaseException, match="a pickle was loaded"):
        pickle.loads(pickle.dumps(Trap()))
    assert app.run([str(argument) for argument in inputs.compress(model=inputs.pickled())]) == MISSING


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_nothing(inputs: Inputs) -> None:
    options = [part for override in SMALL for part in ("--set", override)]
    done = run_process(inputs.compress(*options), "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))")
    assert done.returncode == USAGE, done.stderr
    assert "cannot write" in done.stderr
    assert list(inputs.root.iterdir()) == []


def test_a_hub_id_without_network_is_not_found(inputs: Inputs) -> None:
    done = run_process(inputs.compress(model="kvslim-tests/no-such-model"), "os.environ['HF_HUB_OFFLINE'] = '1'")
    assert done.returncode == MISSING, done.stderr
    assert "from the hub" in done.stderr
    assert list(inputs.root.iterdir()) == []


def run_process(arguments: list[object], before: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, after a line of Python."""
    code = f"import os, resource, sys; {before}; from kvslim.cli.app import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
