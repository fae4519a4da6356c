"""How many positions an artifact has: those that scaled RoPE reaches, and no more than are wanted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.models import open_prepared, original_logits, recipe_of, torch_logits
from support.tiny_artifact import fill

from kvslim import checks, pipeline
from kvslim.contract import ModelSpec
from kvslim.errors import OutputError, UsageError
from kvslim.export.manifest import read_manifest, write_manifest
from kvslim.loading.source import read_spec, resolve
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Silent
from kvslim.recipe import Recipe, parse_recipe
from kvslim.settings import Calibration
from kvslim.types import Plan

MILLION = 1_024_000


def rope(kind: str, positions: int, **values: Any) -> dict[str, Any]:
    return {
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values},
    }


def with_config(folder: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    return out


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED: dict[str, tuple[dict[str, Any], int]] = {
    "yarn_added": (rope("yarn", 64, factor=4.0, original_max_position_embeddings=64), 256),
    "yarn_without_original": (rope("yarn", 64, factor=2.5), 160),
    "yarn_told_twice": (rope("yarn", 256, factor=4.0, original_max_position_embeddings=64), 256),
    "yarn_told_otherwise": (rope("yarn", 200, factor=4.0, original_max_position_embeddings=64), 200),
    "yarn_below_original": (rope("yarn", 32, factor=4.0, original_max_position_embeddings=64), 256),
    "llama3_added": (rope("llama3", 64, factor=8.0, original_max_position_embeddings=64, **LLAMA3), 512),
    "llama3_beyond_its_config": (
        rope("llama3", 131072, factor=32.0, original_max_position_embeddings=8192, **LLAMA3),
        131072,
    ),
    "linear": (rope("linear", 2048, factor=4.0), 2048),
    "linear_added": (rope("linear", 64, factor=4.0, original_max_position_embeddings=64), 256),
    "unscaled": (rope("default", 64), 64),
}


@pytest.mark.parametrize("name", SCALED)
def test_positions_are_those_that_scaled_rope_reaches(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    changes, expected = SCALED[name]
    assert read_spec(resolve(str(with_config(tiny_llama, tmp_path / "model", **changes)))).max_context == expected


def test_old_form_of_an_added_yarn_is_read_too(tiny_llama: Path, tmp_path: Path) -> None:
    model = with_config(tiny_llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 1e4, "rope_scaling": scaling}))
    assert read_spec(resolve(str(model))).max_context == 8192


def test_graph_of_an_added_yarn_is_right_beyond_the_original_positions(tiny_llama: Path, tmp_path: Path) -> None:
    model = with_config(tiny_llama, tmp_path / "model", **SCALED["yarn_added"][0])
    prepared = open_prepared(model, recipe_of())
    tokens = np.random.default_rng(0).integers(0, 257, 200)
    np.testing.assert_allclose(torch_logits(prepared, tokens), original_logits(model, tokens), atol=1e-4)


def test_window_counts_where_added_yarn_makes_the_context_longer(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    changes = rope("yarn", 64, factor=4.0, original_max_position_embeddings=64)
    model = with_config(tiny_model("mistral"), tmp_path / "model", sliding_window=64, **changes)
    assert read_spec(resolve(str(model))).windows == (64, 64)


def spec_of(positions: int, **changes: Any) -> ModelSpec:
    sizes = {"layers": 2, "hidden_size": 64, "q_heads": 4, "kv_heads": 2, "head_dim": 16, "vocab_size": 9}
    return ModelSpec(model_type="llama", **sizes, max_context=positions, **{"windows": (None, None), **changes})


@pytest.mark.parametrize(
    ("model", "context", "positions", "expected"),
    [
        (2048, None, None, 2048),
        (32768, None, None, 32768),
        (131072, None, None, 32768),
        (MILLION, None, None, 32768),
        (MILLION, 16384, None, 32768),
        (MILLION, 65536, None, 131072),
        (MILLION, 4096, 4096, 4096),
        (MILLION, None, MILLION, MILLION),
        (2048, None, 4096, 2048),
    ],
)
def test_artifact_has_the_positions_that_are_wanted(
    model: int, context: int | None, positions: int | None, expected: int
) -> None:
    recipe = Recipe(name="test", positions=positions, calibration=Calibration(context=context))
    assert recipe.fitted(spec_of(model)).max_context == expected


def test_window_that_no_longer_ends_is_none() -> None:
    recipe = Recipe(name="test", positions=512)
    assert recipe.fitted(spec_of(MILLION, windows=(512, 256))).windows == (None, 256)


def test_positions_of_an_encoder_are_its_own() -> None:
    spec = spec_of(512, task="fill-mask")
    assert Recipe(name="test", positions=64).fitted(spec) == spec


def test_fewer_positions_than_the_target_context_are_refused() -> None:
    with pytest.raises(UsageError, match="fewer than calibration"):
        parse_recipe({"name": "test", "positions": 64, "calibration": {"context": 128}}, "a recipe")


def test_graph_stores_rope_of_the_positions_that_are_wanted(tiny_llama: Path, tmp_path: Path) -> None:
    model = with_config(tiny_llama, tmp_path / "model", max_position_embeddings=MILLION)
    snapshot, recipe = resolve(str(model)), recipe_of().model_copy(update={"positions": 104})
    spec = recipe.fitted(read_spec(snapshot))
    PreparedDecoder(snapshot, spec, recipe, Silent()).export(Plan.identity(spec), tmp_path)
    tables = [tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer if 104 in tensor.dims]
    assert {tuple(tensor.dims) for tensor in tables} == {(104, 8)}
    assert sum(4 * int(np.prod(tensor.dims)) for tensor in tables) == spec.rope_bytes


def test_disk_is_asked_for_the_rope_of_all_positions(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_config(tiny_llama, tmp_path / "model", max_position_embeddings=MILLION)
    asked: list[int] = []

    def check(needed_bytes: dict[Path, int]) -> None:
        asked.append(needed_bytes[tmp_path / "out"])
        raise OutputError("full", where="here", fix="free some space")

    monkeypatch.setattr(checks, "check_space", check)
    for recipe in (recipe_of(), recipe_of().model_copy(update={"positions": MILLION})):
        with pytest.raises(OutputError):
            pipeline.compress(str(model), recipe, tmp_path / "out")
    assert asked[1] - asked[0] == 2 * 4 * 16 * (MILLION - 32768)
    assert asked[0] > 4 * resolve(str(model)).stored_bytes


@pytest.mark.parametrize(("stored", "asked", "expected"), [(131072, None, 131072), (512, None, 512), (512, 512, 512)])
def test_model_of_an_artifact_gets_the_artifacts_positions_when_it_is_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: int, asked: int | None, expected: int
) -> None:
    fill(tmp_path)
    made = read_manifest(tmp_path)
    monkeypatch.setattr(pipeline, "origin", lambda *_: None)
    spec, recipe = made.spec.model_copy(update={"max_context": stored}), {**made.recipe, "positions": asked}
    write_manifest(tmp_path, made.model_copy(update={"spec": spec, "recipe": recipe}))
    seen: list[Recipe] = []

    def check(_: object, recipe: Recipe) -> None:
        seen.append(recipe)
        raise UsageError("enough", where="here", fix="stop")

    monkeypatch.setattr(pipeline, "_checked", check)
    with pytest.raises(UsageError, match="enough"):
        pipeline.validate(tmp_path)
    assert seen[0].positions == expected
    assert seen[0].fitted(spec_of(stored)).max_context == stored
