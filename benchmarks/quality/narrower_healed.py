"""What narrower feed-forward parts lose with and without repair, healed and not, and what they save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, USUAL
from kvslim.validation.latency import measure_latency
from kvslim.validation.measure import file_mib

TABLE = Table(
    (
        Column("repair", "down projection"),
        Column("kl", "KL", ".3g"),
        Column("healed", "healed", ".3g"),
        Column("mib", "file MiB", ".1f"),
        Column("file", "of plain's", ".2f"),
        Column("ms", "ms a token", ".2f"),
        Column("time", "of plain's ", ".2f"),
    )
)


@benchmark("books", table=TABLE, quick={"text": BRIEF, "steps": 2, "context": 16, "repeats": 3})
def narrower_healed(
    source: Source,
    *,
    text: Mapping[str, Any] = USUAL,
    steps: int = 40,
    ratio: float = 0.2,
    context: int = 128,
    repeats: int = 20,
) -> Iterator[Values]:
    """KL on other text, file and time of a token at 128, of float32 graphs with all MLPs narrower by a share.

    The down projection as it was or fitted again, and each of them healed. Healed graphs are timed, plain in turns.
    """
    model = OpenModel(source, text)
    plan = model.decided({"prune_mlp": {"ratio": ratio, "score": "alike"}})
    codes = {"as it was": model.codes(plan)}
    codes["fitted again"] = model.refitted(codes["as it was"])
    healed = {name: model.healed(plan, each, {"steps": steps})[0] for name, each in codes.items()}
    graphs = {"plain": model.export(), **{name: model.export(plan, each) for name, each in healed.items()}}
    times = measure_latency(graphs, prompts=[8], contexts=(context,), repeats=repeats)
    plain = file_mib(graphs["plain"])
    for name, each in codes.items():
        mib, place = file_mib(graphs[name]), str(context)
        row = {"repair": name, "kl": model.kl(each), "healed": model.kl(healed[name]), "mib": mib, "file": mib / plain}
        yield {**row, "ms": times[name].tpot_ms[place], "time": times[name].tpot_ratio[place]}
