"""Answers to compare by eye: what the plain export and the artifact write after the same few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kvslim.measures import SampleAnswer
from kvslim.progress import Progress
from kvslim.runtime.generate import eos_ids, load_tokenizer
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write

SAMPLES, PROMPT, ANSWER = 3, 64, 48  # texts, and tokens of each at most


def sample_answers(
    plain: Path, artifact: Path, windows: Sequence[np.ndarray], progress: Progress
) -> tuple[SampleAnswer, ...]:
    """How both continue the beginnings of held-out texts, greedily and through their caches.

    A prompt and its answer are together no longer than the text, so that they have positions.

    Args:
        plain: Folder of the plain export.
        artifact: Folder of the artifact, with its tokenizer and generation config.
        windows: Token ids of texts, the first of which are used.
        progress: Receives the progress.

    Raises:
        NotFoundError: A file of a folder is missing.
        ArtifactError: A file of a folder is broken.
    """
    tokenizer, ends = load_tokenizer(artifact), eos_ids(artifact)
    sessions = [DecodeSession(folder, capacity=PROMPT + ANSWER) for folder in (plain, artifact)]
    found = []
    for window in progress.track(windows[:SAMPLES], "sample answers"):
        ids = window[: min(PROMPT, len(window) // 2)].tolist()
        most = min(ANSWER, len(window) - len(ids))
        answers = (_answer(session, Completion(tokenizer, ids, most, ends=ends)) for session in sessions)
        found.append(SampleAnswer(prompt=_text(tokenizer, ids), plain=next(answers), artifact=next(answers)))
    return tuple(found)


def _answer(session: DecodeSession, completion: Completion) -> str:
    session.reset()
    return "".join(piece for _, piece in write(session, [completion], session.prefill(completion.ids)[None]))


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids)
    return text
