"""What the verbs of other tools are called here."""

from __future__ import annotations

import re

COMPRESS = "`kvslim compress MODEL -o OUT`"
GENERATE = "`kvslim generate ARTIFACT -p TEXT`"
# Of llama.cpp, mlx-lm, optimum-cli, Olive, onnxruntime-genai's builder, ollama, lm-evaluation-harness and the hub.
VERBS = {
    "quantize": "`kvslim compress MODEL -o OUT --weights int4`",
    "quantise": "`kvslim compress MODEL -o OUT --weights int4`",
    "convert": COMPRESS,
    "export": COMPRESS,
    "build": COMPRESS,
    "builder": COMPRESS,
    "create": COMPRESS,
    "optimize": COMPRESS,
    "auto-opt": COMPRESS,
    "run": GENERATE,
    "complete": GENERATE,
    "benchmark": "`kvslim bench ARTIFACT`",
    "perplexity": "`kvslim validate ARTIFACT`",
    "evaluate": "`kvslim eval ARTIFACT --tasks NAME`",
    "lm-eval": "`kvslim eval ARTIFACT --tasks NAME`",
    "info": "`kvslim inspect MODEL`",
    "show": "`kvslim inspect MODEL`",
    "push": "`hf upload USER/NAME ARTIFACT .`",
    "upload": "`hf upload USER/NAME ARTIFACT .`",
    "diff": "`kvslim compare ARTIFACT...`",
}


def hint(message: str) -> str | None:
    """The command of KVSlim for a verb that the parser does not know; None for one that nobody has."""
    found = re.match(r"No such command '([^']*)'", message)
    command = VERBS.get(found[1].replace("_", "-")) if found else None
    return None if command is None else f"here that is {command}"
