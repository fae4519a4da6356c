"""Token windows from text: the model's own samples, a text or JSONL file, a hub data set, or the demo's stories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvslim.errors import NotFoundError, UnsupportedError, UsageError, first_line
from kvslim.json_lines import is_json_lines, read_objects
from kvslim.memory import usable_memory
from kvslim.progress import Progress
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession
from kvslim.token_ids import check_ids, knows_more

Array = np.ndarray
SELF_BATCH = 32  # windows that a model writes side by side; more take longer each
CACHE_SHARE = 4  # their cache may take one part in so many of the memory that is left
LEAST_WINDOW = 32  # tokens, the shortest length that a recipe allows for both
WHOLE = (0.0, 1.0)
LINES = 'write one {"text": ...} or {"prompt": ..., "completion": ...} per line'
CALIBRATION_SHARE, VALIDATION_SHARE = (0.0, 0.8), (0.8, 1.0)  # of one text that serves both


def check_source(source: str, where: str) -> None:
    """Fails early when a text source cannot be read.

    Args:
        source: As for `text_windows`.
        where: The key that names it, for errors.

    Raises:
        NotFoundError: The file does not exist.
        UsageError: It is empty, not UTF-8, not JSONL, or named neither .txt nor .jsonl.
        UnsupportedError: A hub data set without the `hub` extra.
    """
    if source == "self":
        return
    if source.startswith("hub:"):
        _datasets(where)
        return
    if not Path(source).is_file():
        fix = "give self, a .txt or .jsonl file, or hub:DATASET[:SPLIT]"
        raise NotFoundError(f"no text file {source!r}", where=where, fix=fix)
    _read_file(Path(source))


def check_tokens(source: str, tokenizer: Any, vocab_size: int) -> None:
    """Refuses a text with tokens beyond the model's embedding table.

    Args:
        source: As for `text_windows`.
        tokenizer: Its tokenizer.
        vocab_size: Tokens that the model has embeddings for.

    Raises:
        UsageError: Naming the first such token.
    """
    if source != "self" and knows_more(tokenizer, vocab_size):
        tokens, _ = _tokenised(source, tokenizer)
        check_ids([*_prefix(tokenizer), *tokens], vocab_size, tokenizer.convert_ids_to_tokens, source)


def source_digest(source: str) -> str | None:
    """SHA-256 of a file's text, prompts apart; None for a source that its name alone decides."""
    if source == "self" or source.startswith("hub:"):
        return None
    return hashlib.sha256(json.dumps(_pieces(Path(source))).encode()).hexdigest()


def source_text(source: str) -> str:
    """The text of a file or a hub data set.

    Raises:
        KvslimError: As `check_source`.
    """
    return _hub_text(source) if source.startswith("hub:") else _read_file(Path(source))


def text_windows(
    source: str,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    share: tuple[float, float] = WHOLE,
    key: str = "calibration.length",
) -> Array:
    """Windows of a file, a hub data set or, for `self`, the demo's held-out stories.

    Args:
        source: A .txt or .jsonl file, `hub:DATASET[:SPLIT]`, or `self` for the demo model.
        tokenizer: Its tokenizer.
        samples: Windows wanted.
        length: Tokens per window.
        share: Part of the text to use, so that calibration and validation can share a file without overlap.
        key: What sets the length, for the error.

    Returns:
        [n, length] token ids, 1 <= n <= samples, evenly spread over the text; each window starts as the tokenizer
        starts a text.

    Raises:
        UsageError: The text has fewer tokens than one window.
    """
    if source == "self":
        from kvslim.demo.world import heldout_text

        texts = heldout_text(samples, words=length)
        return np.stack([np.asarray(tokenizer(text).input_ids[:length]) for text in texts])
    tokens, _ = _tokenised(source, tokenizer)
    first, last = (int(len(tokens) * edge) for edge in share)
    prefix, found = _prefix(tokenizer), tokens[first:last]
    most = len(prefix) + len(found)
    if most < length:
        shorter = f", or shorter windows (--set {key}={most})" if most >= LEAST_WINDOW else ""
        message = f"the text has {most} tokens, less than one window of {length}"
        raise UsageError(message, where=source, fix=f"give more text{shorter}")
    return _spread(found, prefix, samples, length)


def text_beginning(source: str, tokenizer: Any, length: int, share: tuple[float, float] = WHOLE) -> Array:
    """[n] token ids of one text: the first `length` tokens of a source, or all that there are.

    Args:
        source: As for `text_windows`.
        tokenizer: Its tokenizer.
        length: Tokens at most, those with which the tokenizer starts a text included.
        share: Part of the text to use.
    """
    if source == "self":
        return text_windows(source, tokenizer, samples=1, length=length)[0]
    tokens, _ = _tokenised(source, tokenizer)
    first, last = (int(len(tokens) * edge) for edge in share)
    return np.concatenate([_prefix(tokenizer), tokens[first:last]])[:length]


def loss_mask(source: str, tokenizer: Any, *, samples: int, length: int, share: tuple[float, float] = WHOLE) -> Array:
    """Which tokens of `text_windows` count when a model is judged: of prompts with completions, the completions alone.

    Arguments are those of `text_windows`.

    Returns:
        [n, length] bool.
    """
    _, counted = _tokenised(source, tokenizer)
    first, last = (int(len(counted) * edge) for edge in share)
    return _spread(counted[first:last], np.zeros(len(_prefix(tokenizer)), bool), samples, length)


class OwnText(NamedTuple):
    """Windows that a model shall write.

    Attributes:
        samples: Windows.
        length: Tokens per window, the first one included.
        seed: Seed of the samples. A window does not depend on how many others are written.
    """

    samples: int
    length: int
    seed: int


