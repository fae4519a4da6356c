"""What other sizes and other tools' cache types cost on a model, each priced by one pass over a little text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from kvslim.errors import UsageError
from kvslim.methods.base import Method
from kvslim.methods.kv_hdc import KvHdc
from kvslim.methods.kv_pca import KvPca
from kvslim.methods.kv_quant import KvQuant
from kvslim.planning.budget import decode_time
from kvslim.planning.ggml import GgmlCache
from kvslim.transform.edits import Codes, LayerEdit
from kvslim.types import KVLayout, PeerPoint, Plan, PlanPoint, Survey

if TYPE_CHECKING:
    from kvslim.prepared.decoder_trials import DecoderTrials

INT8, INT4 = KvQuant(bits=8), KvHdc(bits=4, granularity="per_channel")
MORE, HALF = KvPca(rank_ratio=0.75), KvPca(rank_ratio=0.5)
SIZES: tuple[tuple[Method, ...], ...] = ((INT8,), (INT4,), (MORE, INT4), (HALF, INT4))
# As onnxruntime-genai's builder calibrates them: a step per channel, set by the largest value.
GENAI = {f"genai int{bits}": KvQuant(bits=bits, clip="minmax", centre=False) for bits in (8, 4)}
GGML = {f"llama.cpp {name.lower()}": GgmlCache(kind="ggml", key=name, value=name) for name in ("Q8_0", "Q4_0")}
Peer = tuple[float, Codes]  # bytes of a token, codes
GGML_BLOCK = 32  # numbers; llama.cpp takes heads of whole blocks alone


def surveyed(trials: DecoderTrials, frontier: tuple[PlanPoint, ...] = ()) -> Survey:
    """What a planner measured, or else all layers alike at a few sizes, and the cache types of other tools.

    Most of them need the operators of layout gqa; with another layout nothing is priced.

    Args:
        trials: Of a model that is not edited yet.
        frontier: What a planner measured; then no sizes are priced here.
    """
    if trials.identity.layout != "gqa":
        return Survey(frontier)
    sizes = [] if frontier else [plan for each in SIZES if (plan := decided_by(trials, each)) is not None]
    peers = {**_of_genai(trials), **_of_llama_cpp(trials)}
    codes = chain(map(trials.codes_of, sizes), (codes for _, codes in peers.values()))
    kls = trials.progress.track(trials.losses(codes), "sizes priced", len(sizes) + len(peers))
    alike = [_point(trials, plan, kl) for plan, kl in zip(sizes, kls, strict=False)]
    priced = (
        PeerPoint(name=name, kv_bytes_per_token=size, kl=kl)
        for (name, (size, _)), kl in zip(peers.items(), kls, strict=True)
    )
    return Survey(frontier, tuple(dict.fromkeys(alike)), tuple(priced))


def _point(trials: DecoderTrials, plan: Plan, kl: float) -> PlanPoint:
    """All layers alike."""
    context = trials.prepared.context
    size, plain = (KVLayout.of(trials.spec, each).bytes_at(context) for each in (plan, Plan.identity(trials.spec)))
    time = decode_time(trials.prepared, context)
    return PlanPoint(
        cache=plan.layers[0].cache.dtype,
        kv_bytes_per_token=size / context,
        kv_ratio=plain / size,
        time_ratio=time.of_plan(plan.layers) / time.of_plan(trials.identity.layers),
        kl=kl,
    )


def _of_genai(trials: DecoderTrials) -> dict[str, Peer]:
    plans = {name: decided_by(trials, [method]) for name, method in GENAI.items()}
    return {name: (_bytes(trials, plan), trials.codes_of(plan)) for name, plan in plans.items() if plan is not None}


def _of_llama_cpp(trials: DecoderTrials) -> dict[str, Peer]:
    """In blocks of the numbers that a token has in all heads; a window of the model's own is kept by both."""
    spec = trials.spec
    if spec.head_dim % GGML_BLOCK:
        return {}
    plain = _bytes(trials, trials.identity)
    shares = {name: cache.bytes_of(GGML_BLOCK) / (2 * 4 * GGML_BLOCK) for name, cache in GGML.items()}
    return {name: (shares[name] * plain, (LayerEdit(cache=cache),) * spec.layers) for name, cache in GGML.items()}


def decided_by(trials: DecoderTrials, methods: Sequence[Method]) -> Plan | None:
    """The plan of some methods; None where the kernel cannot read it."""
    plan = trials.identity
    try:
        for method in methods:
            method.check(trials.spec)
            plan = method.decide(trials.spec, trials.statistics, plan)
    except UsageError:
        return None
    return plan


def _bytes(trials: DecoderTrials, plan: Plan) -> float:
    """Of a token, at the target context."""
    return KVLayout.of(trials.spec, plan).bytes_per_token(trials.prepared.context)
