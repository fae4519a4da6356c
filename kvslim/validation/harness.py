"""An artifact as a model for lm-evaluation-harness. Needs the extra `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kvslim.contract import ModelSpec
from kvslim.errors import UsageError
from kvslim.loading.tokenizer import folder_tokenizer
from kvslim.progress import Progress, Silent
from kvslim.runtime.generate import Sampling, eos_ids, load_tokenizer
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from kvslim.token_ids import check_ids
from kvslim.validation.quality import CHUNK
from kvslim.validation.tally import log_softmax

Scored = tuple[float, bool]


class ArtifactLM(TemplateLM):
    """A decoder's folder with the harness's model interface: one sequence at a time, through the cache.

    Text is tokenized as in the harness's own `HFLM`, which runs the model in transformers, so that both see the same
    items. A prompt goes through the cache in chunks, as in generation, and a common beginning of two requests is run
    once.

    Attributes:
        tokenizer: The folder's tokenizer.
        max_length: Positions of the model; longer prompts lose their beginning.

    Args:
        folder: Folder with model.onnx, tokenizer and generation_config.json.
        spec: The model's shape.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        progress: Receives the progress.

    Raises:
        NotFoundError: A file of the folder is missing.
        ArtifactError: A file of the folder is broken.
    """

    max_gen_toks = 256  # default of the harness for tasks that do not say

    def __init__(
        self, folder: Path, spec: ModelSpec, *, threads: int | None = None, progress: Progress | None = None
    ) -> None:
        super().__init__()
        self._plain_tokenizer = load_tokenizer(folder)
        self.tokenizer: Any = folder_tokenizer(folder)
        self.max_length, self._vocab_size = spec.max_context, spec.vocab_size
        self._folder, self._threads = folder, threads
        self._progress = progress or Silent()
        self._stop = eos_ids(folder)
        self._session: DecodeSession | None = None
        self._cached: Sequence[int] = ()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token used for an empty prompt.

        Raises:
            UsageError: The tokenizer has no token that starts or ends a text.
        """
        if (prefix := self._prefix) is None:
            raise UsageError(
                "an empty prompt cannot be scored: the tokenizer has no token that starts or ends a text",
                where="tasks",
                fix="leave out tasks that score whole texts or answers without a prompt",
            )
        return prefix

    @property
    def _prefix(self) -> int | None:
        start: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with the tokenizer's start token unless the text already has it."""
        if add_special_tokens is None:
            prefix = self._prefix
            add_special_tokens = prefix is None or not has_bos_prefix(string, self.tokenizer.decode(prefix))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        check_ids(ids, self._vocab_size, self.tokenizer.convert_ids_to_tokens, where="tasks")
        return ids

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in chunks as long as the model's positions."""
        return [self._rolling(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of prompts up to the first stop string or the end token."""
        prompts = self._progress.track((request.args for request in requests), "texts", total=len(requests))
        return [self._generated(prompt, settings, seed) for seed, (prompt, settings) in enumerate(prompts)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        # Sorted by tokens, each request follows the one with which it shares the longest beginning.
        order = sorted(range(len(requests)), key=lambda index: requests[index][1] + requests[index][2])
        scores: dict[int, Scored] = {}
        for index in self._progress.track(order, "items", total=len(order)):
            _, context, continuation = requests[index]
            scores[index] = self._score(context, continuation)
        return [scores[index] for index in range(len(requests))]

    def _score(self, context: list[int], continuation: list[int]) -> Scored:
        """Log-likelihood of a continuation, and whether each of its tokens is the most likely one."""
        if not 0 < len(continuation) <= self.max_length:
            raise UsageError(
                f"a continuation of {len(continuation)} tokens cannot be scored",
                where="tasks",
                fix=f"give 1 to {self.max_length} tokens",
            )
        tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
        logits = log_softmax(self._logits(tokens, len(tokens) - len(continuation)))
        likelihood = logits[np.arange(len(continuation)), continuation].sum()
        return float(likelihood), bool((logits.argmax(-1) == continuation).all())

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(
            self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return sum(self._score(*make_disjoint_window(window))[0] for window in windows)

    def _generated(self, prompt: str, settings: dict[str, Any], seed: int) -> str:
        options = normalize_gen_kwargs(settings, self.max_gen_toks)
        count = min(options["max_gen_toks"], self.max_length - 1)
        ids = (self.tok_encode(prompt) or [self.prefix_token_id])[-(self.max_length - count) :]
        self._cached = ()
        session = self._open(len(ids) + count)
        session.reset()
        completion = Completion(
            self._plain_tokenizer,
            (),  # the answer is a text of its own, as it is for the harness
            count,
            ends=self._stop,
            stops=[text for text in options.get("until") or () if text],
            sampling=Sampling(
                options.get("temperature") or 0.0, options.get("top_k") or 0, options.get("top_p") or 1.0, seed
            ),
        )
        return "".join(piece for _, piece in write(session, [completion], session.prefill(ids)[None]))

    def _logits(self, tokens: Sequence[int], start: int) -> Logits:
        """Logits that follow tokens[start:], float32 [n, vocab]."""
        session = self._open(len(tokens))
        first = session.keep_shared(self._cached, tokens[:start])
        self._cached = ()  # no cached tokens are known until the run succeeds
        for begin in range(first, start, CHUNK):
            session.step(tokens[begin : min(begin + CHUNK, start)], last=1)
        logits = [session.step(tokens[begin : begin + CHUNK]) for begin in range(start, len(tokens), CHUNK)]
        self._cached = tokens
        return np.concatenate(logits)

    def _open(self, capacity: int) -> DecodeSession:
        """A session with room for `capacity` tokens; the open one if it is large enough."""
        if self._session is None or self._session.capacity < capacity:
            self._session = None  # frees the old cache before a new one is allocated
            room = min(self.max_length, max(2 * capacity, 64))
            self._session = DecodeSession(self._folder, capacity=room, threads=self._threads, all_positions=True)
            self._cached = ()
        return self._session
