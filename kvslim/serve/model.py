"""The artifact that is served: its name and cache, and how requests become orders."""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from pathlib import Path

from kvslim.errors import UsageError
from kvslim.export.manifest import MANIFEST
from kvslim.runtime.completion import Completer, PromptEncoder
from kvslim.runtime.template import ChatTemplate
from kvslim.runtime.text import Speculative, read_decoder, used_draft
from kvslim.serve.engine import Order
from kvslim.serve.errors import ApiError
from kvslim.serve.requests import ChatRequest, CompletionRequest, TextRequest
from kvslim.token_ids import check_ids


class ServedModel:
    """An opened artifact.

    Attributes:
        name: What clients call it: the name of its folder.
        created: When it was made, seconds since 1970.
        fingerprint: Changes when the artifact does.
        capacity: Tokens of a prompt and its answer at most.
        completer: Its cache.

    Args:
        folder: The artifact.
        context: Tokens that the cache has room for; None for the context that the artifact was made for.
        max_new_tokens: Tokens of an answer at most, whatever a request asks for; None for no limit but the cache.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        speculative: Whether the artifact's draft proposes tokens.

    Raises:
        KvslimError: The artifact cannot be read, writes no text, or takes no such context.
    """

    def __init__(
        self,
        folder: Path,
        context: int | None,
        max_new_tokens: int | None,
        threads: int | None,
        speculative: Speculative = "auto",
    ) -> None:
        manifest = read_decoder(folder, context, option="--context")
        self.name, self.created = folder.resolve().name, int((folder / MANIFEST).stat().st_mtime)
        self.fingerprint = "fp_" + hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:12]
        self.capacity = context or min(manifest.context, manifest.spec.max_context)
        self._limit = max_new_tokens or self.capacity
        self._vocab_size = manifest.spec.vocab_size
        self._encoder = PromptEncoder(folder, self._vocab_size)
        self._has_template = ChatTemplate.exists(folder)
        if self._has_template:
            _ = self._encoder.template  # a broken one is told now
        draft, tokenizer = used_draft(manifest, speculative), self._encoder.tokenizer
        self.completer = Completer(folder, tokenizer, capacity=self.capacity, threads=threads, draft=draft)

    def check_name(self, name: str | None) -> None:
        """Refuses another model; no name is as good as the right one.

        Raises:
            ApiError: The name is of another one.
        """
        if name not in {None, self.name}:
            message = f"there is no model {name!r} here, only {self.name!r}"
            raise ApiError(message, status=HTTPStatus.NOT_FOUND, parameter="model", code="model_not_found")

    def chat_order(self, request: ChatRequest) -> Order:
        """What a conversation asks of the model.

        Raises:
            ApiError: There is no chat template, it refuses the messages, or they leave no room in the cache.
        """
        if not self._has_template:
            message = "the model has no chat template; send a prompt to /v1/completions"
            raise ApiError(message, parameter="messages", code="no_chat_template")
        try:
            ids = self._encoder.chat(request.conversation)
        except UsageError as error:
            raise ApiError.refusal(error, error.where) from error
        return self._order(request, [ids], "messages")

    def completion_order(self, request: CompletionRequest) -> Order:
        """What prompts ask of the model.

        Raises:
            ApiError: One has no tokens or unknown ones, or leaves no room in the cache.
        """
        try:
            ids = [self._ids(prompt) for prompt in request.prompts]
        except UsageError as error:
            raise ApiError.refusal(error, "prompt") from error
        return self._order(request, ids, "prompt")

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._encoder.prompt(prompt)
        if not prompt:
            raise UsageError("the prompt has no tokens", where="prompt", fix="give some text to continue")
        check_ids(prompt, self._vocab_size, self._encoder.tokenizer.id_to_token, where="prompt")
        return prompt

    def _order(self, request: TextRequest, prompts: list[list[int]], parameter: str) -> Order:
        try:
            for ids in prompts:
                self.completer.check(ids)
        except UsageError as error:
            raise ApiError.refusal(error, parameter, "context_length_exceeded") from error
        return Order(prompts, min(request.most or self._limit, self._limit), request.sampling, request.stops)
