"""Speculative decoding: proposals, the loop that verifies them, and the texts that come of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from support.models import export_slim, open_prepared, recipe_of
from support.tiny_graph import write_tiny
from support.tiny_tokenizer import byte_tokenizer
from support.tiny_writer import write_writer

from kvslim.contract import Kind, KVTensor
from kvslim.export.manifest import SPECULATIVE_GRAPH
from kvslim.export.speculative import write_speculative_graph
from kvslim.loading.source import resolve
from kvslim.methods.kv_quant import KvQuant
from kvslim.runtime.completion import Completer
from kvslim.runtime.generate import GREEDY, Sampling, load_tokenizer
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from kvslim.speculative.choice import draft_of, kind_at, window_refusal
from kvslim.speculative.estimates import MOST_PROPOSED, PRIOR_SLOPE, FreeRuns, HitRates, RunCosts, best_count
from kvslim.speculative.lookup import Lookup, match_rates
from kvslim.speculative.loop import acceptance, tokens_per_round, write_speculatively
from kvslim.speculative.speculator import FIRST_PAUSE, Speculator
from kvslim.types import Draft, DraftChoice, KVLayout

LOOKUP, WINDOW = Draft(kind="lookup"), Draft(kind="window", window=12, sinks=2)
SIDES: tuple[Kind, ...] = ("key", "value")
WARM = Sampling(temperature=0.8, top_k=5, top_p=0.9, seed=4, repetition_penalty=1.1)


def test_lookup_proposes_what_followed_the_longest_match_last() -> None:
    generator = np.random.default_rng(0)
    text = generator.integers(4, size=300).tolist()
    for end in range(5, 300, 7):
        shown, lookup = text[:end], Lookup(text[:end], match_rates())
        sizes = [size for size in range(1, 5) if any(shown[i : i + size] == shown[-size:] for i in range(end - size))]
        found, chances = lookup.proposals(6)
        if not sizes:
            assert not found
            continue
        size = max(sizes)
        place = max(i for i in range(end - size) if shown[i : i + size] == shown[-size:]) + size
        expected = shown[place:]
        while len(expected) < 6:
            expected.append(expected[len(expected) - (end - place)])
        assert found == expected[:6]
        assert len(chances) == 6


def test_lookup_learns_from_every_token_what_a_match_is_worth() -> None:
    rates = match_rates()
    lookup = Lookup([1, 2, 3, 1, 2], rates)
    before = rates.shares[2]
    lookup.add(3)
    assert rates.shares[2] > before
    lookup.add(9)
    assert rates.shares[3] < match_rates().shares[3]


def test_lookup_has_nothing_to_propose_when_the_last_token_is_new() -> None:
    assert Lookup([1, 2, 3], match_rates()).proposals(4) == ([], [])


def test_best_count_equals_the_best_of_all_counts() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        chances = generator.uniform(size=6).tolist()
        costs = np.cumsum(generator.uniform(0.1, 1.0, size=MOST_PROPOSED + 1))
        each = float(generator.uniform(0, 0.3))
        rates = [
            (1 + sum(np.prod(chances[: place + 1]) for place in range(count))) / (costs[count] + each * count)
            for count in range(7)
        ]
        assert best_count(chances, costs, each) == (int(np.argmax(rates)), pytest.approx(max(rates)))


def test_costs_lie_between_those_that_were_run() -> None:
    costs = RunCosts()
    assert costs.of_one(100) is None
    for seconds in (9.0, 1.0, 1.0):  # one disturbed run changes no median
        costs.add(100, 1, seconds)
    assert costs.of_one(100) == 1.0
    further = np.arange(MOST_PROPOSED + 1)
    np.testing.assert_allclose(costs.at(100), 1 + PRIOR_SLOPE * further)
    costs.add(100, 5, 3.0)  # what several cost more than one is no line
    np.testing.assert_allclose(costs.at(100)[:5], [1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(costs.at(100)[5:], 3 + PRIOR_SLOPE * further[1:12])
    costs.add(100, 7, 4.0)
    np.testing.assert_allclose(costs.at(100)[4:], 3 + 0.5 * further[:12])
    assert costs.of_one(1000) is None
    costs.add(1000, 1, 2.0)
    np.testing.assert_allclose(
        costs.at(1000), 2 * np.array(costs.at(100))
    )  # the ratio of another context, until it was run here


def test_numbers_that_could_lose_too_much_take_forever() -> None:
    costs = RunCosts()
    costs.add(100, 1, 2.0)
    assert np.isfinite(costs.at(100, may_lose=-1.0)).sum() == 1
    assert np.isfinite(costs.at(100, may_lose=1.0)).sum() == 2  # two tokens cost two runs at worst
    costs.add(100, 4, 5.0)  # three further tokens cost one and a half runs more; two and three cost no more than four
    assert np.isfinite(costs.at(100, may_lose=1.4)).sum() == 1
    assert np.isfinite(costs.at(100, may_lose=1.5)).sum() == 4
    assert np.isfinite(costs.at(100, may_lose=2.0)).sum() == 5


def test_hit_rates_forget_what_is_long_past() -> None:
    rates = HitRates([0.5])
    for hit in [True] * 200 + [False] * 200:
        rates.add(0, hit)
    assert rates.shares[0] < 0.05


class Chain:
    """A session whose logits depend on the last token alone."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits, self.length = logits, 1

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        self.length += len(tokens)
        found: np.ndarray = self.logits[list(tokens)]
        return found

    def rewind(self, length: int) -> None:
        self.length = length


