"""Answers once at a context, and prints the peak memory of that in MiB.

    python -m benchmarks.memory.answer ours|genai FOLDER CONTEXT

It imports no more than that takes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

CHUNK = 512
NEW_TOKENS = 8


def answer(graph: Path, context: int, chunk: int = CHUNK) -> npt.NDArray[np.float32]:
    """Answers at a context by our runtime, which reads the last tokens in chunks; the logits after them, [vocab]."""
    from kvslim.runtime.session import DecodeSession

    session = DecodeSession(graph, capacity=context + NEW_TOKENS, threads=1)
    prompt = np.random.default_rng(0).integers(0, session.vocab, min(CHUNK, context))
    session.fill(context - len(prompt))
    logits = session.prefill(prompt, chunk)
    token = int(logits.argmax())
    for _ in range(NEW_TOKENS):
        token = int(session.step([token], last=1)[-1].argmax())
    return logits


def answer_by_genai(folder: Path, context: int) -> None:
    """Answers to a prompt of that length by onnxruntime-genai."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(
        json.dumps(
            {
                "model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}},
                "search": {"chunk_size": CHUNK, "max_length": context + NEW_TOKENS},
            }
        )
    )
    model = genai.Model(config)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(min_length=context + NEW_TOKENS, max_length=context + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.random.default_rng(0).integers(0, 4096, context).astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()


if __name__ == "__main__":
    from kvslim.validation.rss import own_peak_mib

    {"ours": answer, "genai": answer_by_genai}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    print(own_peak_mib())
