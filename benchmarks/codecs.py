"""What each codec of the cache costs, by bytes per token: mean KL and recall of the exported graph on held-out text.

    python benchmarks/codecs.py [--plot]

Calibrated on 64 x 512 tokens, judged on 24 x 512 through the cache in chunks of 16, in onnxruntime. Rows of the planner
are as `kvslim compress --kv-ratio` makes them; the others keep the output projections that the model had. `--plot` also
draws docs/images/codecs.svg.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from subjects import LENGTH, Subject, subjects

from kvslim.types import Plan

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "codecs.svg"
LONG = 16384
MINMAX = {"granularity": "per_channel", "clip": "minmax", "centre": False}
RATIOS = (16 / 3, 8, 32 / 3, 64 / 5, 16)
REFERENCE = "minmax int4"
CODECS: dict[str, list[dict[str, Any]]] = {
    "minmax int8": [{"kv_quant": {**MINMAX, "bits": 8}}],
    REFERENCE: [{"kv_quant": {**MINMAX, "bits": 4}}],
    "`kv_quant` int8": [{"kv_quant": {"bits": 8}}],
    "`kv_quant` int4": [{"kv_quant": {"bits": 4}}],
    "`kv_pca` rank 32, int8": [{"kv_pca": {"rank": 32}}, {"kv_quant": {"bits": 8}}],
    "`kv_hdc` int8, one step": [{"kv_hdc": {"bits": 8}}],
    "`kv_hdc` int8, per channel": [{"kv_hdc": {"bits": 8, "granularity": "per_channel"}}],
    "`kv_hdc` int4, one step": [{"kv_hdc": {"bits": 4}}],
    "`kv_hdc` int4, per channel": [{"kv_hdc": {"bits": 4, "granularity": "per_channel"}}],
    "packed 2 bits, window 128": [{"kv_hdc": {"bits": 2, "window": 128}}],
}
STYLES = {"minmax": "x", "`kv_quant`": "s", "`kv_pca`": "^", "`kv_hdc`": "o", "packed": "d", "planner": ".-"}


class Row(NamedTuple):
    """A codec on one model; `expected` is the planner's own KL before anything was exported."""

    name: str
    bytes: float
    ratio: float
    kl: float
    recall: float | None
    expected: float | None = None
    long: float | None = None


def main() -> None:
    """Prints one markdown table per model, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true")
    plot = parser.parse_args().plot
    tables = {}
    for subject in subjects():
        tables[subject.name] = list(rows(subject))
        print(table(subject.name, tables[subject.name]), flush=True)
    if plot:
        draw(tables)


def rows(subject: Subject) -> Iterator[Row]:
    """Every codec, measured."""
    for name, plan, expected in plans(subject):
        measured, size = subject.measured(plan), subject.size(plan)
        long = subject.size(plan, LONG) if any(layer.window for layer in plan.layers) else None
        row = Row(name, size, subject.size(subject.identity) / size, *measured, expected, long)
        print(f"{subject.name}: {row}", file=sys.stderr)
        yield row


def plans(subject: Subject) -> Iterator[tuple[str, Plan, float | None]]:
    """Name and plan of each codec, and what the planner expects of its own."""
    for name, methods in CODECS.items():
        yield name, subject.decided(*methods), None
    for ratio in RATIOS:
        planned = subject.planned(ratio)
        plan, expected = subject.workshop.compensated(subject.statistics, subject.held_out, planned.plan)
        yield f"planner, {ratio:.4g} times", plan, expected


def table(title: str, measured: list[Row]) -> str:
    """A markdown table under a line with the model's name."""
    reference = next(row.kl for row in measured if row.name == REFERENCE)
    asked = measured[0].recall is not None
    lines = [
        f"{title[0].upper()}{title[1:]}:\n",
        f"| codec | bytes per token | times smaller | KL | of {REFERENCE} | expected KL |" + " recall |" * asked,
        "|---|---:|---:|---:|---:|---:|" + "---:|" * asked,
    ]
    for row in measured:
        expected = "" if row.expected is None else f"{row.expected:.2g}"
        size = f"{row.bytes:,.0f}" + ("" if row.long is None else f" ({row.long:,.0f} at {LONG:,})")
        recall = "" if row.recall is None else f" {row.recall:.0%} |"
        share = f"{row.kl / reference:.2g}"
        lines.append(f"| {row.name} | {size} | {row.ratio:.2f} | {row.kl:.2g} | {share} | {expected} |{recall}")
    return "\n".join(lines) + "\n"


def draw(tables: dict[str, list[Row]]) -> None:
    """KL, and recall where it was measured, against bytes per token."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "kvslim", "svg.fonttype": "none"})
    from matplotlib import pyplot

    panels = [(title, measured, "kl") for title, measured in tables.items()]
    panels += [(title, measured, "recall") for title, measured in tables.items() if measured[0].recall is not None]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
    for axis, (title, measured, quantity) in zip(axes[0], panels, strict=True):
        for family, style in STYLES.items():
            of = [row for row in measured if row.name.startswith(family)]
            axis.plot([row.bytes for row in of], [getattr(row, quantity) for row in of], style, label=family.strip("`"))
        axis.set(title=title, xlabel=f"bytes per token at {LENGTH} tokens")
        axis.grid(alpha=0.3)
        if quantity == "kl":
            axis.set(yscale="log", ylabel="mean KL, nats per token")
        else:
            axis.set(ylim=(-0.03, 1.03), ylabel="recall")
    axes[0, 0].legend(fontsize="small")
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