class Guesser:
    """Proposes three tokens by the logits of another chain."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits

    def begin(self, _: Any) -> None: ...

    def proposals(self, completion: Completion, _: int) -> list[int]:
        found = list[int]()
        for _ in range(min(3, completion.left - 1)):
            last = found[-1] if found else completion.tokens[-1]
            found.append(completion.foreseen(self.logits[last], found))
        return found

    def ran(self, *_: Any) -> None: ...

    def learn(self, *_: Any) -> None: ...


def chain_text(logits: np.ndarray, draft: np.ndarray, sampling: Sampling, tokens: int) -> Completion:
    completion = Completion(byte_tokenizer(), [0], tokens, sampling=sampling)
    session, guesser = cast("DecodeSession", Chain(logits)), cast("Speculator", Guesser(draft))
    list(write_speculatively(session, completion, logits[0], guesser))
    return completion


@pytest.mark.parametrize("tokens", [5_000, pytest.param(100_000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.7, seed=3), Sampling(1.3, top_k=4), Sampling(1.0, top_p=0.8)], ids=str
)
def test_tokens_follow_the_models_distribution_when_a_draft_proposes(sampling: Sampling, tokens: int) -> None:
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((6, 6)).astype(np.float32)
    draft = logits + generator.standard_normal((6, 6)).astype(np.float32)
    completion = chain_text(logits, draft, sampling, tokens)
    assert 1.3 < (tokens_per_round(completion.rounds) or 0) < 4
    counts = np.zeros((6, 6))
    np.add.at(counts, (completion.tokens[:-1], completion.tokens[1:]), 1)
    expected = np.stack([allowed(row, sampling) for row in logits]) * counts.sum(1, keepdims=True)
    assert not counts[expected == 0].any()
    likely = expected > 0
    statistic = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum()) - 6
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)  # about one in ten thousand is beyond


def allowed(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution that a token is drawn from, computed without the code that draws."""
    weights = np.exp(logits.astype(np.float64) / sampling.temperature)
    order = sorted(range(len(weights)), key=lambda token: -weights[token])[: sampling.top_k or None]
    total, kept, reached = sum(weights[token] for token in order), list[int](), 0.0
    for token in order:
        if reached < sampling.top_p * total:
            kept.append(token)
            reached += weights[token]
    found = np.zeros(len(weights))
    found[kept] = weights[kept] / weights[kept].sum()
    return found


