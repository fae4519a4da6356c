"""What drafts that KVSlim does not have would gain at best: fewer layers, Jacobi iteration, heads for later tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.models import OpenModel, add_speculative_graph
from benchmarks.prompts import KINDS, prompt
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.speed.speculative import COUNTS, Timetable, ids_of, text_file
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.loading.model import load_model
from kvslim.loading.source import resolve

PIECE = 256  # tokens of a piece of text that heads are fitted to
RIDGE = 1e-3  # added to each feature's power, as a share
Texts = Sequence[Sequence[int]]
TABLE = Table(
    (
        Column("option", "draft"),
        Column("first", "first right", ".0%"),
        Column("count", "proposals a run"),
        Column("per_round", "tokens a run", ".2f"),
        Column("speed", "speed at best", ".2f"),
    )
)


@benchmark(
    "smollm2",
    table=TABLE,
    quick={
        "kinds": ("chat",),
        "context": 48,
        "tokens": 6,
        "searched": 8,
        "skips": (1,),
        "most": 2,
        "fitted": 512,
        "repeats": 1,
        "weights": "fp32",
    },
)
def draft_options(
    source: Source,
    *,
    kinds: tuple[str, ...] = tuple(KINDS),
    context: int = 128,
    tokens: int = 64,
    searched: int = 64,
    skips: tuple[int, ...] = (8, 12, 15),
    most: int = 4,
    fitted: int = 16384,
    repeats: int = 9,
    weights: str = "int4",
) -> Iterator[Values]:
    """What other drafts would gain at best, on greedy texts of five kinds behind a short context.

    Proposals are those of the model in float32, so they are judged by its own greedy text. The speed follows from how
    often they are right, with the best fixed number of proposals: a run costs what it takes with quantised weights on
    this machine, and a proposal its share of the weights that a token is multiplied with. All else is free. The layers
    to skip are searched one after another, on the ends of the prompts; they read the model's own cache. Heads are
    fitted by ridge regression to the calibration text.
    """
    model = OpenModel(source, LITTLE, weights=weights)
    costs, encode = _costs(model, context, repeats), ids_of(model.tokenizer)
    story, document = (text_file(text, source.folder) for text in (source.validation, source.calibration))
    texts = [prompt(kind, story, document, encode, context) for kind in kinds]
    corpus = np.array(encode(document.read_text(encoding="utf-8"))[:fitted])
    parent = Parent(source)
    written = [parent.continued(text, tokens) for text in texts]
    for kept in parent.searched([text[-searched:] for text in texts], skips):
        rates = parent.rates_of_layers(texts, written, kept, most)
        share = parent.head_share + (1 - parent.head_share) * len(kept) / parent.depth
        skipped = f"{parent.depth - len(kept)} of {parent.depth} layers skipped"
        yield {"option": skipped, **_at_best(rates, costs, share * costs[0])}
    first, per_round = parent.jacobi(texts, tokens, most)
    speed = float(per_round * costs[0] / costs[most])
    yield {"option": "Jacobi iteration", "first": first, "count": most, "per_round": per_round, "speed": speed}
    for name, rate in parent.rates_of_heads(corpus, texts, written).items():
        yield {"option": f"head that reads the {name}", **_at_best([rate], costs, parent.head_share * costs[0])}


def _costs(model: OpenModel, context: int, repeats: int) -> np.ndarray:
    """Seconds of runs of 1, 2, ... tokens on one thread."""
    folder = model.export()
    add_speculative_graph(folder)
    model.release()
    session = Timetable(folder / "speculative.onnx", capacity=context + COUNTS[-1], threads=1)
    found = session.measure(context, repeats)
    return np.interp(np.arange(1, COUNTS[-1] + 1), list(found), list(found.values()))


def _at_best(rates: Sequence[float], costs: np.ndarray, each: float) -> Values:
    """What a draft gains with the best number of proposals, at least one.

    Args:
        rates: How often each proposal of a run is right where those before it are.
        costs: Of runs of 1, 2, ... tokens.
        each: Of a proposal.
    """
    counts = np.arange(1, len(rates) + 1)
    expected = 1 + np.cumsum(np.cumprod(rates))
    speeds = expected * costs[0] / (costs[counts] + each * counts)
    best = int(speeds.argmax())
    return {"first": rates[0], "count": best + 1, "per_round": float(expected[best]), "speed": float(speeds[best])}


class Parent:
    """The model in torch, whose greedy texts drafts have to foresee.

    Attributes:
        depth: Layers.
        head_share: Share of the output head in the weights that a token is multiplied with.
    """

    def __init__(self, source: Source) -> None:
        self._model: Any = load_model(resolve(source.model))
        self._layers = list(self._model.model.layers)
        self.depth = len(self._layers)
        head = self._model.lm_head.weight.numel()
        self.head_share = head / (head + sum(weight.numel() for weight in self._model.model.layers.parameters()))

    @contextmanager
    def _only(self, kept: Sequence[int]) -> Iterator[None]:
        """Lets the model run some of its layers."""
        self._model.model.layers = torch.nn.ModuleList(self._layers[place] for place in kept)
        try:
            yield
        finally:
            self._model.model.layers = torch.nn.ModuleList(self._layers)

    @torch.inference_mode()
    def _run(self, tokens: Sequence[int], cache: DynamicCache, start: int) -> list[int]:
        """The most likely token after each of some tokens, which stand in the cache from a row on."""
        for layer in cache.layers:
            layer.crop(min(0, start - layer.get_seq_length()))
        places = torch.arange(start, start + len(tokens))
        found = self._model(
            torch.tensor([tokens]),
            past_key_values=cache,
            position_ids=places[None],
            attention_mask=(torch.arange(start + len(tokens)) <= places[:, None])[None, None],
        )
        tops: list[int] = found.logits[0].argmax(-1).tolist()
        return tops

    def continued(self, text: Sequence[int], tokens: int) -> list[int]:
        """So many tokens that the model writes greedily after a text."""
        cache = DynamicCache()
        written = self._run(text, cache, 0)[-1:]
        while len(written) < tokens:
            written += self._run(written[-1:], cache, len(text) + len(written) - 1)
        return written

    # Fewer layers

    def searched(self, texts: Texts, skips: Sequence[int]) -> Iterator[list[int]]:
        """The layers that stay where so many are skipped, one after another those that change least.

        The first one stays always. Texts have the same length.
        """
        tokens, kept = torch.tensor(texts), list(range(self.depth))
        with torch.inference_mode():
            tops = self._model(tokens, use_cache=False).logits.argmax(-1)
        while len(kept) > self.depth - max(skips):
            fewer = [[layer for layer in kept if layer != skipped] for skipped in kept[1:]]
            kept = max(fewer, key=lambda layers: self._agreement(tokens, tops, layers))
            if self.depth - len(kept) in skips:
                yield kept

    @torch.inference_mode()
    def _agreement(self, tokens: Tensor, tops: Tensor, kept: Sequence[int]) -> tuple[float, float]:
        """How often some layers alone find the most likely tokens, and how likely they find them."""
        with self._only(kept):
            logits = self._model(tokens, use_cache=False).logits
        likely = logits.gather(-1, tops[..., None])[..., 0] - logits.logsumexp(-1)
        return float((logits.argmax(-1) == tops).double().mean()), float(likely.mean())

    def rates_of_layers(self, texts: Texts, written: Texts, kept: Sequence[int], most: int) -> list[float]:
        """How often the first, the second ... proposal of some layers is right, where those before it are."""
        hits, trials = np.zeros(most), np.zeros(most)
        for text, answer in zip(texts, written, strict=True):
            cache, whole, place = DynamicCache(), [*text, *answer], len(text)
            self._run(text, cache, 0)
            while place < len(whole) - 1:
                taken = self._taken(whole, place, cache, kept, most)
                hits[:taken] += 1
                trials[: min(taken + 1, most, len(whole) - 1 - place)] += 1
                self._run(whole[place : place + taken + 1], cache, place)
                place += taken + 1
        return list(map(float, hits / np.maximum(1, trials)))

    def _taken(self, whole: list[int], place: int, cache: DynamicCache, kept: Sequence[int], most: int) -> int:
        """How many tokens behind a place some layers foresee, which read the cache of all layers up to there."""
        end = min(len(whole) - 1, place + most)
        with self._only(kept):
            for at in range(place, end):
                if self._run(whole[at : at + 1], cache, at) != whole[at + 1 : at + 2]:
                    return at - place
        return end - place

    # Jacobi iteration

    def jacobi(self, texts: Texts, tokens: int, most: int) -> tuple[float, float]:
        """How often the first guess is right, and tokens of a run, where guesses are what the last run made of its own.

        Santilli et al., "Accelerating Transformer Inference for Translation via Parallel Decoding", 2023.
        """
        taken = [count for text in texts for count in self._iterated(text, tokens, most)]
        return float(np.mean([count > 0 for count in taken])), 1 + float(np.mean(taken))

    def _iterated(self, text: Sequence[int], tokens: int, most: int) -> Iterator[int]:
        """How many guesses of each run are right."""
        cache, guesses = DynamicCache(), list(text[-most:])
        written = self._run(text, cache, 0)[-1:]
        while len(written) < tokens:
            found = self._run([written[-1], *guesses], cache, len(text) + len(written) - 1)
            right = [guess == top for guess, top in zip(guesses, found, strict=False)]
            taken = [*right, False].index(False)
            written += found[: taken + 1]
            guesses = [*found[taken + 1 :], *found[-1:] * most][:most]
            yield taken

    # Heads for the token after the next

    def rates_of_heads(self, corpus: np.ndarray, texts: Texts, written: Texts) -> dict[str, float]:
        """How often a head is right that foresees the last hidden state of the next token, by what it reads."""
        size = self._model.config.hidden_size
        gram = torch.zeros(2 * size + 1, 2 * size + 1, dtype=torch.float64)
        cross = torch.zeros(2 * size + 1, size, dtype=torch.float64)
        for piece in corpus[: len(corpus) // PIECE * PIECE].reshape(-1, PIECE):
            features, later = self._features(piece.tolist())
            gram += features.T @ features
            cross += features.T @ later
        rates = {}
        for name, used in (("hidden state", size + 1), ("hidden state and the next token", 2 * size + 1)):
            power = gram[:used, :used]
            matrix = torch.linalg.solve(power + RIDGE * power.diagonal().diag(), cross[:used])
            found = [self._right(text, answer, matrix) for text, answer in zip(texts, written, strict=True)]
            rates[name] = float(torch.cat(found).double().mean())
        return rates

    @torch.inference_mode()
    def _features(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Of all tokens but the last: hidden state, one, next token's embedding; and the hidden state of the next."""
        ids = torch.tensor([tokens])
        hidden = self._model.model(ids, use_cache=False).last_hidden_state[0].double()
        embedded = self._model.get_input_embeddings()(ids)[0].double()
        return torch.cat([hidden[:-1], torch.ones(len(tokens) - 1, 1).double(), embedded[1:]], 1), hidden[1:]

    @torch.inference_mode()
    def _right(self, text: Sequence[int], answer: Sequence[int], matrix: Tensor) -> Tensor:
        """Which tokens of an answer after its first a head finds, two tokens ahead."""
        features, _ = self._features([*text, *answer])
        hidden = features[len(text) - 1 : -1, : len(matrix)] @ matrix
        tops = self._model.lm_head(hidden.float()).argmax(-1)
        return tops == torch.tensor(answer[1:])
