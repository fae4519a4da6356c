"""What was measured of an artifact: plain, frozen, JSON in and out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvslim.contract import Frozen

DraftKind = Literal["lookup", "window"]


class Measures(Frozen):
    """One column of the report. What was not measured is None.

    `kv_bytes_per_token` is the cache at the target context over that context. Latencies are milliseconds, keyed by
    prompt length (`ttft_ms`), context length (`tpot_ms`) or, for an encoder, text length (`latency_ms`) in tokens;
    `kl_*` are nats per token against the plain export; `recall` and the agreements are shares in 0..1; the rank
    correlation is Spearman's. `kl_by_position` has the mean KL of the tokens from the key before (or the start) up to
    its key, `kl_beyond` that of tokens beyond the target context, which no other number counts; `recall_by_distance`
    the recall of what stands at most so many tokens back. Standard errors end in `_se`: of `kl_mean` and `perplexity`
    over pieces of text, of the recall that is lost to the plain export over the questions. Where weights are quantised,
    KL and perplexity are measured with activations in float32; `kl_as_run` is the KL with activations rounded as
    onnxruntime does it, and `kl_to_original` the one to the model in float32.

    Latencies are medians; `*_quartiles_ms` are the first and third quartile. Tokens per second follow from the medians:
    `tokens_per_second` of one sequence by context length, `prompt_tokens_per_second` by prompt length.
    """

    kv_bytes_per_token: float | None = None
    file_mib: float | None = None
    kl_mean: float | None = None
    kl_se: float | None = None
    kl_p99: float | None = None
    kl_as_run: float | None = None
    kl_to_original: float | None = None
    kl_by_position: dict[str, float] | None = None
    kl_beyond: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    perplexity_se: float | None = None
    recall: float | None = None
    recall_questions: int | None = None
    recall_drop_se: float | None = None
    recall_by_distance: dict[str, float] | None = None
    embedding_cosine_mean: float | None = None
    embedding_cosine_min: float | None = None
    retrieval_rank_correlation: float | None = None
    masked_top1_agreement: float | None = None
    ttft_ms: dict[str, float] | None = None
    tpot_ms: dict[str, float] | None = None
    latency_ms: dict[str, float] | None = None
    ttft_quartiles_ms: dict[str, tuple[float, float]] | None = None
    tpot_quartiles_ms: dict[str, tuple[float, float]] | None = None
    latency_quartiles_ms: dict[str, tuple[float, float]] | None = None
    prompt_tokens_per_second: dict[str, float] | None = None
    tokens_per_second: dict[str, float] | None = None
    peak_rss_mib: float | None = None


class GateResult(Frozen):
    """One gate: the measured value against its limit."""

    name: str
    value: float | None
    limit: float
    passed: bool
    note: str | None = Field(None, description="why the verdict says little, if it does")


class SampleAnswer(Frozen):
    """What the plain export and the artifact write after the same prompt, greedily."""

    prompt: str
    plain: str
    artifact: str


class Speculation(Frozen):
    """What a draft gains on held-out text, written greedily behind a context, with and without it in turns."""

    kind: DraftKind = Field(description="the draft that wrote them")
    context: int = Field(description="tokens before the texts that are written")
    tokens: int = Field(description="tokens that are written")
    differing: int = Field(
        description="texts that are not the model's own, with activations in float32; must be 0 for the gates to pass"
    )
    checked: int = Field(0, description="proposals in these texts, made whether they pay or not")
    tokens_per_round: float = Field(description="of a run of the graph")
    acceptance: tuple[float, ...] = Field(description="how often the first proposal of a run was right, the second ...")
    speed_ratio: float = Field(description="tokens per second over those without the draft, median over the texts")


class Report(Frozen):
    """What an artifact costs and saves, next to the plain export of the same model.

    Latencies in `ratio` are medians over pairs of neighbouring turns: load on the machine slows both sides alike.
    """

    passed: bool
    gates: tuple[GateResult, ...]
    plain: Measures
    floor: Measures
    artifact: Measures
    ratio: Measures
    original: Measures | None = Field(None, description="the model in float32, where the weights are quantised")
    smaller_than: dict[str, float] | None = Field(
        None, description="how many times smaller the cache is than the same model's in fp32, fp16 and q8_0"
    )
    timings_uncertain: str | None = Field(None, description="why the timings say little, if they do")
    samples: tuple[SampleAnswer, ...] = Field((), description="answers to compare by eye")
    speculation: Speculation | None = Field(
        None, exclude_if=lambda found: found is None, description="what the artifact's draft gains, if it has one"
    )
