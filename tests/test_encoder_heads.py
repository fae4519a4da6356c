"""Encoders without some heads and without the attention of a layer: graph, choice, artifact, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_encoders import FAMILIES, save_encoder

from kvslim.calibrate.heads import collect_heads
from kvslim.calibrate.sentences import Sentences
from kvslim.cli import app
from kvslim.export.manifest import read_manifest
from kvslim.loading.source import read_spec, resolve
from kvslim.methods import PruneHeads, PruneLayers
from kvslim.planning.decide import planned
from kvslim.prepared.encoder import PreparedEncoder
from kvslim.progress import Silent
from kvslim.recipe import parse_recipe
from kvslim.runtime.encoder import EncoderSession, pad
from kvslim.types import LayerPlan, Plan

RNG = np.random.default_rng(0)
TEXTS = [[2, *RNG.integers(5, 260, length).tolist(), 3] for length in (7, 12, 5, 20, 9, 16, 11, 8) * 4]
ALL = (0, 1, 2, 3)


def open_encoder(folder: Path, family: str, task: str = "feature-extraction", **settings: Any) -> PreparedEncoder:
    snapshot = resolve(str(save_encoder(family, task, folder / "model")))
    recipe = parse_recipe({"name": "test", **settings}, where="test")
    return PreparedEncoder(snapshot, read_spec(snapshot), recipe, Silent())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> PreparedEncoder:
    """An encoder that no test installs codes in."""
    return open_encoder(tmp_path_factory.mktemp("bert"), "bert")


def plan_of(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> Plan:
    return Plan(layers=(LayerPlan(layer=0, heads=first), LayerPlan(layer=1, heads=second)))


def states_with_means(prepared: PreparedEncoder, plan: Plan, means: np.ndarray, texts: list[list[int]]) -> np.ndarray:
    """Hidden states of transformers' own model, means in the place of what heads that go would give."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(prepared.snapshot.path, attn_implementation="eager").eval()

    def replace(layer: int) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            heads = inputs[0].unflatten(-1, means.shape[1:]).clone()
            gone = [head for head in ALL if head not in (plan.layers[layer].heads or ())]
            heads[..., gone, :] = torch.from_numpy(means[layer, gone]).float()
            return (heads.flatten(-2),)

        return hook

    layers = model.get_submodule(prepared.architecture.layers)
    for index, layer in enumerate(layers):
        attention = layer.get_submodule(prepared.architecture.attention)
        attention.get_submodule(prepared.architecture.output).register_forward_pre_hook(replace(index))
    ids, mask = (torch.from_numpy(array) for array in pad(texts))
    ids = torch.where(mask.bool(), ids, model.config.pad_token_id)
    with torch.inference_mode():
        states: np.ndarray = model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_without_heads_equals_torch_with_their_means(tmp_path: Path, family: str) -> None:
    """The first layer keeps two heads, the second has no attention."""
    prepared = open_encoder(tmp_path, family)
    plan, fitting = plan_of((0, 3), ()), Sentences(TEXTS, (), ())
    prepared.calibration = fitting, fitting
    statistics = prepared.statistics
    prepared.install(prepared.codes(plan))
    prepared.export(plan, tmp_path)
    ids, mask = pad(TEXTS[:4])
    found = EncoderSession(tmp_path).hidden_states(ids, mask)
    plans = (plan, plan_of(ALL, ALL))
    wanted, plain = (states_with_means(prepared, plan, statistics.output_mean, TEXTS[:4]) for plan in plans)
    seen = mask.astype(bool)
    assert np.abs(wanted - plain)[seen].max() > 1e-2
    assert np.abs(found - wanted)[seen].max() < 1e-4
    kept = [value.nbytes for value in prepared.model.state_dict().values()]
    assert (tmp_path / "model.onnx_data").stat().st_size < sum(kept) - 6 * 16 * 4 * 64 * 4 * 0.9


def test_means_and_fluctuations_are_those_of_the_outputs(bert: PreparedEncoder) -> None:
    import torch

    seen: list[np.ndarray] = []
    attention = bert.model.encoder.layer[1].attention
    hook = attention.output.dense.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].numpy()))
    with torch.inference_mode():
        for text in TEXTS:
            bert.model(input_ids=torch.tensor([text]))
    hook.remove()
    outputs = np.concatenate(seen).astype(float)
    found = collect_heads(bert.model, bert.architecture, bert.spec, TEXTS, Silent())
    np.testing.assert_allclose(found.output_mean[1].ravel(), outputs.mean(0), atol=1e-5)
    added = outputs[:, 16:32] @ attention.output.dense.weight.detach().double().numpy()[:, 16:32].T
    assert found.fluctuation[1, 1] == pytest.approx(added.var(0).sum(), rel=1e-4)


