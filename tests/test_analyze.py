"""What a task needs least: numbers that are measured, a table, JSON, and a heat map."""

from __future__ import annotations

import json
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import open_prepared, recipe_of
from support.tiny_encoders import save_encoder
from threadpoolctl import threadpool_info, threadpool_limits

from kvslim import pipeline
from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.cli import app
from kvslim.cli.schemas import output_type
from kvslim.contract import ModelSpec
from kvslim.errors import OutputError, UnsupportedError
from kvslim.methods import PruneHeads, PruneLayers
from kvslim.methods.cluster_heads import ClusterHeads
from kvslim.planning.analyze import Analysis, LayerAnalysis, SourceLayer
from kvslim.recipe import load_recipe
from kvslim.report.analysis import conclusions, spare, without
from kvslim.report.heatmap import Panel, heatmap

SETTINGS = ["--set", "calibration.samples=4", "--set", "calibration.length=48"]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def analysis(tiny_model: Callable[[str], Path]) -> Analysis:
    return pipeline.analyze(str(tiny_model("llama")), recipe_of())


def test_every_layer_and_head_is_there(analysis: Analysis) -> None:
    assert [layer.layer for layer in analysis.layers] == [0, 1]
    assert analysis.tokens == 4 * 48
    for layer in analysis.layers:
        assert (len(layer.kv_head_kl), len(layer.fluctuation), len(layer.taylor)) == (2, 4, 4)
        assert min(layer.attention_kl, layer.mlp_kl, layer.block_kl, *layer.kv_head_kl, *layer.fluctuation) > 0
        assert min(layer.taylor) > 0
        assert 0 < layer.block_influence < 2
        assert 1 <= layer.value_rank <= 16
        assert layer.clusters in {2, 4}  # as many for each of two kv heads
        assert 1 <= layer.key_rank <= 16
        assert layer.recent_attention == pytest.approx(1.0)  # no text is longer than 256 tokens
    source = analysis.layers[1].source
    assert analysis.layers[0].source is None
    assert source is not None
    assert source.layer == 0
    assert 0 < source.key_distance <= 1
    assert 0 < source.value_distance <= 1


def test_kl_is_that_of_the_model_without_the_head(analysis: Analysis, tiny_model: Callable[[str], Path]) -> None:
    prepared = open_prepared(tiny_model("llama"), recipe_of())
    trials = prepared.trials()
    first, second = analysis.layers
    for found, method in (
        (second.kv_head_kl[1], PruneHeads(heads={1: (2, 3)})),
        (first.attention_kl, PruneLayers(layers={0: "attention"})),
        (first.mlp_kl, PruneLayers(layers={0: "mlp"})),
        (second.block_kl, PruneLayers(layers={1: "block"})),
    ):
        assert found == pytest.approx(trials.divergence(method))


