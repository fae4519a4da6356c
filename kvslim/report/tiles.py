"""The numbers that most readers look for, at the head of a report, and what a failed gate says there."""

from __future__ import annotations

from dataclasses import dataclass

from kvslim.digits import three_digits
from kvslim.kv_ratios import TYPES, smaller
from kvslim.measures import GateResult, Report
from kvslim.report.draft import draft_note
from kvslim.types import Manifest

GATES = {
    "max_kl": "mean KL to plain",
    "min_top1_agreement": "the share of equal most likely tokens",
    "max_recall_drop": "the recall that is lost",
    "max_kv_ratio": "the cache as a share of plain's bytes",
    "max_kv_mib": "the cache at the target context, in MiB,",
    "max_time_ratio": "the time per token over plain's",
    "max_file_mib": "the size of graph and weights, in MiB,",
    "max_memory_mib": "the peak memory, in MiB,",
    "min_embedding_cosine": "the mean cosine to plain's embeddings",
    "min_retrieval_rank_correlation": "the rank correlation of retrieval",
    "min_masked_top1_agreement": "the share of equal masked tokens",
}


@dataclass(frozen=True)
class Tile:
    """One headline number, what it is, and what it stands beside."""

    value: str
    label: str
    beside: str = ""


def tiles(manifest: Manifest) -> tuple[Tile, ...]:
    """A report's tiles; a number that was not measured has none."""
    report = manifest.report
    if report is None:
        return ()
    found = (
        _cache(manifest, report),
        _speed(report),
        _first_token(report),
        _latency(report),
        _kl(report),
        _recall(report),
        _cosine(report),
        _files(report),
    )
    return tuple(tile for tile in found if tile is not None)


def failed_gates(report: Report) -> tuple[str, ...]:
    """What each failed gate asked for and what was measured, in words; and a draft that changes texts."""
    note = draft_note(report.speculation) if report.speculation and report.speculation.differing else None
    return *(_missed(gate) for gate in report.gates if not gate.passed), *([note] if note else [])


def _missed(gate: GateResult) -> str:
    what, bound = GATES.get(gate.name, gate.name), "at most" if gate.name.startswith("max_") else "at least"
    value = "was not measured" if gate.value is None else f"is {gate.value:.4g}"
    return f"{gate.name}: {what} {value}, {bound} {gate.limit:.4g} was asked for"


def _cache(manifest: Manifest, report: Report) -> Tile | None:
    slim, plain = report.artifact.kv_bytes_per_token, report.plain.kv_bytes_per_token
    if not slim or not plain:
        return None
    sizes = ", ".join(
        f"{size(share * plain * manifest.context)} in {name}" for name, share in TYPES.items() if name.startswith("fp")
    )
    beside = f"{smaller(slim, plain)} ({sizes})"
    return Tile(size(slim * manifest.context), f"KV cache at {manifest.context:,} tokens", beside)


def size(count: float) -> str:
    """Bytes in MiB or GiB, in three digits."""
    mib = count / 2**20
    return f"{mib / 1024:.3g} GiB" if mib >= 1000 else f"{mib:.3g} MiB"


def _speed(report: Report) -> Tile | None:
    times = report.artifact.tpot_ms or {}
    longest = max(times, key=int, default=None)
    if longest is None:
        return None
    plain = (report.plain.tpot_ms or {}).get(longest)
    ratio = (report.ratio.tpot_ms or {}).get(longest)
    beside = (
        "" if plain is None or not ratio else f"plain {three_digits(1000 / plain)}; {ratio:.2f} of its time per token"
    )
    return Tile(f"{three_digits(1000 / times[longest])} tokens/s", f"at a context of {int(longest):,} tokens", beside)


def _first_token(report: Report) -> Tile | None:
    return _time(report, "ttft_ms", "to the first token of a prompt of {} tokens")


def _latency(report: Report) -> Tile | None:
    return _time(report, "latency_ms", "for a text of {} tokens")


def _time(report: Report, metric: str, label: str) -> Tile | None:
    times, plain, ratio = (getattr(side, metric) or {} for side in (report.artifact, report.plain, report.ratio))
    longest = max(times, key=int, default=None)
    if longest is None:
        return None
    known = longest in plain and longest in ratio
    beside = f"plain {_milliseconds(plain[longest])}; {ratio[longest]:.2f} of its time" if known else ""
    return Tile(_milliseconds(times[longest]), label.format(f"{int(longest):,}"), beside)


def _milliseconds(value: float) -> str:
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def _kl(report: Report) -> Tile | None:
    kl, error = report.artifact.kl_mean, report.artifact.kl_se
    beside = "" if error is None else f"standard error {error:.1g}"
    return None if kl is None else Tile(f"{kl:.2g}", "mean KL to plain, nats per token", beside)


def _recall(report: Report) -> Tile | None:
    recall, plain = report.artifact.recall, report.plain.recall
    beside = "" if plain is None else f"plain {plain:.1%}"
    return None if recall is None else Tile(f"{recall:.1%}", "recall of facts in the prompt", beside)


def _cosine(report: Report) -> Tile | None:
    cosine = report.artifact.embedding_cosine_mean
    return None if cosine is None else Tile(f"{cosine:.4f}", "mean cosine to plain's embeddings")


def _files(report: Report) -> Tile | None:
    files, plain = report.artifact.file_mib, report.plain.file_mib
    beside = "" if plain is None else f"plain {size(plain * 2**20)}"
    return None if files is None else Tile(size(files * 2**20), "files of the graph", beside)