@pytest.mark.parametrize("task", ["feature-extraction", "fill-mask"])
def test_measured_choice_takes_the_head_that_loses_least(tmp_path: Path, task: str) -> None:
    """A head whose values are constant loses nothing; the loss is that of padded batches."""
    import torch

    sentences = {"calibration": {"samples": 16, "length": 48}, "validation": {"samples": 8, "length": 48}}
    prepared = open_encoder(tmp_path, "roberta", task, methods=[{"prune_heads": {"groups": 1}}], **sentences)
    with torch.no_grad():
        prepared.model.base_model.encoder.layer[1].attention.self.value.weight[32:48] = 0.0
    (fitting, chosen_by), validated = prepared.calibration, prepared.text.validated()
    assert not set(map(tuple, fitting.texts)) & set(map(tuple, (*chosen_by.texts, *validated.texts)))
    summary, trials = planned(prepared), prepared.trials()
    assert [layer.heads for layer in summary.plan.layers] == [None, (0, 1, 3)]
    assert summary.kl < 1e-4
    other = trials.divergence(PruneHeads(heads={0: (1,)}))
    assert other > 1e-3
    assert trials.divergence(PruneLayers(layers={0: "attention"})) > other
    assert trials.divergence(PruneHeads(heads={0: (1,)})) == other


def test_refit_lowers_the_loss_of_pruned_heads(tmp_path: Path) -> None:
    bert, fitting = open_encoder(tmp_path, "bert"), Sentences(TEXTS, (), ())
    bert.calibration = fitting, fitting
    trials = bert.trials()
    codes = trials.codes_of(PruneHeads(heads={0: (0, 1), 1: (2,)}))
    assert 0 < trials.loss(trials.refitted(codes)) < 0.95 * trials.loss(codes)


def test_compress_prunes_measures_and_keeps_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_encoder("bert", "feature-extraction", tmp_path / "model")
    recipe = tmp_path / "heads.yaml"
    recipe.write_text(
        "weights: int8\n"
        "methods: [{prune_heads: {groups: 3, score: fluctuation}}]\n"
        "calibration: {samples: 16, length: 48}\n"
        "validation: {samples: 8, length: 48, prompts: [16], repeats: 3}\n"
        "gates: {min_retrieval_rank_correlation: 0.0}\n"
    )
    command = ["compress", str(model), "-r", str(recipe), "-o"]
    assert app.run([*command, str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["floor"]["retrieval_rank_correlation"] > 1 - 1e-6
    assert 0 < report["artifact"]["retrieval_rank_correlation"] < 1 - 1e-3
    manifest = read_manifest(tmp_path / "out")
    assert sum(4 - len(layer.heads or ALL) for layer in manifest.plan.layers) == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Rank correlation of retrieval" in card
    assert "heads removed" in card
    assert "cache" not in card
    (tmp_path / "plan.json").write_text(manifest.plan.model_dump_json())
    assert app.run([*command, str(tmp_path / "again"), "--plan", str(tmp_path / "plan.json")]) == 0
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (tmp_path / "again" / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("recipe", "plan", "code", "fault"),
    [
        ("methods: [{prune_heads: {groups: 8}}]", None, 2, "too many"),
        ("methods: [{prune_heads: {queries: 1}}]", None, 2, "use groups"),
        ("methods: [{prune_layers: {blocks: 1}}]", None, 2, "attention alone"),
        ("methods: [{prune_heads: {groups: 1}}, kv_quant]", None, 4, "kv_quant"),
        ("calibration: {samples: 2}\nmethods: [{prune_heads: {groups: 1}}]", None, 2, "too few"),
        ("{}", {"heads": [0, 1], "cache": {"kind": "full", "stored": "int8"}}, 2, "no cache to code"),
        ("{}", {"heads": [0, 4]}, 2, "not some of"),
    ],
)
def test_what_an_encoder_cannot_lose_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, plan: dict[str, Any] | None, code: int, fault: str
) -> None:
    model = save_encoder("bert", "feature-extraction", tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = ["compress", str(model), "-r", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]
    command += ["--set", "validation.length=48", "--set", "validation.prompts=[16]"]
    if plan is not None:
        (tmp_path / "plan.json").write_text(json.dumps({"layers": [{"layer": 0, **plan}, {"layer": 1}]}))
        command += ["--plan", str(tmp_path / "plan.json")]
    assert app.run(command) == code
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
