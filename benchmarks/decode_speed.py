"""Time per output token of `balanced` at rank 32 against the plain export, on SmolLM2-135M's shape with int4 weights.

    python benchmarks/decode_speed.py [--contexts 128,1024,4096,8192] [--repeats 24]

Both graphs decode in turns in one process through in-place caches; the ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from random_model import save_random_model

from kvslim.load.source import read_spec, resolve
from kvslim.methods.fitting import fit
from kvslim.pipeline import decide
from kvslim.progress import Silent
from kvslim.recipe import load_recipe
from kvslim.types import Plan
from kvslim.validate.latency import measure_latency
from kvslim.workshop import Workshop

OVERRIDES = (
    "weights=int4",
    "methods.kv_pca.rank=32",
    "methods.kv_pca.rank_ratio=null",
    "calibration.samples=2",
    "calibration.length=64",
)


def main() -> None:
    """Builds both graphs, times them and prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="128,1024,4096,8192")
    parser.add_argument("--repeats", type=int, default=24)
    arguments = parser.parse_args()
    contexts = [int(text) for text in arguments.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        graphs = build(Path(folder))
        times = measure_latency(graphs, prompts=[512], contexts=contexts, repeats=arguments.repeats)
    print("| tokens | plain ms | slim ms | ratio |\n|---|---|---|---|")
    plain, slim = times["plain"], times["slim"]
    for key in plain.tpot_ms:
        print(f"| decode at {key} | {plain.tpot_ms[key]:.1f} | {slim.tpot_ms[key]:.1f} | {slim.tpot_ratio[key]:.2f} |")
    for key in plain.ttft_ms:
        print(f"| prompt of {key} | {plain.ttft_ms[key]:.0f} | {slim.ttft_ms[key]:.0f} | {slim.ttft_ratio[key]:.2f} |")


def build(folder: Path) -> dict[str, Path]:
    """The plain and the slim graph of the random model, by name."""
    paths = {name: folder / name for name in ("model", "plain", "slim")}
    for path in paths.values():
        path.mkdir()
    save_random_model(paths["model"])
    recipe, snapshot = load_recipe("balanced", OVERRIDES), resolve(str(paths["model"]))
    spec = read_spec(snapshot)
    workshop = Workshop(snapshot, spec, recipe, Silent())
    statistics = workshop.statistics()
    plan = decide(recipe, spec, statistics)
    workshop.export(Plan.identity(spec), paths["plain"])
    workshop.install(fit(spec, statistics, plan, recipe.methods))
    workshop.export(plan, paths["slim"])
    return {name: paths[name] for name in ("plain", "slim")}


if __name__ == "__main__":
    main()
