"""The graph for speculative decoding and the window draft that reads it, next to transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.models import open_prepared, recipe_of
from transformers import AutoModelForCausalLM, DynamicCache

from kvslim.export.speculative import write_speculative_graph
from kvslim.runtime.session import DecodeSession
from kvslim.speculative.window import ROOM, WindowDraft


def test_window_draft_is_the_model_over_sinks_and_recent_tokens(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Against transformers, whose cache is cut to the same rows; positions stay those of the text."""
    folder, tokens = tiny_model("llama"), np.random.default_rng(0).integers(90, size=140)
    open_prepared(folder, recipe_of()).build_plain(tmp_path)
    write_speculative_graph(tmp_path)
    target = DecodeSession(tmp_path / "speculative.onnx", capacity=160)
    draft = WindowDraft(target, window=10, sinks=3)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for length in (8, 40, 41, 41 + ROOM, 139):
        if target.length < length:
            target.step(tokens[target.length : length])
        draft.follow()
        found = [draft.step(token) for token in tokens[length : length + 1]]
        first = draft._session.left_out + 3 if draft._session.left_out else 0
        rows = [*range(min(3, length)), *range(max(first, 3), length)] if first else list(range(length))
        np.testing.assert_allclose(found[0], expected_logits(model, tokens, length, rows), atol=2e-4)
    assert draft._session.left_out == 41 + ROOM - 10 - 3


def expected_logits(model: Any, tokens: np.ndarray, length: int, rows: list[int]) -> np.ndarray:
    with torch.no_grad():
        cache = model(torch.from_numpy(tokens[None, :length]), use_cache=True).past_key_values
        cut = DynamicCache()
        for layer, kept in enumerate(cache.layers):
            cut.update(kept.keys[:, :, rows], kept.values[:, :, rows], layer)
        token = torch.from_numpy(tokens[None, length : length + 1])
        found = model(token, past_key_values=cut, position_ids=torch.tensor([[length]]), use_cache=True)
    logits: np.ndarray = found.logits[0, -1].numpy()
    return logits


def test_graph_for_speculation_gives_the_logits_of_all_positions(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    open_prepared(tiny_model("llama"), recipe_of()).build_plain(tmp_path)
    write_speculative_graph(tmp_path)
    tokens = np.random.default_rng(0).integers(90, size=12)
    plain = DecodeSession(tmp_path, capacity=32)
    expected = np.concatenate([plain.step([token]) for token in tokens])
    several = DecodeSession(tmp_path / "speculative.onnx", capacity=32)
    found = np.concatenate([several.step(tokens[:5]), several.step(tokens[5:])])
    np.testing.assert_allclose(found, expected, atol=1e-5)
