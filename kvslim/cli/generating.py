"""What `kvslim generate` does: one prompt, a conversation, or a file of prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kvslim.cli import console
from kvslim.errors import NotFoundError, UnsupportedError, UsageError
from kvslim.export.manifest import read_manifest
from kvslim.runtime.completion import Completer, PromptEncoder, Usage
from kvslim.runtime.generate import Sampling
from kvslim.runtime.template import ChatTemplate
from kvslim.types import Manifest

Record = Mapping[str, Any]
STDIN = "-"


@dataclass(frozen=True)
class Options:
    """What holds for every prompt.

    Attributes:
        chat: Whether a prompt is a user's message.
        system: The system message of a conversation.
        max_new_tokens: Tokens of a completion at most.
        context: Tokens to allocate the cache for; None for what is needed.
        sampling: How tokens are drawn.
        threads: Threads of one operator.
        as_json: Whether to print JSON in place of text.
    """

    chat: bool
    system: str | None
    max_new_tokens: int
    context: int | None
    sampling: Sampling
    threads: int | None
    as_json: bool


def generate(artifact: Path, prompt: str | None, file: str | None, interactive: bool, options: Options) -> int:
    """Completes a prompt, the lines of a file, or what is typed.

    Args:
        artifact: The folder.
        prompt: A text to continue.
        file: JSON lines with prompts; `-` for stdin.
        interactive: Whether to converse.
        options: What holds for every prompt.

    Returns:
        The exit code.

    Raises:
        KvslimError: The artifact cannot be read, or the prompt cannot be completed.
    """
    _check_sources(prompt, file, interactive)
    manifest = read_manifest(artifact)
    _check_artifact(artifact, manifest, options)
    encoder = PromptEncoder(artifact)
    if prompt is not None:
        return _complete(artifact, manifest, encoder, prompt, options)
    if file is not None:
        with _lines(file) as lines:
            return _batch(_completer(artifact, manifest, encoder, options), encoder, lines, file, options)
    return _converse(_completer(artifact, manifest, encoder, options), _Turns(artifact, encoder, options), options)


def _check_sources(prompt: str | None, file: str | None, interactive: bool) -> None:
    if sum((prompt is not None, file is not None, interactive)) != 1:
        raise UsageError("what to continue?", where="generate", fix="give one of --prompt, --file and --interactive")
    if prompt == "":
        raise UsageError("the prompt is empty", where="--prompt", fix="give some text to continue")


def _check_artifact(artifact: Path, manifest: Manifest, options: Options) -> None:
    spec = manifest.spec
    if spec.is_encoder:
        raise UnsupportedError(
            "an encoder writes no text", where=str(artifact), fix="embed texts with `kvslim.runtime.encoder`"
        )
    if options.context is not None and options.context > spec.max_context:
        raise UsageError(
            f"{options.context} tokens are more than the model's {spec.max_context} positions",
            where="--context",
            fix=f"--context {spec.max_context}",
        )
    if options.chat and not ChatTemplate.exists(artifact):
        raise UsageError("the tokenizer has no chat template", where=str(artifact), fix="leave out --chat and --system")


def _completer(artifact: Path, manifest: Manifest, encoder: PromptEncoder, options: Options) -> Completer:
    """With room for `--context`, or for the context that the artifact was made for."""
    capacity = options.context or min(manifest.context, manifest.spec.max_context)
    return Completer(artifact, encoder.tokenizer, capacity=capacity, sampling=options.sampling, threads=options.threads)


def _complete(artifact: Path, manifest: Manifest, encoder: PromptEncoder, prompt: str, options: Options) -> int:
    """One prompt, in a cache that has just the room it needs; plain text is printed before what follows it."""
    ids = encoder.chat(_messages(prompt, options)) if options.chat else encoder.prompt(prompt)
    most = manifest.spec.max_context
    if len(ids) >= most:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, the model {most} positions", where="--prompt", fix="shorten the prompt"
        )
    needed = min(most, options.context or len(ids) + options.max_new_tokens)
    completer = Completer(
        artifact, encoder.tokenizer, capacity=needed, sampling=options.sampling, threads=options.threads
    )
    _show(completer, ids, {"prompt": prompt}, "" if options.chat else prompt, options)
    return 0


def _messages(prompt: str, options: Options) -> list[dict[str, str]]:
    return [*_system(options), {"role": "user", "content": prompt}]


def _system(options: Options) -> list[dict[str, str]]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _show(completer: Completer, ids: Sequence[int], record: Record, before: str, options: Options) -> str:
    """Streams a completion to stdout and its usage to stderr, or prints both as one JSON object; returns the text."""
    pieces = completer.stream(ids, options.max_new_tokens)
    if options.as_json:
        text = "".join(pieces)
        console.print_json("generate", {**record, "completion": text, **_usage(completer).model_dump(mode="json")})
        return text
    text = ""
    console.print_text(before)
    for piece in pieces:
        console.print_text(piece)
        text += piece
    console.print_text("\n")
    console.hint(usage_line(_usage(completer)))
    return text


def _usage(completer: Completer) -> Usage:
    usage = completer.usage
    if usage is None:
        raise RuntimeError("the completion was not taken to its end")
    return usage


def usage_line(usage: Usage) -> str:
    """What a completion took, in one line."""
    speed = "" if usage.tokens_per_second is None else f" at {usage.tokens_per_second:.1f} per second"
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    return (
        f"{usage.prompt_tokens} prompt tokens{cached}, {usage.new_tokens} new{speed}, "
        f"first after {usage.ttft_ms:.3g} ms; context {usage.context_tokens} of {usage.context_capacity}, "
        f"KV cache {usage.kv_mib:.3g} MiB"
    )


class _Turns:
    """The prompt of each turn: the conversation so far in the chat template, or as plain text where there is none."""

    def __init__(self, artifact: Path, encoder: PromptEncoder, options: Options) -> None:
        self._encoder = encoder
        self._has_template = ChatTemplate.exists(artifact)
        self._messages: list[dict[str, str]] = _system(options)
        self._text = ""
        if not self._has_template:
            console.hint("hint: the tokenizer has no chat template; each line goes on with the text so far")

    def ask(self, line: str) -> list[int]:
        """The ids of all turns and this one."""
        if not self._has_template:
            self._text += line
            return self._encoder.prompt(self._text)
        self._messages.append({"role": "user", "content": line})
        return self._encoder.chat(self._messages)

    def answered(self, text: str) -> None:
        """Notes the model's answer."""
        self._text += text
        self._messages.append({"role": "assistant", "content": text})


