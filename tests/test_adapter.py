"""LoRA folders are merged into their base, or refused with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_hub
from support.adapters import MATRIX, RANK, quiet_peft, save_adapter

from kvslim.cli import app
from kvslim.errors import ModelError, NotFoundError, UnsupportedError
from kvslim.loading import adapter
from kvslim.loading.model import load_model, load_tokenizer
from kvslim.loading.source import read_spec, resolve

ALPHA = 6


@pytest.fixture
def lora(tiny_llama: Path, tmp_path: Path) -> Path:
    """An adapter of one projection of the tiny Llama, which lies beside it."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "../base",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
    }
    return save_adapter(tmp_path / "lora", config, f"base_model.model.{MATRIX}")


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)


@quiet_peft
def test_weights_are_those_of_the_base_plus_the_product(lora: Path, tiny_llama: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    snapshot = resolve(str(lora))
    snapshot.check()
    assert read_spec(snapshot) == read_spec(resolve(str(tiny_llama)))
    parts = load_file(lora / "adapter_model.safetensors")
    product = parts[f"base_model.model.{MATRIX}.lora_B.weight"] @ parts[f"base_model.model.{MATRIX}.lora_A.weight"]
    expected = load_file(tiny_llama / "model.safetensors")
    expected[f"{MATRIX}.weight"] += product * (ALPHA / RANK)
    found = load_model(snapshot)
    assert type(found).__name__ == "LlamaForCausalLM"
    assert found.state_dict().keys() == load_model(resolve(str(tiny_llama))).state_dict().keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


@quiet_peft
def test_adapter_that_does_not_fit_its_base_is_refused(lora: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    shutil.rmtree(lora)
    config = {"peft_type": "LORA", "base_model_name_or_path": "../base", "r": RANK, "target_modules": ["q_proj"]}
    save_adapter(lora, config, "base_model.model.model.layers.9.self_attn.q_proj")
    with pytest.raises(ModelError, match=r"changes .*layers\.9.*, which its base model does not have") as error:
        load_model(resolve(str(lora)))
    assert "set base_model_name_or_path to the model that it was trained on" in error.value.fix
    assert error.value.where == str(lora)


@quiet_peft
def test_matrix_that_is_of_another_size_than_in_the_base_is_named(lora: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    rewrite(lora, r=2 * RANK)
    with pytest.raises(ModelError, match=rf"cannot merge the adapter: .*size mismatch for .*{MATRIX}\.lora_A"):
        load_model(resolve(str(lora)))


@quiet_peft
def test_adapter_that_nobody_trained_is_refused(lora: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    path = lora / "adapter_model.safetensors"
    matrices = {name: matrix * ("lora_A" in name) for name, matrix in load_file(path).items()}
    save_file(matrices, path)
    with pytest.raises(ModelError, match="nobody trained this adapter: 1 of its matrices") as error:
        load_model(resolve(str(lora)))
    assert "after training" in error.value.fix


def test_digest_covers_adapter_and_base(lora: Path) -> None:
    digests = {resolve(str(lora)).sha256}
    rewrite(lora, lora_alpha=8)
    digests.add(resolve(str(lora)).sha256)
    config = lora.parent / "base" / "config.json"
    config.write_text(config.read_text() + "\n")
    digests.add(resolve(str(lora)).sha256)
    assert len(digests) == 3


@pytest.mark.usefixtures("without_peft")
def test_inspect_needs_no_peft(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["inspect", str(lora), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_context"] == 2048


@pytest.mark.usefixtures("without_peft")
def test_adapter_is_refused_with_what_to_do_when_peft_is_missing(lora: Path) -> None:
    with pytest.raises(UnsupportedError, match="needs the package peft") as error:
        resolve(str(lora)).check()
    assert "pip install 'kvslim[lora]', or merge it" in error.value.fix


def test_other_adapters_than_lora_are_refused_by_name(lora: Path) -> None:
    rewrite(lora, peft_type="IA3")
    with pytest.raises(UnsupportedError, match="'IA3'"):
        resolve(str(lora)).check()


def test_pickled_adapter_is_never_loaded(lora: Path) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(NotFoundError, match=r"no adapter_model\.safetensors"):
        resolve(str(lora)).check()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base_model_name_or_path": None}, ModelError, "names no base model"),
        ({"base_model_name_or_path": "./nowhere"}, NotFoundError, "the base model of this adapter is not there"),
        ({"base_model_name_or_path": "../lora"}, UnsupportedError, "the base of this adapter is an adapter"),
    ],
)
def test_adapter_without_a_base_is_refused(
    lora: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    rewrite(lora, **changes)
    with pytest.raises(error, match=message):
        resolve(str(lora))


def test_base_on_the_hub_is_asked_for_at_the_revision_that_the_adapter_names(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tiny_hub.install(tmp_path, monkeypatch)
    shutil.copytree(lora.parent / "base", hub.root / "org" / "base")
    rewrite(lora, base_model_name_or_path="org/base", revision="v3")
    assert resolve(str(lora)).config()["model_type"] == "llama"
    assert hub.revisions[0] == ("org/base", "v3")


@pytest.mark.parametrize("own", [True, False])
def test_tokenizer_is_the_adapters_own_if_it_has_one(own: bool, lora: Path, tiny_model: Callable[[str], Path]) -> None:
    if own:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(lora.parent / "base" / name, lora / name)
        settings = json.loads((lora / "tokenizer_config.json").read_text())
        (lora / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "mine"}))
    assert load_tokenizer(resolve(str(lora))).chat_template == ("mine" if own else None)