def test_task_in_jsonl_gives_table_json_and_heat_map(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "my task.jsonl"
    lines = ({"prompt": f"{number} and one is ", "completion": f"{number + 1}."} for number in range(99))
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    svg = tmp_path / "heads.svg"
    command = ["analyze", str(tiny_llama), "--data", str(task), "--svg", str(svg), *SETTINGS]
    assert app.run([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert output_type("analyze").model_validate(told)
    assert told["source"] == str(task)
    root = ET.fromstring(svg.read_text())
    assert len([rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]) == 2 * (3 + 4)
    assert app.run(command) == 0
    printed = capsys.readouterr().out
    assert "KL without attention" in printed
    assert "source: K, V" in printed
    assert "Taylor" in printed


def test_what_follows_can_be_typed(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tmp_path / "my task.txt"
    task.write_text("A sentence of many words, and of much else. " * 60)
    monkeypatch.setattr("kvslim.report.analysis.TOLERABLE", 9.0)
    assert app.run(["analyze", str(tiny_llama), "--data", str(task), *SETTINGS]) == 0
    printed = capsys.readouterr().out
    assert re.search("(?m)^influence .*hidden states", printed)
    commands = [shlex.split(line) for line in printed.partition("What follows:")[2].splitlines() if line[:2] == "  "]
    assert [command[:3] for command in commands] == [["kvslim", verb, str(tiny_llama)] for verb in ("compress", "plan")]
    monkeypatch.setattr(pipeline, "prepare", lambda *_, **__: pytest.fail("loaded"))
    for command in commands:
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            app.app(command[1:], standalone_mode=False)
        assert command[command.index("--calibration") + 1] == str(task)


def layer(at: int, **update: Any) -> LayerAnalysis:
    """A layer of which everything is needed, but for what is said."""
    needed = LayerAnalysis(
        layer=at,
        attention_kl=1.0,
        mlp_kl=1.0,
        block_kl=2.0,
        block_influence=0.5,
        kv_head_kl=(0.5, 0.5),
        fluctuation=(1.0,) * 4,
        taylor=(1.0,) * 4,
        clusters=4,
        key_rank=60,
        value_rank=50,
        recent_attention=0.9,
        source=None,
    )
    return needed.model_copy(update=update)


def of(*layers: LayerAnalysis, length: int = 1024) -> Analysis:
    return Analysis(source="self", tokens=4096, length=length, head_dim=64, layers=layers)


NEAR = SourceLayer(layer=0, key_distance=0.04, value_distance=0.1)
FAR = SourceLayer(layer=0, key_distance=0.04, value_distance=0.2)


@pytest.mark.parametrize(
    ("analysis", "follows"),
    [
        (
            of(layer(0), layer(1, mlp_kl=0.3)),
            "No part can go for a KL of 0.01; the cheapest is the MLP of layer 1",
        ),
        (
            of(layer(0, mlp_kl=0.004), layer(1, kv_head_kl=(0.5, 0.005))),
            "For a KL of about 0.009 together, these can go: the MLP of layer 0, kv head 1 of layer 1.",
        ),
        (of(layer(0), length=512 - 1), "Texts of 511 tokens are too short to say who looks back further than 256."),
        (of(layer(0)), "No layer keeps 99 % of its attention within 256 tokens"),
        (of(layer(0), layer(1, recent_attention=0.995)), "leaves 99 % of the attention of layer 1."),
        (
            of(layer(0), layer(1, key_rank=40)),
            "keys need 40 to 60 and values 50 to 50 for 99 %: half of them",
        ),
        (of(layer(0, value_rank=32)), "half of the dimensions of values can go (kv_pca)."),
        (of(layer(0), layer(1, source=NEAR)), "Caches to share (share_kv): layer 1 that of layer 0."),
        (of(layer(0), layer(1, source=FAR)), "No layer can read another's cache"),
    ],
)
def test_sentences_say_what_follows(analysis: Analysis, follows: str) -> None:
    assert follows in "\n".join(conclusions(analysis))


def test_spare_parts_cost_no_more_than_allowed_and_each_layer_loses_one() -> None:
    layers = layer(0, mlp_kl=0.001, attention_kl=0.002), layer(1, kv_head_kl=(0.003, 0.004)), layer(2, mlp_kl=0.0065)
    found = spare(of(*layers), 0.01)
    assert [str(removal) for removal in found] == ["the MLP of layer 0", "kv head 0 of layer 1"]
    methods = "[{prune_layers: {layers: {0: mlp}}}, {prune_heads: {heads: {1: [0, 1]}}}, kv_quant]"
    assert without(of(*layers), found) == methods
    recipe = load_recipe("lossless", [f"methods={methods}"])
    assert [method.name for method in recipe.methods] == ["prune_layers", "prune_heads", "kv_quant"]
    assert [str(removal) for removal in spare(of(*layers), 0.02)][-1] == "the MLP of layer 2"


def test_the_only_kv_head_of_a_layer_stays() -> None:
    assert spare(of(layer(0, kv_head_kl=(0.001,), attention_kl=0.1)), 0.01) == ()


def test_heat_map_is_darkest_where_the_value_is_largest_and_escapes_its_title() -> None:
    heads = Panel("head", ("0", "1"), [[1e-4, 1.0], [0.0, 1e-2]])
    parts = Panel("KL without", ("<both>",), [[3.0], [5.0]])
    root = ET.fromstring(heatmap("a <b> & c", [heads, parts]))
    cells = {rect.findtext(f"{SVG}title"): rect.get("fill") for rect in root.iter(f"{SVG}rect")}
    assert cells["layer 0, head 1: 1"] == cells["layer 1, KL without <both>: 5"] == "#08306b"
    assert cells["layer 0, head 0: 0.0001"] == cells["layer 1, head 0: 0"] == "#ecf4fa"
    assert cells["layer 0, KL without <both>: 3"] == "#ecf4fa"
    assert "a <b> & c" in [text.text for text in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", ["nowhere/heads.svg", "."])
def test_unwritable_heat_map_is_refused_before_any_work(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["analyze", str(tmp_path / "no-model"), "--svg", str(tmp_path / name)]) == OutputError.exit_code
    assert "cannot write" in capsys.readouterr().err


def test_numpy_fits_with_one_thread(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of numpy's BLAS wait for each other where other processes have the cores."""
    seen: list[int] = []
    counted = ClusterHeads.numbers

    def heard(method: ClusterHeads, spec: ModelSpec, statistics: CalibrationStatistics) -> dict[int, int]:
        seen.extend(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")
        return counted(method, spec, statistics)

    monkeypatch.setattr(ClusterHeads, "numbers", heard)
    with threadpool_limits(2, user_api="blas"):
        pipeline.analyze(str(tiny_model("llama")), recipe_of())
    assert set(seen) == {1}


def test_encoder_is_refused(tmp_path: Path) -> None:
    model = save_encoder("bert", "fill-mask", tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="nothing to analyze"):
        pipeline.analyze(str(model), recipe_of())
