"""Plans with their numbers: in one file, to the bit, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.models import CALIBRATION, open_prepared, recipe_of
from support.verbs import runner

from kvslim import pipeline
from kvslim.caches import ClusteredCache, SharedCache
from kvslim.calibrate.cache import cache_folder
from kvslim.calibrate.statistics import sha256_of
from kvslim.cli.inputs import read_plan, read_plans
from kvslim.errors import ArtifactError, UsageError
from kvslim.export.manifest import read_manifest, verify
from kvslim.methods import KvHdc, KvPca, PruneHeads
from kvslim.planning.decide import decide
from kvslim.settings import Calibration, Heal
from kvslim.transform.edit_file import FORMAT, NAME, digest_of, load_fitted, merged, save_fitted
from kvslim.transform.edits import FittedPlan, LayerEdit
from kvslim.types import LayerPlan, Plan
from kvslim.weight_format import WeightFormat

METHODS = (KvPca(rank=8), KvHdc(bits=4), PruneHeads(groups=1))
REFIT = {"refit": True}


def fitted_of(model: Path, *, refit: bool = False) -> FittedPlan:
    prepared = open_prepared(model, recipe_of(METHODS))
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    if refit:
        plan = plan.model_copy(update={"layers": tuple(layer.model_copy(update=REFIT) for layer in plan.layers)})
    return prepared.fitted(plan)


def test_file_gives_back_every_number(tiny_llama: Path, tmp_path: Path) -> None:
    fitted = fitted_of(tiny_llama, refit=True)
    assert any(code.output is not None for code in fitted.codes)
    codes = tuple(
        replace(code, weights={"self_attn.o_proj.weight": np.eye(3, dtype=np.float32)}) for code in fitted.codes
    )
    save_fitted(tmp_path / "a.safetensors", fitted._replace(codes=codes))
    found = load_fitted(tmp_path / "a.safetensors")
    assert found.plan == fitted.plan
    assert found.made_for == fitted.made_for
    assert digest_of(found.codes) == digest_of(codes) != digest_of(fitted.codes)
    assert [code.heads and code.heads.query for code in found.codes] == [
        code.heads and code.heads.query for code in codes
    ]
    save_fitted(tmp_path / "b.safetensors", found)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


CACHES = {
    "shared": LayerPlan(layer=1, cache=SharedCache(source=0)),
    "clustered": LayerPlan(layer=1, cache=ClusteredCache(count=2)),
    "no block": LayerPlan(layer=1, heads=(), mlp=False),
}


@pytest.mark.parametrize("kind", CACHES)
def test_every_kind_of_cache_comes_back(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    fitted = prepared.fitted(Plan(layers=(LayerPlan(layer=0), CACHES[kind])))
    save_fitted(tmp_path / "a.safetensors", fitted)
    found = load_fitted(tmp_path / "a.safetensors")
    assert digest_of(found.codes) == digest_of(fitted.codes)
    assert [code.cache for code in found.codes] == [code.cache for code in fitted.codes]
    assert [code.is_dropped for code in found.codes] == [code.is_dropped for code in fitted.codes]


def test_refits_come_from_the_disk_the_second_time(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path))
    first = fitted_of(tiny_llama, refit=True)
    assert len(list((cache_folder() / "edits").iterdir())) == 1
    monkeypatch.setattr("kvslim.prepared.decoder_trials.DecoderTrials.refitted", None)
    assert digest_of(fitted_of(tiny_llama, refit=True).codes) == digest_of(first.codes)


NO_PLAN, WRONG_DIGEST = "holds no plan", "its digest is not that"
DAMAGES = {
    "cut": NO_PLAN,
    "changed": WRONG_DIGEST,
    "other": NO_PLAN,
    "newer": f"format {FORMAT + 1} is not one",
    "edited": WRONG_DIGEST,
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_damaged_file_is_refused(tiny_llama: Path, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "a.safetensors"
    save_fitted(path, fitted_of(tiny_llama))
    content = path.read_bytes()
    if fault == "cut":
        path.write_bytes(content[:-100])
    elif fault == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "other":
        save_file({"x": np.zeros(3)}, path)
    elif fault == "newer":
        text = json.dumps({"format": FORMAT + 1})
        save_file({}, path, {"kvslim": json.dumps([text, sha256_of({}, text)])})
    else:
        path.write_bytes(content.replace(b"int4", b"int8", 1))
    with pytest.raises(ArtifactError, match=DAMAGES[fault]):
        read_plan(path)


def test_trainings_of_one_plan_are_merged(tiny_llama: Path, tmp_path: Path) -> None:
    fitted = fitted_of(tiny_llama)

    def trained(value: float) -> FittedPlan:
        weights = {"self_attn.o_proj.bias": np.full(4, value, np.float32)}
        return fitted._replace(codes=tuple(replace(code, weights=weights) for code in fitted.codes))

    paths = [tmp_path / f"{value}.safetensors" for value in (1, 2, 6)]
    for path, value in zip(paths, (1.0, 2.0, 6.0), strict=True):
        save_fitted(path, trained(value))
    found = read_plans(paths)
    assert isinstance(found, FittedPlan)
    assert all(np.array_equal(code.weights["self_attn.o_proj.bias"], np.full(4, 3, np.float32)) for code in found.codes)
    assert found.plan == fitted.plan
    with pytest.raises(UsageError, match="one of them none"):
        merged([trained(1.0), fitted])
    with pytest.raises(UsageError, match="different models"):
        merged([trained(1.0), trained(2.0)._replace(made_for="another")])
    other = tuple(replace(code, rounding=replace(code.rounding, key_scale=None)) for code in trained(2.0).codes)
    with pytest.raises(UsageError, match="different numbers"):
        merged([trained(1.0), trained(2.0)._replace(codes=other)])


def test_plans_without_numbers_are_not_merged(tmp_path: Path) -> None:
    plan = Plan(layers=(LayerPlan(layer=0),))
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(plan.model_dump_json())
    with pytest.raises(UsageError, match="without numbers"):
        read_plans(paths)
    assert read_plans(paths[:1]) == plan
    assert read_plans(()) is None


def refrain(folder: Path) -> Calibration:
    """A text that says one thing over and over: what a random model learns of a part of it serves for the rest."""
    path = folder / "refrain.txt"
    path.write_text("one two three four five six seven eight nine ten " * 800)
    return CALIBRATION.model_copy(update={"source": str(path), "samples": 8})


def test_artifact_with_its_edits_is_made_again_without_text(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"heal": Heal(steps=20, rate=1e-3), "keep_edits": True, "calibration": refrain(tmp_path)}
    recipe = recipe_of((KvPca(rank=8), KvHdc(bits=4))).model_copy(update=asked)
    manifest = pipeline.compress(str(tiny_llama), recipe, tmp_path / "first")
    assert manifest.healing is not None
    assert manifest.healing.kept
    assert manifest.healing.kl_after < manifest.healing.kl_before
    assert NAME in manifest.files
    assert verify(tmp_path / "first") == ()
    assert read_manifest(tmp_path / "first") == manifest
    given = read_plan(tmp_path / "first" / NAME)
    again = recipe.model_copy(update={"heal": None, "keep_edits": False})
    with monkeypatch.context() as patch:
        patch.setattr("kvslim.prepared.decoder.Recorder", None)  # which gathers statistics
        patch.setenv("KVSLIM_CACHE", str(tmp_path / "nothing"))
        second = pipeline.compress(str(tiny_llama), again, tmp_path / "second", plan=given)
    assert second.healing is None
    assert second.plan == manifest.plan
    for name in ("model.onnx", "model.onnx_data"):
        assert second.files[name] == manifest.files[name]
    assert isinstance(given, FittedPlan)
    further = pipeline.compress(str(tiny_llama), recipe, tmp_path / "third", plan=given)  # a training that goes on
    assert further.healing is not None
    assert further.healing.kl_before == pytest.approx(manifest.healing.kl_after, rel=1e-4)


def test_numbers_for_another_model_are_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    save_fitted(path, fitted_of(tiny_llama))
    run = runner(capsys, "compress")
    code, _, err = run(tiny_llama, "-o", tmp_path / "out", "--plan", path, "--weights", "int8")
    assert code == 2
    assert "another model, or for weights that are stored in another way" in err
    assert not (tmp_path / "out").exists()


def test_healed_rows_of_int4_weights_are_stored_in_8_bits(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of((), WeightFormat(type="int4", method="rtn"))
    asked = {"heal": Heal(steps=20, rate=1e-3), "calibration": refrain(tmp_path)}
    prepared = open_prepared(tiny_llama, recipe.model_copy(update=asked))
    plan = Plan(layers=tuple(LayerPlan(layer=layer).with_cache(stored="int4") for layer in range(prepared.spec.layers)))
    fitted, healing = prepared.healed(prepared.fitted(plan))
    assert healing is not None
    assert healing.kept
    query = fitted.codes[0].weights["self_attn.q_proj.weight"]
    assert prepared.rows is not None
    assert prepared.rows.stored(query).bits == 8
    assert prepared.rows.stored(prepared.model.model.layers[0].mlp.up_proj.weight.detach().numpy()).bits == 4


def test_layer_with_trained_weights_is_not_empty() -> None:
    assert LayerEdit().is_empty
    assert not LayerEdit(weights={"mlp.up_proj.weight": np.zeros(1)}).is_empty
