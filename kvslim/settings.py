"""The parts of a recipe: text, what is measured, budget, healing, gates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from kvslim.contract import Frozen, ModelSpec
from kvslim.validation.spans import LEAST_DISTANCE

DEFAULT_CONTEXT = 4096
LEAST_REPEATS = 3  # of a timing: fewer have no quartiles
TextUse = Literal["calibration", "validation"]
MARGIN = 2.5  # other text, and longer text, may lose so many times what calibration text loses
MINUTES = {"s": 1 / 60, "m": 1.0, "h": 60.0}


def _number(value: object) -> object:
    """Reads `1e-3` as a number: YAML 1.1 makes it a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number)]


class Calibration(Frozen):
    """The text for the statistics, and the context the cache is made for."""

    source: str = Field("self", description="self, a .txt or .jsonl file, or hub:DATASET[:SPLIT]")
    samples: int = Field(16, ge=1, description="chunks of text; sentences for an encoder")
    length: int = Field(512, ge=8, description="tokens per chunk; longest sentence for an encoder")
    context: int | None = Field(
        None, ge=8, description="target context in tokens; default: the model's own, at most 4096"
    )
    seed: int = Field(0, ge=0, description="seed of the model's own samples, and of the positions they are moved to")

    def target(self, spec: ModelSpec) -> int:
        """The target context for a model, in tokens."""
        return self.context or min(spec.max_context, DEFAULT_CONTEXT)


class Validation(Frozen):
    """What is measured, on text that calibration has not seen."""

    source: str = Field("self", description="self, a .txt or .jsonl file, or hub:DATASET[:SPLIT]")
    samples: int = Field(8, ge=2, description="chunks of text; sentences for an encoder")
    length: int = Field(512, ge=32, description="tokens per chunk; longest sentence for an encoder")
    recall_items: int = Field(200, ge=1, description="recall questions at most")
    recall_distance: int = Field(512, ge=LEAST_DISTANCE, description="tokens between a fact and its question, at most")
    prompts: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        min_length=1,
        description="prompt lengths for TTFT, default 128, 512 and the target context; text lengths of an encoder",
    )
    contexts: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, min_length=1, description="contexts for time per token; default 128, 1,024 and the target context"
    )
    repeats: int = Field(16, ge=LEAST_REPEATS, description="interleaved timings per context")
    seed: int = Field(1, ge=0, description="seed of the model's own samples and of the recall questions")


class Budget(Frozen):
    """What a cache may cost; the planner picks methods, ranks and bits for it."""

    kv_ratio: Number | None = Field(None, gt=1, description="how many times smaller than the plain fp32 cache")
    kv_mib: Number | None = Field(None, gt=0, description="size of the cache at `context` tokens, MiB")
    memory_mib: Number | None = Field(
        None, gt=0, description="peak memory at `context` tokens, MiB: int4 weights and cache share it as loses least"
    )
    context: int | None = Field(None, ge=8, description="tokens; needed with kv_mib and memory_mib")
    time_ratio: Number | None = Field(
        None, gt=0, lt=1, description="expected time per token at the target context, as a share of the plain model's"
    )
    max_kl: Number | None = Field(None, gt=0, description="mean KL to the plain model, nats per token")
    max_recall_drop: Number | None = Field(None, ge=0, le=1, description="share of recall that may be lost")

    @model_validator(mode="after")
    def _limited(self) -> Budget:
        sizes = [name for name in ("kv_ratio", "kv_mib", "memory_mib") if getattr(self, name) is not None]
        if not sizes and self.time_ratio is None and self.max_kl is None and self.max_recall_drop is None:
            raise ValueError("give kv_ratio, kv_mib, memory_mib, time_ratio, max_kl or max_recall_drop")
        if (self.kv_mib is None and self.memory_mib is None) != (self.context is None):
            raise ValueError("kv_mib or memory_mib go with context")
        if len(sizes) > 1:
            raise ValueError(f"give {' or '.join(sizes)}, not both")
        return self

    @staticmethod
    def place(key: str) -> str:
        """Where a limit is given: as an option, or in a recipe."""
        option = "kv-mib-at" if key == "kv_mib" else key.replace("_", "-")
        return f"--{option}, budget.{key}"

    @property
    def size(self) -> str | None:
        """The key of the limit of bytes; None where there is none."""
        sizes = ("kv_ratio", "kv_mib", "memory_mib")
        return next((key for key in sizes if getattr(self, key) is not None), None)

    def bytes_limit(self, plain: float) -> float | None:
        """The most bytes that the cache may take if the plain one takes `plain`; None for no limit."""
        if self.kv_ratio is not None:
            return plain / self.kv_ratio
        return None if self.kv_mib is None else self.kv_mib * 2**20

    def __str__(self) -> str:
        """The limits in words."""
        words = {
            "a cache {:g} times smaller than plain fp32": self.kv_ratio,
            f"a cache of {{:.4g}} MiB at {self.context or 0:,} tokens": self.kv_mib,
            f"{{:.4g}} MiB of memory at {self.context or 0:,} tokens": self.memory_mib,
            "{:g} of plain's time per token": self.time_ratio,
            "a mean KL of at most {:g}": self.max_kl,
            "at most {:.2g} points of recall lost": None
            if self.max_recall_drop is None
            else 100 * self.max_recall_drop,
        }
        return ", ".join(text.format(limit) for text, limit in words.items() if limit is not None)