def _converse(completer: Completer, turns: _Turns, options: Options) -> int:
    for line in _typed():
        answer = _show(completer, turns.ask(line), {"prompt": line}, "", options)
        turns.answered(answer)
    return 0


def _typed() -> Iterator[str]:
    """The lines of stdin that are not blank; a terminal shows where to type."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            console.mark("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


@contextmanager
def _lines(file: str) -> Iterator[IO[bytes]]:
    """The open file, or stdin for `-`."""
    if file == STDIN:
        yield sys.stdin.buffer
        return
    try:
        stream = Path(file).open("rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise NotFoundError(f"cannot open: {error.strerror}", where=f"--file {file}", fix="give JSON lines") from error
    with stream:
        yield stream


def _batch(completer: Completer, encoder: PromptEncoder, lines: IO[bytes], file: str, options: Options) -> int:
    """One JSON object per line, in and out; a line that cannot be completed gives an `error`, and the rest goes on.

    Each line starts with an empty cache, so that no answer depends on the lines before.
    """
    code = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        completer.reset()
        try:
            record = _record(line)
            answer = _answer(completer, encoder, record, options)
        except UsageError as error:
            code = error.exit_code
            name = "stdin" if file == STDIN else file
            named = UsageError(error.message, where=f"{name}, line {number}", fix=error.fix)
            console.print_json_line({"line": number, "error": console.error_fields(named)})
            console.print_error(named)
        else:
            console.print_json_line({**record, **answer})
    return code


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}", where="line", fix='write {"prompt": "..."} on one line') from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise UsageError(
            "a line is an object with prompt or messages", where="line", fix='write {"prompt": "..."} on one line'
        )
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _answer(completer: Completer, encoder: PromptEncoder, record: Record, options: Options) -> dict[str, Any]:
    text = "".join(completer.stream(_ids(encoder, record, options), options.max_new_tokens))
    return {"completion": text, **_usage(completer).model_dump(mode="json")}


def _ids(encoder: PromptEncoder, record: Record, options: Options) -> list[int]:
    if "messages" in record:
        return encoder.chat(_conversation(record["messages"], options))
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        raise UsageError("prompt is no text", where="line", fix='write {"prompt": "..."} on one line')
    return encoder.chat(_messages(prompt, options)) if options.chat else encoder.prompt(prompt)


def _conversation(messages: object, options: Options) -> list[dict[str, Any]]:
    """The messages of a line, behind the system message of the options where they bring none."""
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        fix = 'write {"messages": [{"role": "user", "content": "..."}]}'
        raise UsageError("messages is no list of role and content", where="line", fix=fix)
    brings = any(message.get("role") == "system" for message in messages)
    return messages if brings else [*_system(options), *messages]
