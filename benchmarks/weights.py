"""What weight formats cost the demo model: plain exports against the float32 one, on held-out stories.

    python benchmarks/weights.py [--model FOLDER --text FILE] [--documents 6] [--length 384]

Measured through the cache in chunks of 16.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from kvslim.calibrate.corpus import text_windows
from kvslim.demo.world import heldout_text
from kvslim.load.source import read_spec, resolve
from kvslim.progress import Silent
from kvslim.recipe import Recipe
from kvslim.runtime.session import DecodeSession
from kvslim.types import Plan, WeightFormat
from kvslim.validate.quality import measure_quality
from kvslim.workshop import Workshop

FORMATS = (
    WeightFormat(),
    WeightFormat(type="int8", method="rtn"),
    WeightFormat(type="int8"),
    WeightFormat(type="int4", method="rtn"),
    WeightFormat(type="int4"),
    WeightFormat(type="int4", mixed=True),
)


def main() -> None:
    """Prints a markdown table, a row per format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", help="held-out text, for any other model than the demo")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--length", type=int, default=384)
    arguments = parser.parse_args()
    workshop = open_model(arguments.model)
    windows = _windows(workshop, arguments.text, arguments.documents, arguments.length)
    print("| weights | MiB | KL | KL p99 | same top token | perplexity |\n|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        teacher = None
        for index, weights in enumerate(FORMATS):
            out = export(workshop, weights, Path(folder) / str(index))
            session = DecodeSession(out, capacity=arguments.length, all_positions=True)
            teacher = teacher or session
            found = measure_quality(teacher, session, windows)
            mib = sum(path.stat().st_size for path in out.iterdir()) / 2**20
            numbers = f"{found.kl_mean:.2g} | {found.kl_p99:.2g} | {found.top1_agreement:.3f} | {found.perplexity:.3f}"
            print(f"| {weights} | {mib:.1f} | {numbers} |")


def open_model(model: str) -> Workshop:
    """A model with no methods."""
    snapshot = resolve(model)
    return Workshop(snapshot, read_spec(snapshot), Recipe(name="plain"), Silent())


def export(workshop: Workshop, weights: WeightFormat, folder: Path) -> Path:
    """Exports a workshop's model plain, with its weights in a format, to a new folder."""
    folder.mkdir()
    workshop.recipe = workshop.recipe.model_copy(update={"weights": weights})
    workshop.export(Plan.identity(workshop.spec), folder)
    return folder


def _windows(workshop: Workshop, text: str | None, documents: int, length: int) -> np.ndarray:
    if text is not None:
        return text_windows(text, workshop.tokenizer, samples=documents, length=length, share=(0.0, 1.0))
    stories = heldout_text(documents, words=length)
    return np.stack([workshop.tokenizer(story).input_ids[:length] for story in stories])


if __name__ == "__main__":
    main()
