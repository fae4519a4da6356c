"""Time per token of weight formats on SmolLM2-135M's shape, random weights, against int4 rtn, the symmetric one.

    python benchmarks/weights_speed.py [--context 128] [--repeats 32]

The graphs decode in turns in one process; a ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from random_model import save_random_model
from weights import export, open_model

from kvslim.types import WeightFormat
from kvslim.validate.latency import measure_latency

FORMATS = (
    WeightFormat(type="int4", method="rtn"),
    WeightFormat(type="int4"),
    WeightFormat(type="int4", mixed=True),
    WeightFormat(type="int8"),
)


def main() -> None:
    """Prints a markdown table, a row per format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_random_model(model)
        workshop = open_model(str(model))
        graphs = {str(format_): export(workshop, format_, Path(folder) / str(format_)) for format_ in FORMATS}
        workshop.release()
        times = measure_latency(graphs, prompts=[128], contexts=[arguments.context], repeats=arguments.repeats)
    print("| weights | time per token | time for a prompt of 128 |\n|---|---:|---:|")
    for name, time in times.items():
        (decode,), (prompt,) = time.tpot_ratio.values(), time.ttft_ratio.values()
        print(f"| {name} | {decode:.2f} | {prompt:.2f} |")


if __name__ == "__main__":
    main()
