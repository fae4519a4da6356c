"""Calibration statistics against a direct computation from the model's own keys, queries and values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gathering import attention, gather, states, windows_of
from support.models import open_prepared, recipe_of

from kvslim.calibrate import cache
from kvslim.calibrate.recorder import Recorder, rope_frequencies
from kvslim.calibrate.recording import SINKS, Recording, finish, merge
from kvslim.calibrate.rope import rotate
from kvslim.errors import UsageError
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Silent
from kvslim.transform.surgery import slim_modules


def test_key_moment_equals_brute_force_over_all_positions(prepared: PreparedDecoder) -> None:
    windows, context, layer = windows_of(prepared, 6), 50, 1
    statistics = gather(prepared, windows, context)
    frequencies = rope_frequencies(slim_modules(prepared.model, prepared.architecture)[layer])
    heard = states(prepared, windows, layer)
    received = attention(heard).mean((2, 3))
    bare = rotate(heard["k"], -np.arange(40), frequencies)[:, :, SINKS:]
    for head in range(2):
        body = [rotate(bare[:, head], np.full(36, t), frequencies).reshape(-1, 16) for t in range(context)]
        keys = np.concatenate([*body, heard["k"][:, head, :SINKS].reshape(-1, 16)])
        body_weights = np.tile(received[:, head, SINKS:].ravel() / context, context)
        weights = np.concatenate([body_weights, received[:, head, :SINKS].ravel()])
        expected = np.cov(keys.T, aweights=weights, bias=True)
        np.testing.assert_allclose(statistics.key_moment[layer, head], expected, atol=1e-5)


def test_sink_mass_is_the_attention_that_the_first_tokens_receive(prepared: PreparedDecoder) -> None:
    windows = windows_of(prepared, 3)
    expected = attention(states(prepared, windows, 0))[..., :SINKS].sum(-1).mean((0, 2, 3))
    np.testing.assert_allclose(gather(prepared, windows).sink_mass[0], expected, atol=1e-6)


def test_output_moments_are_those_of_the_attention_outputs(prepared: PreparedDecoder) -> None:
    windows = windows_of(prepared, 5)
    heard = states(prepared, windows, 1)
    outputs = np.einsum("bhgst,bhtd->hgbsd", attention(heard), heard["v"]).reshape(2, 2, -1, 16)
    statistics = gather(prepared, windows)
    np.testing.assert_allclose(statistics.output_mean[1], outputs.mean(2).reshape(4, 16), atol=1e-6)
    expected = np.mean([[np.cov(head.T, bias=True) for head in group] for group in outputs], axis=1)
    np.testing.assert_allclose(statistics.output_moment[1], expected, atol=1e-5)


def test_fluctuation_is_the_variance_of_what_a_head_adds(prepared: PreparedDecoder) -> None:
    windows, layer = windows_of(prepared, 5), 1
    heard = states(prepared, windows, layer)
    outputs = np.einsum("bhgst,bhtd->hgbsd", attention(heard), heard["v"]).reshape(4, -1, 16)
    weight = prepared.model.model.layers[layer].self_attn.o_proj.weight.detach().double().numpy().reshape(64, 4, 16)
    expected = [(outputs[head] @ weight[:, head].T).var(0).sum() for head in range(4)]
    np.testing.assert_allclose(gather(prepared, windows).fluctuation[layer], expected, rtol=1e-4)


def test_blocks_of_queries_change_nothing(prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = windows_of(prepared, 2)
    whole = gather(prepared, windows)
    monkeypatch.setattr("kvslim.calibrate.attended.QUERY_BLOCK", 7)
    for name, array in gather(prepared, windows).arrays().items():
        np.testing.assert_allclose(array, getattr(whole, name), atol=1e-6)


def test_output_gram_prices_an_error_as_the_layer_output_does(prepared: PreparedDecoder) -> None:
    gram = gather(prepared, windows_of(prepared, 2)).output_gram[0]
    weight = prepared.model.model.layers[0].self_attn.o_proj.weight.detach().double().numpy()
    error = np.random.default_rng(0).standard_normal(16)
    heads = weight.reshape(64, 4, 16)[:, 2:]  # the query heads of kv head 1
    expected = sum(np.square(heads[:, head] @ error).sum() for head in range(2))
    assert error @ gram[1] @ error == pytest.approx(expected, rel=1e-9)


def test_size_does_not_grow_when_tokens_do(prepared: PreparedDecoder) -> None:
    small, large = (gather(prepared, windows_of(prepared, count, 120)) for count in (32, 64))
    sizes = [sum(array.nbytes for array in statistics.arrays().values()) for statistics in (small, large)]
    assert sizes[1] <= 1.1 * sizes[0]


def test_model_is_left_silent_when_interrupted(prepared: PreparedDecoder) -> None:
    class Interrupted(Silent):
        def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
            yield next(iter(items))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of = prepared.model, prepared.architecture, prepared.spec
        Recorder(*of, windows_of(prepared, 2), seed=0).record(Interrupted())
    assert all(slim.observer is None for slim in slim_modules(prepared.model, prepared.architecture))


def recorded(prepared: PreparedDecoder, windows: np.ndarray, part: range | None = None, seed: int = 0) -> Recording:
    parts = prepared.model, prepared.architecture, prepared.spec
    return Recorder(*parts, windows, seed).record(Silent(), part)


# What is not a sum over the text: exact. The rest is up to the rounding of float64 sums in another order.
EXACT = {
    *("output_gram", "key_samples", "value_samples", "received", "positions"),
    *("frequencies", "context", "sink_keys", "sink_values", "windows", "loss_mask"),
}


@pytest.mark.parametrize("cuts", [[3], [1, 4]])
def test_parts_recorded_apart_make_the_statistics_of_the_whole(prepared: PreparedDecoder, cuts: list[int]) -> None:
    windows = windows_of(prepared, 6)
    ends = itertools.pairwise([0, *cuts, 6])
    parts = [recorded(prepared, windows, range(*end)) for end in ends]
    merged = finish(merge(*reversed(parts)), context=200)
    whole = gather(prepared, windows)
    for name, array in whole.arrays().items():
        if name in EXACT:
            np.testing.assert_array_equal(getattr(merged, name), array)
        else:
            np.testing.assert_allclose(getattr(merged, name), array, rtol=1e-10, atol=1e-13)


def test_sinks_are_sampled_of_the_first_windows_of_the_whole_text(
    prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvslim.calibrate.recorder.SAMPLES", 64)
    windows = windows_of(prepared, 6)
    merged = merge(*(recorded(prepared, windows, part) for part in (range(3), range(3, 5), range(5, 6))))
    whole = recorded(prepared, windows)
    assert whole.layers[0].samples["sink_key"].shape[1] == 4 * SINKS
    np.testing.assert_array_equal(merged.layers[0].samples["sink_key"], whole.layers[0].samples["sink_key"])


def test_recordings_that_do_not_fit_together_are_refused(prepared: PreparedDecoder) -> None:
    windows = windows_of(prepared, 4)
    first = recorded(prepared, windows, range(2))
    for message, *others in (
        ("window 2 is not recorded", recorded(prepared, windows, range(3, 4))),
        ("window 1 is recorded twice", recorded(prepared, windows, range(1, 4))),
        ("different texts", recorded(prepared, np.roll(windows, 1), range(2, 4))),
        ("different texts", recorded(prepared, windows, range(2, 4), seed=1)),
    ):
        with pytest.raises(UsageError, match=message):
            merge(first, *others)
    with pytest.raises(UsageError, match="no recordings"):
        merge()
    with pytest.raises(UsageError, match="2 of 4 windows"):
        finish(first, context=64)


def test_digest_differs_when_any_number_does(prepared: PreparedDecoder) -> None:
    statistics = gather(prepared, windows_of(prepared, 2))
    assert statistics.digest() == gather(prepared, windows_of(prepared, 2)).digest()
    moved = replace(statistics, sink_mass=statistics.sink_mass + 1e-12)
    assert moved.digest() != statistics.digest()


def test_statistics_come_from_the_disk_when_nothing_changed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path))
    first = open_prepared(tiny_llama, recipe_of()).statistics
    (stored,) = (tmp_path / "statistics").iterdir()
    monkeypatch.setattr("kvslim.prepared.decoder.Recorder", None)
    again = open_prepared(tiny_llama, recipe_of()).statistics
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(getattr(again, name), array)
    for size in (100, 0):
        stored.write_bytes(stored.read_bytes()[:size])
        assert cache.load_statistics(stored.stem) is None


def test_key_differs_when_any_part_does() -> None:
    keys = {
        cache.content_key(*parts) for parts in (("a", {}, None), ("b", {}, None), ("a", {"x": 1}, None), ("a", {}, "t"))
    }
    assert len(keys) == 4