def self_windows(graph: Path, start: int, texts: Sequence[OwnText], progress: Progress) -> list[Array]:
    """Texts that the model writes itself: sampled from its own distribution, so no text need be given.

    All windows of all texts are written side by side, as many at once as their cache and memory allow: each step reads
    the weights once, which takes most of its time.

    Args:
        graph: Folder of an export, mostly the model's plain one: onnxruntime decodes several times faster than torch.
        start: The token that starts every window.
        texts: What is wanted.
        progress: Receives the progress.

    Returns:
        For each text [samples, length] token ids.
    """
    longest = max(text.length for text in texts)
    points = np.concatenate([_points(text, longest) for text in texts])
    session = DecodeSession(graph, capacity=longest)
    fitting = usable_memory() // (CACHE_SHARE * session.layout.bytes_at(longest))
    most = 1 if session.layout.needs_own_runtime else min(SELF_BATCH, max(fitting, 1))
    rounds = -(-len(points) // most)
    rows = -(-len(points) // rounds)
    session.allocate(rows)
    points = np.resize(points, (rounds, rows, longest))
    tokens = np.full(points.shape, start)
    steps = [(part, place) for part in range(rounds) for place in range(1, longest)]
    for part, place in progress.track(steps, "the model's own text"):
        if place == 1:
            session.reset()
        logits = session.step(tokens[part, :, place - 1 : place])[:, -1]
        tokens[part, :, place] = _drawn(logits, points[part, :, place])
    ends = np.cumsum([text.samples for text in texts])
    *windows, _ = np.split(tokens.reshape(-1, longest), ends)  # the last round may have more rows than are wanted
    return [found[:, : text.length] for found, text in zip(windows, texts, strict=True)]


def _points(text: OwnText, width: int) -> Array:
    """[samples, width] where each token lies in its cumulative distribution, from 0 to 1; 0 behind the text's end."""
    drawn = np.random.default_rng(text.seed).random((text.samples, text.length))
    return np.pad(drawn, ((0, 0), (0, width - text.length)))


def _drawn(logits: Logits, points: Array) -> Array:
    """One token [n] from each of the distributions whose logits are [n, vocab], by points [n] between 0 and 1.

    They are drawn one by one: a row fits a processor's cache, and takes half the time there.
    """
    found = []
    for row, point in zip(logits, points, strict=True):
        ends = np.exp(row - row.max()).cumsum(dtype=np.float64)
        found.append(np.searchsorted(ends, point * ends[-1], side="right"))
    return np.minimum(found, logits.shape[1] - 1)


def start_token(config: Any) -> int:
    """The token that starts a text of a model with this config."""
    for token in (config.bos_token_id, config.eos_token_id):
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            return int(token)
    return 0


def _spread(tokens: Array, prefix: Array, samples: int, length: int) -> Array:
    """Up to `samples` windows of tokens, at least one long, each with the prefix in front."""
    body = length - len(prefix)
    available = len(tokens) // body
    starts = np.linspace(0, len(tokens) - body, min(samples, available)).astype(int)
    return np.stack([np.concatenate([prefix, tokens[start : start + body]]) for start in starts])


def _tokenised(source: str, tokenizer: Any) -> tuple[Array, Array]:
    """Token ids of a source, and which of them count."""
    tokens: list[int] = []
    counted: list[bool] = []
    for text, counts in [(source_text(source), True)] if source.startswith("hub:") else _pieces(Path(source)):
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        tokens += ids
        counted += [counts] * len(ids)
    return np.asarray(tokens, dtype=np.int64), np.asarray(counted, dtype=bool)


def _prefix(tokenizer: Any) -> Array:
    """The tokens with which the tokenizer starts every text."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    count = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return np.asarray(whole[:count], dtype=np.int64)


def _read_file(path: Path) -> str:
    return "".join(text for text, _ in _pieces(path))


def _pieces(path: Path) -> list[tuple[str, bool]]:
    """The text of a file in order; prompts apart from completions, of which alone it is said that they count."""
    if is_json_lines(path):
        records = [_texts(record, where) for where, record in read_objects(path, LINES)]
        pieces = [piece for record in records for piece in (*record, ("\n\n", False))][:-1]
    else:
        pieces = [(_plain_text(path), True)]
    if not any(text.strip() for text, _ in pieces):
        raise UsageError("the text is empty", where=str(path), fix="give some thousand words")
    return pieces


def _plain_text(path: Path) -> str:
    """A .txt file; any other name could hold markup or records, which nobody wants a model to be calibrated on."""
    if path.suffix.lower() != ".txt":
        raise UsageError(
            "a text is named .txt, or .jsonl if it is JSON lines",
            where=str(path),
            fix=f"rename it to .txt if all of it is text; for .jsonl {LINES}",
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text: {error}", where=str(path), fix="save the text as UTF-8") from error


def _texts(record: dict[str, Any], where: str) -> list[tuple[str, bool]]:
    """The text of a line, or its prompt and completion, with whether it counts."""
    if isinstance(record.get("text"), str):
        return [(record["text"], True)]
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return [(record["prompt"], False), (record["completion"], True)]
    raise UsageError("no text in this line", where=where, fix=LINES)


def _datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedError(
            "hub data sets need the `hub` extra", where=where, fix="pip install 'kvslim[hub]'"
        ) from error
    return datasets


def _hub_text(source: str) -> str:
    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        rows = _datasets(source).load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises many types for a missing set or no network
        message = f"cannot load data set {name!r}: {first_line(error)}"
        raise NotFoundError(message, where=source, fix="check its name, or give a text file") from error
    if "text" not in rows.column_names:
        raise UsageError(f"data set {name!r} has no column `text`", where=source, fix="give a JSONL file instead")
    return "\n\n".join(rows["text"])
