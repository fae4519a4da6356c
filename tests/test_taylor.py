"""Taylor scores of heads: against finite differences, on the tokens that count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gathering import windows_of
from support.models import open_prepared, recipe_of, torch_logits

from kvslim import pipeline
from kvslim.calibrate.taylor import taylor_scores
from kvslim.contract import ModelSpec
from kvslim.errors import UsageError
from kvslim.methods import PruneHeads
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Silent
from kvslim.transform.surgery import attention_modules


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def prepared(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> PreparedDecoder:
    return open_prepared(tiny_model(request.param), recipe_of())


def scores_of(prepared: PreparedDecoder, windows: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    return taylor_scores(prepared.model, prepared.architecture, prepared.spec, windows, loss_mask, Silent())


def loss_with(
    prepared: PreparedDecoder, window: np.ndarray, counts: np.ndarray, layer: int, head: int, gate: float
) -> float:
    """Mean loss of the tokens that count, one head's output scaled, in float64."""
    import torch

    attention = attention_modules(prepared.model, prepared.architecture)[layer]
    output = attention.get_submodule(prepared.architecture.output)
    size = prepared.spec.head_dim

    def scale(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states = inputs[0].clone()
        states[..., head * size : (head + 1) * size] *= gate
        return (states,)

    hook = output.register_forward_pre_hook(scale)
    with torch.inference_mode():
        logits = prepared.model(torch.from_numpy(window[None]), use_cache=False).logits[0].double()
    hook.remove()
    losses = -logits.log_softmax(-1)[range(len(window) - 1), window[1:]].numpy()
    return float(losses[counts[1:]].mean())


def test_scores_are_the_slopes_of_the_loss(prepared: PreparedDecoder) -> None:
    windows = windows_of(prepared, 2, 24)
    counted = np.random.default_rng(0).random(windows.shape) < 0.5
    found = scores_of(prepared, windows, counted)
    assert found.shape == (2, 4)
    for layer, head in ((0, 1), (1, 3)):
        up, down = (
            [loss_with(prepared, *pair, layer, head, gate) for pair in zip(windows, counted, strict=True)]
            for gate in (1.01, 0.99)
        )
        slopes = np.abs(np.subtract(up, down)) / 0.02
        assert found[layer, head] == pytest.approx(slopes.mean(), rel=0.02, abs=1e-5)


def test_windows_without_a_token_that_counts_change_nothing(prepared: PreparedDecoder) -> None:
    windows = windows_of(prepared, 3, 24)
    counted = np.ones(windows.shape, bool)
    counted[1] = False
    np.testing.assert_allclose(
        scores_of(prepared, windows, counted), scores_of(prepared, windows[[0, 2]], counted[[0, 2]])
    )


def test_scoring_leaves_the_model_as_it_was(prepared: PreparedDecoder) -> None:
    windows = windows_of(prepared, 1)
    before = torch_logits(prepared, windows[0])
    scores_of(prepared, windows, np.ones(windows.shape, bool))
    np.testing.assert_array_equal(torch_logits(prepared, windows[0]), before)
    assert all(parameter.grad is None for parameter in prepared.model.parameters())


def test_plan_takes_the_group_of_the_smallest_score(tiny_model: Callable[[str], Path]) -> None:
    recipe = recipe_of((PruneHeads(groups=1, score="taylor"),))
    prepared = open_prepared(tiny_model("llama"), recipe)
    scores = prepared.trials().taylor.reshape(2, 2, 2).sum(-1)
    layer, group = np.unravel_index(scores.argmin(), scores.shape)
    plan = pipeline.plan(str(tiny_model("llama")), recipe).plan
    kept = tuple(head for head in range(4) if head // 2 != group)
    assert [entry.heads for entry in plan.layers] == [kept if index == layer else None for index in range(2)]


def test_encoders_have_no_taylor_score() -> None:
    encoder = ModelSpec(
        model_type="bert",
        layers=2,
        hidden_size=64,
        q_heads=4,
        kv_heads=4,
        head_dim=16,
        vocab_size=99,
        max_context=64,
        windows=(None, None),
        task="fill-mask",
    )
    with pytest.raises(UsageError, match="next tokens"):
        PruneHeads(groups=1, score="taylor").check(encoder)