class Heal(Frozen):
    """How long weights are trained after codes are in place."""

    minutes: Number | None = Field(None, gt=0, description="budget of time; counted in steps after the first of them")
    steps: int | None = Field(None, ge=1, description="the same in steps of 1,024 tokens")
    rate: Number = Field(
        1e-3, gt=0, le=1, description="learning rate at its highest, as a share of a weight's usual size"
    )
    samples: int = Field(
        1024, ge=3, description="windows of text at most; the model's own are those of the calibration"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Heal:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give minutes or steps")
        return self


def read_heal(value: object) -> object:
    """`10m`, `90s` or `1h` as a budget of time, a plain number as one of steps."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    text = str(value)
    unit = MINUTES.get(text[-1:])
    number = text[:-1] if unit else text
    try:
        return {"minutes": float(number) * unit} if unit else {"steps": int(number)}
    except ValueError:
        raise ValueError(f"cannot read {value!r}; write 10m, 90s or 1h, or a number of steps") from None


class Gates(Frozen):
    """Limits; a gate that is not set is not checked."""

    max_kl: Number | None = Field(None, ge=0, description="mean KL divergence to the plain export, nats per token")
    min_top1_agreement: Number | None = Field(
        None, ge=0, le=1, description="share of positions with the same most likely token"
    )
    max_recall_drop: Number | None = Field(None, ge=0, le=1, description="recall lost, compared with the plain export")
    max_kv_ratio: Number | None = Field(None, gt=0, le=1, description="KV bytes of the artifact, divided by plain")
    max_kv_mib: Number | None = Field(None, gt=0, description="cache of the artifact at the target context, MiB")
    max_time_ratio: Number | None = Field(
        None, gt=0, description="time per token at the longest timed context, divided by plain"
    )
    max_file_mib: Number | None = Field(None, gt=0, description="size of the graph and its weights, MiB")
    max_memory_mib: Number | None = Field(
        None, gt=0, description="peak memory with a full cache at the longest context that is timed, MiB"
    )
    min_embedding_cosine: Number | None = Field(
        None, ge=-1, le=1, description="encoders: mean cosine to the plain export"
    )
    min_retrieval_rank_correlation: Number | None = Field(
        None, ge=-1, le=1, description="encoders: rank correlation of retrieval to the plain export"
    )
    min_masked_top1_agreement: Number | None = Field(
        None,
        ge=0,
        le=1,
        description="encoders with a masked-token head: share of masks with the same most likely token",
    )