def test_text_is_the_same_when_another_draft_proposes() -> None:
    generator = np.random.default_rng(2)
    logits = generator.standard_normal((6, 6)).astype(np.float32)
    drafts = [logits, logits + 1.0, generator.standard_normal((6, 6)).astype(np.float32)]
    texts = [chain_text(logits, draft, Sampling(1.0), 400) for draft in drafts]
    assert texts[0].tokens == texts[1].tokens == texts[2].tokens
    assert tokens_per_round(texts[0].rounds) == pytest.approx(4, abs=0.1)


def test_acceptance_is_by_position() -> None:
    assert acceptance([(2, 2), (2, 0), (1, 1), (0, 0)]) == (2 / 3, 1 / 2)
    assert tokens_per_round([(2, 2), (2, 0), (1, 1), (0, 0)]) == 1.75
    assert acceptance([]) == ()
    assert tokens_per_round([]) is None


@pytest.fixture
def session_of(tmp_path: Path) -> Callable[..., DecodeSession]:
    def made(**variant: Any) -> DecodeSession:
        write_tiny(tmp_path / "model.onnx", vocab=256, **variant)
        write_speculative_graph(tmp_path)
        return DecodeSession(tmp_path / "speculative.onnx", capacity=480)

    return made


@pytest.mark.parametrize("draft", [LOOKUP, WINDOW], ids=lambda draft: draft.kind)
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("variant", [{}, {"int8": True}, {"positions": 512}], ids=["fp32", "int8", "positions"])
def test_text_is_that_of_plain_decoding(
    session_of: Callable[..., DecodeSession], draft: Draft, sampling: Sampling, variant: dict[str, Any]
) -> None:
    session = session_of(**variant)
    ids = np.random.default_rng(0).integers(256, size=60).tolist()
    plain, drafted = (Completion(byte_tokenizer(), ids, 400, sampling=sampling) for _ in range(2))
    logits = session.prefill(ids)
    list(write(session, [plain], logits[None]))
    session.rewind(len(ids))
    speculator = Speculator(session, draft, costs=FreeRuns())
    list(write_speculatively(session, drafted, logits, speculator))
    assert drafted.tokens == plain.tokens
    assert any(proposed for proposed, _ in drafted.rounds)
    assert any(taken for _, taken in drafted.rounds)
    assert session.length == len(ids) + len(drafted.tokens) - 1


