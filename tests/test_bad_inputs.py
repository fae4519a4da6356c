"""Bad inputs, one row each: the exit code, a word of the message, and no trace of an output folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_artifact import fill

from kvslim.cli import app
from kvslim.export.manifest import MANIFEST
from kvslim.types import LayerPlan, Plan

ROOT = Path(__file__).parent.parent
USAGE, BROKEN, MISSING = 2, 4, 5
SMALL = ("calibration.samples=2", "calibration.length=16", "validation.samples=2", "validation.length=32")


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
    return Plan(layers=tuple(LayerPlan(layer=index, rank=rank) for index, rank in enumerate(ranks)))


def planned(**layer: Any) -> Plan:
    """Layer 1 with these entries; layer 0 is kept."""
    return Plan(layers=(LayerPlan(layer=0), LayerPlan(layer=1, **layer)))


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
    "rank_and_energy": (lambda i: i.recipe("methods: [{kv_pca: {rank: 8, energy: 0.9}}]"), USAGE, "one of rank"),
    "hdc_with_quant": (lambda i: i.recipe("methods: [kv_hdc, kv_quant]"), USAGE, "drop one"),
    "hdc_in_attention24": (lambda i: i.recipe("layout: attention24\nmethods: [kv_hdc]"), USAGE, "attention24 has no"),
    "hdc_bits_unknown": (lambda i: i.recipe("methods: [{kv_hdc: {bits: 5}}]"), USAGE, "bits"),
    "set_without_value": (lambda i: i.settings("weights"), USAGE, "--set"),
    "set_unknown_key": (lambda i: i.settings("calibration.sample=4"), USAGE, "calibration.sample"),
    "set_unknown_method": (lambda i: i.settings("methods.kv_pc.rank=8"), USAGE, "'kv_pca'"),
    "set_broken_yaml": (lambda i: i.settings("weights=[1"), USAGE, "--set"),
    "samples_negative": (lambda i: i.settings("calibration.samples=-1"), USAGE, "calibration.samples"),
    "context_too_long": (lambda i: i.settings("validation.contexts=[4096]"), USAGE, "validation.contexts"),
    "contexts_empty": (lambda i: i.settings("validation.contexts=[]"), USAGE, "validation.contexts"),
    "length_too_long": (lambda i: i.settings("calibration.length=4096"), USAGE, "calibration.length"),
    # the text
    "text_missing": (lambda i: i.settings("calibration.source=nowhere.txt"), MISSING, "nowhere.txt"),
    "text_empty": (lambda i: i.calibration("text.txt", ""), USAGE, "empty"),
    "text_blank": (lambda i: i.calibration("text.txt", " \n\n"), USAGE, "empty"),
    "text_binary": (lambda i: i.calibration("text.txt", b"\xff\xfe\x00\x01"), USAGE, "UTF-8"),
    "text_too_short": (lambda i: i.calibration("text.txt", "A few words.", *SMALL[2:]), USAGE, "tokens"),
    "jsonl_broken_line": (lambda i: i.calibration("t.jsonl", '{"text": "a"}\n{"text"'), USAGE, "t.jsonl"),
    "jsonl_without_text": (lambda i: i.calibration("t.jsonl", '{"words": "a"}'), USAGE, "text"),
    # the plan
    "plan_missing": (lambda i: i.compress("--plan", "nowhere.json"), MISSING, "nowhere.json"),
    "plan_not_json": (lambda i: i.plan('{"layers": ['), USAGE, "JSON"),
    "plan_not_a_plan": (lambda i: i.plan('{"layers": [{"rank": 8}]}'), USAGE, "layers.0.layer"),
    "plan_of_another_model": (lambda i: i.plan(layers(8, 8, 8)), USAGE, "3 layers"),
    "plan_rank_no_multiple_of_8": (lambda i: i.plan(layers(8, 12)), USAGE, "rank 12"),
    "plan_rank_over_head_dim": (lambda i: i.plan(layers(8, 32)), USAGE, "head_dim 16"),
    "plan_widths_differ": (lambda i: i.plan(planned(rank=8, value_rank=16)), USAGE, "one size, not 8 and 16"),
    "plan_refined_odd": (lambda i: i.plan(planned(rank=16, refined=4, cache="int4")), USAGE, "refined 4"),
    "plan_refined_over_rank": (lambda i: i.plan(planned(rank=8, refined=16, cache="int4")), USAGE, "refined 16"),
    "plan_refined_negative": (lambda i: i.plan(planned(rank=16, refined=-8, cache="int4")), USAGE, "does not fit"),
    "plan_refined_in_float": (lambda i: i.plan(planned(rank=8, refined=8)), USAGE, "an integer cache"),
    "plan_refined_per_tensor": (
        lambda i: i.plan(planned(rank=16, refined=8, cache="int4", granularity="per_tensor")),
        USAGE,
        "steps of their own",
    ),
    "plan_refined_without_rank": (lambda i: i.plan(planned(refined=8, cache="int8")), USAGE, "need a rank"),
    "plan_roles_without_rank": (lambda i: i.plan(planned(roles=0, cache="int8")), USAGE, "roles a rank"),
    "plan_packed_without_window": (lambda i: i.plan(planned(rank=8, cache="codes2")), USAGE, "without a window"),
    "plan_cache_unknown": (lambda i: i.plan('{"layers": [{"layer": 0, "cache": "int3"}]}'), USAGE, "layers.0.cache"),
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
    "mib_at_no_length": (lambda i: i.compress("--kv-mib-at", "16q=64"), USAGE, "'16q'"),
    "mib_of_nothing": (lambda i: i.compress("--kv-mib-at", "16k=0"), USAGE, "--kv-mib-at"),
    "mib_at_few_tokens": (lambda i: i.compress("--kv-mib-at", "4=64"), USAGE, "--kv-mib-at"),
    "kl_of_0": (lambda i: i.compress("--max-kl", "0"), USAGE, "--max-kl"),
    "recall_drop_over_100": (lambda i: i.compress("--max-recall-drop", "150"), USAGE, "--max-recall-drop"),
    "recall_drop_negative": (lambda i: ["plan", i.tiny, "--max-recall-drop", "-1"], USAGE, "--max-recall-drop"),
    "plan_ratio_of_0": (lambda i: ["plan", i.tiny, "--kv-ratio", "0"], USAGE, "--kv-ratio"),
    # the output
    "out_not_ours": (lambda i: i.compress("--force", out=i.file("mine/thesis.txt").parent), USAGE, "not an artifact"),
    "out_is_a_file": (lambda i: i.compress("--force", out=i.file("thesis.txt")), USAGE, "this is a file"),
    "out_below_a_file": (lambda i: i.compress(out=i.file("file") / "out"), USAGE, "a folder is needed"),
    "out_not_writable": (lambda i: i.compress(out="/proc/kvslim/out"), USAGE, "cannot write"),
    "out_exists_without_force": (lambda i: i.compress(out=i.artifact()), USAGE, "--force"),
    "out_name_too_long": (lambda i: i.compress(out=i.root / ("x" * 300)), USAGE, "cannot write"),
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
    "tokens_negative": (lambda i: ["generate", i.artifact(), "-p", "a", "--max-new-tokens", "-1"], USAGE, "-tokens"),
    "against_another_model": (lambda i: ["validate", i.artifact(), "--against", i.tiny], USAGE, "another shape"),
    "bench_missing": (lambda i: ["bench", i.root / "nowhere"], MISSING, "nowhere"),
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
