"""Drafts in onnxruntime-genai, over KVSlim's graphs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.models import OpenModel, add_speculative_graph
from benchmarks.prompts import KINDS, prompt
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.speed.speculative import ids_of, text_file
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.prefix import shared_length

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "n-grams": {"ngram_size": 4, "max_draft_tokens": 8, "ngram_chained_lookup": True, "min_adaptive_k": 2},
    "the model itself": {"max_draft_tokens": 4},
}
TABLE = Table(
    (Column("context", "context", ","), Column("kind", "text")),
    pivot="draft",
    each=(
        Column("speed", "{}: speed", ".2f"),
        Column("right", "right", ".0%"),
        Column("same", "same tokens"),
    ),
    format="",
)


class _Text(NamedTuple):
    tokens: list[int]
    seconds: float
    right: float


@benchmark("smollm2", table=TABLE, quick={"contexts": (48,), "kinds": ("chat",), "tokens": 4, "repeats": 1})
def genai_drafts(
    source: Source,
    *,
    contexts: tuple[int, ...] = (128,),
    kinds: tuple[str, ...] = tuple(KINDS),
    tokens: int = 64,
    repeats: int = 3,
    weights: str = "int4",
) -> Iterator[Values]:
    """Tokens per second of onnxruntime-genai with a draft over those without, on five kinds of text.

    Greedy texts of one thread, in turns; CPU time, the least of the repeats. The graph for speculation verifies, the
    artifact's own is the one without a draft. `right` are the proposals that were right, of those that were looked at.
    """
    model = OpenModel(source, LITTLE, weights=weights)
    folder = model.export(companions=True)
    add_speculative_graph(folder)
    model.release()
    story, document = (text_file(text, source.folder) for text in (source.validation, source.calibration))
    for context in contexts:
        opened = {name: _opened(folder, name) for name in ("", *OPTIONS)}
        for kind in kinds:
            ids = prompt(kind, story, document, ids_of(model.tokenizer), context)
            turns = [
                {name: _written(found, ids, tokens, name) for name, found in opened.items()} for _ in range(repeats)
            ]
            least = {name: min(turn[name].seconds for turn in turns) for name in opened}
            plain = turns[0][""].tokens
            for name in OPTIONS:
                text = turns[0][name]
                found = {"speed": least[""] / least[name], "right": text.right}
                yield {
                    "context": context,
                    "kind": kind,
                    "draft": name,
                    **found,
                    "same": shared_length(plain, text.tokens),
                }


def _opened(folder: Path, draft: str) -> Any:
    """The model in genai, with a draft or without."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    decoder["session_options"]["intra_op_num_threads"] = 1
    changes: dict[str, Any] = {"decoder": {"session_options": {"intra_op_num_threads": 1}}}
    if draft:
        changes["decoder"] |= {"filename": "speculative.onnx", "inputs": {"position_ids": "position_ids"}}
    if draft == "the model itself":
        changes |= {"type": "speculative", "draft": decoder}
    config.overlay(json.dumps({"model": changes}))
    return genai.Model(config)


def _written(model: Any, ids: list[int], tokens: int, draft: str) -> _Text:
    """A text behind a prompt."""
    import onnxruntime_genai as genai

    parameters = genai.GeneratorParams(model)
    length = len(ids) + tokens
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    if draft:
        parameters.set_speculative_options(**OPTIONS[draft])
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(ids, dtype=np.int32))
    start = time.thread_time()
    while not generator.is_done():
        generator.generate_next_token()
    seconds = time.thread_time() - start
    right = generator.get_speculative_stats()["acceptance_rate"] if draft else 0.0
    return _Text(generator.get_sequence(0)[len(ids) :].tolist(), seconds, right)