@pytest.fixture(scope="module")
def demo_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model over a cache of float32 and over one of int8, each in a folder of that name."""
    folder = tmp_path_factory.mktemp("demo")
    prepared = open_prepared("demo", recipe_of([KvQuant(bits=8)]))
    (folder / "float32").mkdir()
    prepared.build_plain(folder / "float32")
    export_slim(prepared, folder / "int8")
    for cache in ("float32", "int8"):
        write_speculative_graph(folder / cache)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)  # thousands of steps, on a busy machine
@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_greedy_text_of_2000_tokens_is_that_of_plain_decoding(demo_graphs: Path, cache: str) -> None:
    """A trained model, with weights in float32."""
    session = DecodeSession(demo_graphs / cache / SPECULATIVE_GRAPH, capacity=2048)
    tokenizer = load_tokenizer(resolve("demo").path)
    ids = tokenizer.encode("Once upon a time there was a lamp").ids
    logits = session.prefill(ids)
    plain = Completion(tokenizer, ids, 2000)
    list(write(session, [plain], logits[None]))
    for draft in (LOOKUP, Draft(kind="window", window=32, sinks=4)):
        session.rewind(len(ids))
        drafted, speculator = Completion(tokenizer, ids, 2000), Speculator(session, draft, costs=FreeRuns())
        list(write_speculatively(session, drafted, logits, speculator))
        assert drafted.tokens == plain.tokens
        assert len(drafted.tokens) == 2000
        assert (tokens_per_round(drafted.rounds) or 0) > 1.5
        assert (len(speculator._draft_times) > 1) == (draft.kind == "window")


@pytest.fixture
def completers(tmp_path: Path) -> Callable[[Draft | None], Completer]:
    write_writer(tmp_path)
    write_speculative_graph(tmp_path)
    return lambda draft: Completer(tmp_path, byte_tokenizer(), capacity=200, draft=draft)


def test_completer_counts_rounds_and_keeps_its_cache(completers: Callable[[Draft | None], Completer]) -> None:
    plain, drafted = completers(None), completers(LOOKUP)
    assert drafted._speculator is not None
    drafted._speculator._costs = FreeRuns()
    for ids in ([5, 6, 7, 8] * 4, [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10]):
        assert "".join(drafted.stream(ids, 60)) == "".join(plain.stream(ids, 60))
        usage = drafted.usage
        assert usage is not None
        assert plain.usage is not None
        assert usage.tokens_per_round is not None
        assert usage.new_tokens == plain.usage.new_tokens
        assert usage.cached_tokens == plain.usage.cached_tokens
        assert usage.accepted_tokens <= usage.proposed_tokens
        assert plain.usage.tokens_per_round is None


def test_completer_goes_on_when_a_text_was_closed_halfway(completers: Callable[[Draft | None], Completer]) -> None:
    drafted = completers(LOOKUP)
    assert drafted._speculator is not None
    drafted._speculator._costs = FreeRuns()
    ids = [5, 6, 7, 8] * 4
    pieces = drafted.stream(ids, 100)
    for _ in range(9):
        next(pieces)
    pieces.close()
    assert "".join(drafted.stream(ids, 60)) == "".join(completers(None).stream(ids, 60))


def test_nothing_is_proposed_where_the_cache_cannot_go_back(session_of: Callable[..., DecodeSession]) -> None:
    session = session_of()
    speculator = Speculator(session, LOOKUP, costs=FreeRuns())
    ids = [1, 2, 3, 4] * 6
    speculator.begin(ids)
    completion = Completion(byte_tokenizer(), ids, 20)
    completion.add(session.prefill(ids))
    speculator.learn(completion.tokens, 0)
    speculator._lookup = Lookup([1, 2, 3, 4] * 4, match_rates())
    assert speculator.proposals(completion, session.length)
    asked = list[int]()
    session.takes_back = lambda _: bool(asked.append(1))  # type: ignore
    for _ in range(1 + FIRST_PAUSE):  # nor is it asked for some rounds
        assert not speculator.proposals(completion, session.length)
    assert len(asked) == MOST_PROPOSED.bit_length()
    session.takes_back = lambda _: True  # type: ignore[method-assign]
    assert speculator.proposals(completion, session.length)


@pytest.mark.parametrize(
    ("choice", "context", "window", "kind"),
    [
        ("none", 8192, None, None),
        ("lookup", 8192, None, "lookup"),
        ("auto", 8192, None, "window"),
        ("auto", 512, None, "lookup"),
        ("window", 512, None, "window"),
        ("window", 8192, 64, "lookup"),  # of a sliding window only the operator knows what was dropped
    ],
)
def test_draft_follows_from_the_caches_and_the_context(
    choice: DraftChoice, context: int, window: int | None, kind: str | None
) -> None:
    tensors = (KVTensor(layer=0, kind=side, heads=1, dim=8, dtype="int8", window=window) for side in SIDES)
    draft = draft_of(choice, KVLayout(tensors=tuple(tensors)), context)
    assert (draft and draft.kind) == kind


def test_window_draft_leaves_short_texts_to_the_lookup() -> None:
    assert [kind_at(Draft(kind="window"), context) for context in (779, 780)] == ["lookup", "window"]
    assert kind_at(LOOKUP, 8192) == "lookup"


def test_layer_that_lets_no_window_draft_read_it_is_named() -> None:
    own, ring, full = (
        KVTensor(layer=layer, kind="key", heads=1, dim=8, dtype="int8", window=window, cache=cache)
        for layer, window, cache in ((3, 64, "full"), (2, 64, "window"), (1, None, "full"))
    )
    assert window_refusal(KVLayout(tensors=(full,))) is None
    assert "layer 2 keeps a cache of kind window" in str(window_refusal(KVLayout(tensors=(full, ring))))
    assert "layer 3 has the model's own sliding window" in str(window_refusal(KVLayout(tensors=(full, own, ring))))
