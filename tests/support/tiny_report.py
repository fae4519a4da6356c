"""Manifests with every kind of number in them, for pages and comparisons; nothing is run."""

from __future__ import annotations

from kvslim.caches import FullCache, PackedCache
from kvslim.contract import ModelSpec
from kvslim.kv_ratios import smaller_than
from kvslim.measures import GateResult, Measures, Report, SampleAnswer
from kvslim.types import KVLayout, LayerPlan, Manifest, PeerPoint, Plan, PlanPoint, Source
from kvslim.validation.gates import ratio

SPEC = ModelSpec(
    model_type="llama",
    layers=5,
    hidden_size=64,
    q_heads=8,
    kv_heads=4,
    head_dim=16,
    vocab_size=257,
    max_context=8192,
    windows=(None,) * 5,
)
PLAN = Plan(
    layers=(
        LayerPlan(layer=0, cache=FullCache(rank=8, stored="int8"), score=0.97, reason="rank 8 of 16; <int8> & more"),
        LayerPlan(layer=1, cache=FullCache(stored="int4"), reason="int4"),
        LayerPlan(layer=2, heads=(0, 1, 6, 7), reason="kv heads 1, 2 removed"),
        LayerPlan(layer=3, heads=(), reason="attention removed"),
        LayerPlan(layer=4, cache=PackedCache(bits=2, window=256, sinks=4), reason="2 bits behind a window"),
    )
)
PLAIN = Measures(
    kv_bytes_per_token=2560,
    file_mib=100,
    kl_mean=0,
    top1_agreement=1,
    perplexity=9.0,
    recall=0.98,
    recall_by_distance={"512": 0.99, "4000": 0.9},
    ttft_ms={"128": 20.0, "512": 90.0},
    tpot_ms={"128": 3.0, "1024": 4.0, "8192": 12.0},
    ttft_quartiles_ms={"128": (19.0, 22.0), "512": (88.0, 95.0)},
    tpot_quartiles_ms={"128": (2.9, 3.1), "1024": (3.9, 4.3), "8192": (11.0, 13.5)},
    peak_rss_mib=300,
)
SAMPLES = (
    SampleAnswer(prompt="Once upon a time", plain=" there was a king.", artifact=" there was a <queen>."),
    SampleAnswer(prompt="The lamp is", plain=" red.", artifact=" red."),
)


def manifest(
    *, kl: float = 0.004, recall: float = 0.97, slowness: float = 1.0, limit: float = 0.01, busy: bool = False
) -> Manifest:
    """A decoder's manifest: pruned, windowed, packed and rounded layers, a planner's frontier, one gate."""
    layout = KVLayout.of(SPEC, PLAN)
    artifact = PLAIN.model_copy(
        update={
            "kv_bytes_per_token": layout.bytes_per_token(4096),
            "kl_mean": kl,
            "kl_by_position": {"512": kl / 2, "1024": kl, "4096": 2 * kl},
            "recall": recall,
            "recall_by_distance": {"512": recall, "4000": recall - 0.1},
            "tpot_ms": {"128": 3.5 * slowness, "1024": 3.0 * slowness, "8192": 5.0 * slowness},
            "tpot_quartiles_ms": {
                "128": (3.4 * slowness, 3.7 * slowness),
                "1024": (2.9 * slowness, 3.3 * slowness),
                "8192": (4.8 * slowness, 5.6 * slowness),
            },
        }
    )
    gate = GateResult(name="max_kl", value=kl, limit=limit, passed=kl <= limit)
    report = Report(
        passed=gate.passed,
        gates=(gate,),
        plain=PLAIN,
        floor=Measures(kl_mean=1e-12),
        artifact=artifact,
        ratio=ratio(artifact, PLAIN),
        smaller_than=smaller_than(artifact.kv_bytes_per_token, PLAIN.kv_bytes_per_token),
        timings_uncertain="the machine was busy" if busy else None,
        samples=SAMPLES,
    )
    points = tuple(
        PlanPoint(cache="int4", kv_bytes_per_token=2560 / size, kv_ratio=size, time_ratio=0.9, kl=1e-4 * size**2)
        for size in (4, 8, 16)
    )
    return Manifest(
        source=Source(model="some/model", revision="abc", sha256="0" * 64),
        spec=SPEC,
        context=4096,
        recipe={
            "name": "small",
            "description": "An eighth of the bytes.",
            "budget": {"kv_ratio": 8},
            "gates": {"max_kl": limit},
        },
        plan=PLAN,
        frontier=points,
        peers=(
            PeerPoint(name="genai int8", kv_bytes_per_token=640, kl=0.0006),
            PeerPoint(name="genai int4", kv_bytes_per_token=320, kl=0.02),
            PeerPoint(name="llama.cpp q8_0", kv_bytes_per_token=680, kl=0.0004),
        ),
        kv_layout=layout,
        weights="int4",
        inputs=("input_ids", "attention_mask"),
        versions={"kvslim": "0.1.0"},
        files={},
        report=report,
        passed=gate.passed,
    )
