"""What a client asks for: the parameters of OpenAI's API that have an effect here, and refusals of the others."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvslim.errors import UsageError, suggestion, words_of
from kvslim.json_lines import parse_object
from kvslim.runtime.generate import PENALTIES, Sampling
from kvslim.runtime.stops import checked_stops
from kvslim.serve.errors import ApiError

Token = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1)]
Each = TypeVar("Each")
Many = Annotated[list[Each], Field(fail_fast=True)]  # the faults of a million elements would fill the memory

# Parameters that change no text, whatever their value.
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Parameters of what this server cannot do, and the values that ask for none of it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


class StreamOptions(BaseModel):
    """What a stream holds besides text."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class TextRequest(BaseModel):
    """What requests for a text have in common. Defaults are those of OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, ge=PENALTIES[0], le=PENALTIES[1])
    seed: int | None = None
    stop: str | Many[str] = Field(default_factory=list, description="a text or a list of texts")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @classmethod
    def read(cls, body: bytes) -> Self:
        """The request in the body of an HTTP request; null is as good as nothing.

        Raises:
            ApiError: The body is not JSON, or has a parameter that is unknown, wrong, or of something that this server
                cannot do.
        """
        try:
            given = parse_object(body, "body", "send a JSON object")
        except UsageError as error:
            raise ApiError.refusal(error, "body") from error
        try:
            return cls.model_validate(_effective(given))
        except ValidationError as error:
            raise _refusal(error, cls) from error

    @property
    def most(self) -> int | None:
        """Tokens of an answer at most; None for as many as there is room for."""
        return self.max_tokens

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn; without a seed, in another way each time."""
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**64
        return Sampling(self.temperature, self.top_k, self.top_p, seed, self.repetition_penalty)

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a text.

        Raises:
            ApiError: One is empty.
        """
        try:
            return checked_stops([self.stop] if isinstance(self.stop, str) else self.stop)
        except UsageError as error:
            raise ApiError.refusal(error, "stop") from error


class ChatRequest(TextRequest):
    """A conversation to answer; contents are checked when the chat template is rendered."""

    messages: Many[dict[str, Any]] = Field(
        min_length=1, description='a list of messages like {"role": "user", "content": "..."}'
    )
    max_completion_tokens: Count | None = None

    @property
    def most(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages with roles that chat templates know: `developer` is what newer clients call `system`.

        Raises:
            ApiError: A message has no role.
        """
        for place, message in enumerate(self.messages):
            if not isinstance(message.get("role"), str):
                raise ApiError("a message has no role", parameter=f"messages[{place}].role")
        return [
            {**message, "role": "system"} if message["role"] == "developer" else message for message in self.messages
        ]


class CompletionRequest(TextRequest):
    """Prompts to continue: a text or token ids, or a list of either."""

    prompt: str | Many[str] | Many[Token] | Many[Many[Token]] = Field(
        description="a text or token ids, or a list of either"
    )
    max_tokens: Count | None = 16

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt.

        Raises:
            ApiError: There are none.
        """
        if not self.prompt:
            raise ApiError("there is no prompt", parameter="prompt")
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if is_single else self.prompt)


def _effective(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that have an effect.

    Raises:
        ApiError: One asks for what this server cannot do.
    """
    values = {name: value for name, value in given.items() if value is not None and name not in IGNORED}
    for name in values.keys() & NEUTRAL.keys():
        value = values.pop(name)  # 0 is equal to False, and asks for something else
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in NEUTRAL[name]):
            raise ApiError(f"{name} is not supported here; leave it out", parameter=name, code="unsupported_parameter")
    return values


def _refusal(error: ValidationError, kind: type[TextRequest]) -> ApiError:
    """The first fault of a request; an unknown name explains why another is missing."""
    faults = error.errors()
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    name = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        message = f"unknown parameter {name!r}; {suggestion(name, kind.model_fields, 'leave it out')}"
        return ApiError(message, parameter=name, code="unknown_parameter")
    needed = kind.model_fields[name].description
    return ApiError(f"{name}: {f'send {needed}' if needed else words_of(fault)}", parameter=name)
