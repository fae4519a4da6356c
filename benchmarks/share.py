"""KL of models of which some layers read another's cache, by how they read it; recall where the model has it.

    python benchmarks/share.py [--layers 1,2]

On 24 x 512 held-out tokens. Each way of reading chooses its own pairs by measured KL, among the same. "KL" is taken in
torch; "refit" and recall, with output projections fitted again, through the exported graph and its cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from subjects import Subject, subjects

from kvslim.methods import ShareKv
from kvslim.methods.share_kv import Donors, distances
from kvslim.transform.codes import LayerCodes
from kvslim.types import Plan

Codes = tuple[LayerCodes, ...]
STEP = 8


def main() -> None:
    """Prints one markdown table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="1,2")
    counts = [int(text) for text in parser.parse_args().layers.split(",")]
    for subject in subjects():
        print(f"{subject.name[0].upper()}{subject.name[1:]}, of {subject.spec.layers} layers:\n")
        print("| layers that share | keys and values | pairs | bytes per token | KL | refit | recall |")
        print("|---:|---|---|---:|---:|---:|---:|")
        for count in counts:
            for name in READERS:
                print(row(subject, name, count), flush=True)
            print(of_equal_bytes(subject, count), flush=True)
        print(flush=True)


def row(subject: Subject, name: str, count: int) -> str:
    """One way of reading, with as many layers."""
    near = {pair: sum(distance) for pair, distance in _distances(subject).items()}
    kl: Callable[[Donors], float] = lambda donors: subject.held_out.kl(codes_of(subject, name, donors))  # noqa: E731
    donors = ShareKv(layers=count).chosen(near, kl).donors or {}
    plan = ShareKv(donors=donors).decide(subject.spec, subject.statistics, subject.identity)
    codes = codes_of(subject, name, donors)
    pairs = ", ".join(f"{layer} reads {donor}" for layer, donor in donors.items())
    return f"| {count} | {name} | {pairs} {cells(subject, plan, codes)}"


def of_equal_bytes(subject: Subject, count: int) -> str:
    """`kv_pca` with all layers at the largest rank that takes no more bytes."""
    share = 1 - count / subject.spec.layers
    plan = subject.decided({"kv_pca": {"rank": int(subject.spec.head_dim * share) // STEP * STEP}})
    codes = subject.workshop.codes(subject.statistics, plan)
    return f"| none | `kv_pca`, rank {plan.layers[0].rank} | {cells(subject, plan, codes)}"


def cells(subject: Subject, plan: Plan, codes: Codes) -> str:
    """Bytes, KL without and with refitted output projections, and recall with."""
    before = subject.judge.kl(codes)
    after = subject.measured(plan, subject.workshop.refitted(subject.statistics, codes))
    recall = "-" if after.recall is None else f"{after.recall:.0%}"
    return f"| {subject.size(plan):,.0f} | {before:.2g} | {after.kl:.2g} | {recall} |"


def codes_of(subject: Subject, name: str, donors: Donors) -> Codes:
    """The model with these layers reading these donors."""
    codes = subject.workshop.without(subject.statistics, ShareKv(donors=donors))
    return tuple(
        code if code.donor is None else READERS[name](subject, layer, code) for layer, code in enumerate(codes)
    )


def _mapped(subject: Subject, layer: int, code: LayerCodes) -> LayerCodes:
    return code


def _turned(subject: Subject, layer: int, code: LayerCodes) -> LayerCodes:
    """Keys mapped by what commutes with RoPE, the least-squares complex number of each pair that it turns."""
    spec, samples, donor = subject.spec, subject.statistics.key_samples, code.donor
    assert code.heads is not None
    assert donor is not None
    encoder = np.zeros((spec.q_heads, spec.head_dim, spec.head_dim))
    for place, head in enumerate(code.heads):
        own = head // spec.group_size
        weights = subject.statistics.received[layer, own]
        given = _complex(samples[donor, place // spec.group_size])
        cross = (weights[:, None] * _complex(samples[layer, own]) * given.conj()).sum(0)
        factor = np.diag(cross / (weights[:, None] * np.abs(given) ** 2).sum(0))
        encoder[head] = np.block([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return replace(code, query_encoder=encoder)


def _copied(subject: Subject, layer: int, code: LayerCodes) -> LayerCodes:
    """Keys and values taken as they are, head by head."""
    heads, dim = subject.spec.q_heads, subject.spec.head_dim
    same, nothing = np.broadcast_to(np.eye(dim), (heads, dim, dim)), np.zeros((heads, dim))
    return replace(code, heads=tuple(range(heads)), query_encoder=same, value_decoder=same, value_offset=nothing)


READERS = {"mapped": _mapped, "keys turned pair by pair": _turned, "copied": _copied}


def _complex(keys: np.ndarray) -> np.ndarray:
    """[n, head_dim] as the pairs that RoPE turns, [n, head_dim / 2]."""
    first, second = np.split(keys.astype(np.float64), 2, axis=-1)
    return np.asarray(first + 1j * second)


def _distances(subject: Subject) -> dict[tuple[int, int], tuple[float, float]]:
    return dict(distances(subject.spec, subject.statistics, subject.identity))


if __name__ == "__main__":
    main()
