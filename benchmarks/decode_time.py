"""What the planner's count of a decode step is made of, and how well it tells the time of a plan.

    python benchmarks/decode_time.py weights|plans [--contexts 2048,16384] [--repeats 10]

SmolLM2-135M's shape with random weights. `weights` gives what one multiply-accumulate of weights costs, in those of the
float32 attention kernel; `plans`, on int4 weights, bytes, and expected and measured time over the plain graph's. All
graphs of a table decode in turns in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import get_args

from random_model import save_random_model

from kvslim.load.source import read_spec, resolve
from kvslim.progress import Silent
from kvslim.recipe import load_recipe
from kvslim.transform.surgery import trial
from kvslim.types import KVLayout, LayerPlan, ModelSpec, Plan, WeightType
from kvslim.validate.latency import Latency, measure_latency
from kvslim.workshop import Workshop

OVERRIDES = ("calibration.samples=2", "calibration.length=64")


def main() -> None:
    """Builds the graphs, times them and prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("weights", "plans"))
    parser.add_argument("--contexts", default="2048,16384")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    contexts = [int(text) for text in arguments.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder) / "model")
        table = {"weights": _print_weights, "plans": _print_plans}[arguments.what]
        table(Path(folder), contexts, arguments.repeats)


def _print_weights(folder: Path, contexts: list[int], repeats: int) -> None:
    """Two contexts give the time of one cached token; what is left at none is the weights'."""
    shops = {kind: _workshop(folder, kind) for kind in get_args(WeightType)}
    graphs = {
        kind: _exported(shop, Plan.identity(shop.spec), folder / f"weights_{kind}") for kind, shop in shops.items()
    }
    times = _timed(graphs, contexts, repeats)
    near, far = (str(context) for context in (contexts[0], contexts[-1]))
    print("| weights | ms without a cache | ms per 1,000 cached tokens | cost of a multiply-accumulate |")
    print("|---|---:|---:|---:|")
    for kind, shop in shops.items():
        slope = (times[kind].tpot_ms[far] - times[kind].tpot_ms[near]) / (contexts[-1] - contexts[0])
        rest = times[kind].tpot_ms[near] - slope * contexts[0]
        work, spec = shop.decode_time(contexts[0]), shop.spec
        numbers = work.head + sum(work.attention) + sum(work.others)
        cost = (rest / numbers) / (slope / (2 * spec.layers * spec.q_heads * spec.head_dim))
        print(f"| {kind} | {rest:.1f} | {1000 * slope:.2f} | {cost:.2f} |")


def _print_plans(folder: Path, contexts: list[int], repeats: int) -> None:
    shop = _workshop(folder, "int4")
    plans = plans_of(shop.spec)
    graphs = {name: _exported(shop, plan, folder / name.replace(" ", "_")) for name, plan in plans.items()}
    times = _timed(graphs, contexts, repeats)
    columns = "".join(f" ms at {context:,} | ratio | expected |" for context in contexts)
    print(f"| plan | KV bytes per token at {contexts[-1]:,} | file MiB |{columns}")
    print("|---|---:|---:|" + "---:|---:|---:|" * len(contexts))
    for name, plan in plans.items():
        size = KVLayout.of(shop.spec, plan).bytes_per_token(contexts[-1])
        row = f" {size:,.0f} | {sum(path.stat().st_size for path in graphs[name].iterdir()) / 2**20:.1f} |"
        for context in contexts:
            work, time = shop.decode_time(context), times[name]
            expected = work.of_plan(plan.layers) / work.of_plan(plans["plain"].layers)
            row += f" {time.tpot_ms[str(context)]:.1f} | {time.tpot_ratio[str(context)]:.2f} | {expected:.2f} |"
        print(f"| {name} |{row}")


def plans_of(spec: ModelSpec) -> dict[str, Plan]:
    """One plan for each way to save time."""
    half, group = spec.head_dim // 2, spec.group_size
    readers = tuple(head for head in range(spec.q_heads) if head % group)
    return {
        "plain": Plan.identity(spec),
        "int8": _all(spec, cache="int8", granularity="per_tensor"),
        "half the rank": _all(spec, rank=half),
        "half the rank, int4": _all(spec, rank=half, cache="int4"),
        "window of 1,024": _all(spec, window=1024, sinks=4),
        "a third of the kv heads": _all(spec, heads=tuple(range(spec.q_heads - group))),
        "a third of each kv head's readers": _all(spec, heads=readers),
        "no attention in a third of the layers": _all(spec, every=3, heads=()),
        "no MLP in a third of the layers": _all(spec, every=3, mlp=False),
        "a third of the layers gone": _all(spec, every=3, heads=(), mlp=False),
        "a third of the layers on another's cache": _sharing(spec, every=3),
    }


def _sharing(spec: ModelSpec, every: int) -> Plan:
    last = every - 1
    layers = (
        LayerPlan(layer=layer, donor=layer - 1 if layer % every == last else None) for layer in range(spec.layers)
    )
    return Plan(layers=tuple(layers))


def _all(spec: ModelSpec, every: int = 1, **update: object) -> Plan:
    layers = (LayerPlan(layer=layer) for layer in range(spec.layers))
    changed = (layer if layer.layer % every else layer.model_copy(update=update) for layer in layers)
    return Plan(layers=tuple(changed))


def _workshop(folder: Path, weights: WeightType) -> Workshop:
    snapshot = resolve(str(folder / "model"))
    recipe = load_recipe("lossless", (f"weights={weights}", *OVERRIDES))
    return Workshop(snapshot, read_spec(snapshot), recipe, Silent())


def _exported(shop: Workshop, plan: Plan, folder: Path) -> Path:
    folder.mkdir()
    codes = shop.codes(shop.statistics(), plan)
    with trial(shop.model, shop.architecture, codes):
        shop.export(plan, folder)
    return folder


def _timed(graphs: dict[str, Path], contexts: list[int], repeats: int) -> dict[str, Latency]:
    return measure_latency(graphs, prompts=[16], contexts=contexts, repeats=repeats)


if __name__ == "__main__":
    main()
