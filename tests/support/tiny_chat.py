"""An artifact that chats: a tiny decoder with a byte tokenizer, a chat template and a manifest."""

from __future__ import annotations

import json
from pathlib import Path

from kvslim.export.speculative import write_speculative_graph
from kvslim.runtime.completion import Completer, PromptEncoder
from kvslim.runtime.generate import GREEDY, Sampling
from kvslim.types import Draft
from support.tiny_artifact import describe
from support.tiny_writer import write_writer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_chat(folder: Path, template: str | None = TEMPLATE, draft: Draft | None = None) -> Path:
    """Writes the artifact to a new folder, which comes back; it takes 512 tokens, and 64 unless it is told."""
    folder.mkdir()
    write_writer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    if draft is not None:
        write_speculative_graph(folder)
    describe(folder, draft=draft)
    return folder


def completed(artifact: Path, text: str, tokens: int = 6, sampling: Sampling = GREEDY) -> str:
    """What a fresh cache answers."""
    encoder = PromptEncoder(artifact, 257)
    completer = Completer(artifact, encoder.tokenizer, capacity=512)
    return "".join(completer.stream(encoder.prompt(text), tokens, sampling))
