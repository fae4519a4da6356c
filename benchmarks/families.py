"""Every family through export and onnxruntime, against transformers: largest difference of any logit.

    python benchmarks/families.py

Tiny random models, float32, 40 tokens: a prefill of 32 and 8 cached steps. `plain` is compared with transformers'
own model; `slim` (half the rank, int8 cache) with the same codes computed in torch.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
from support.models import (
    cached_logits,
    export_slim,
    open_workshop,
    original_logits,
    recipe_of,
    tokens_of,
    torch_logits,
)
from support.tiny_decoders import CONFIGS, save_decoder

from kvslim.load.architecture import ARCHITECTURES
from kvslim.methods import KvPca, KvQuant, Method

SLIM = (KvPca(rank_ratio=0.5), KvQuant())


def main() -> None:
    """Prints a markdown table."""
    print("| model | `model_type` | of its own | plain | slim |\n|---|---|---|---:|---:|")
    for name, config in CONFIGS.items():
        kind = config.get("model_type", name)
        row, variant = ARCHITECTURES[kind], "" if kind == name else f" ({name.partition('-')[2]})"
        with tempfile.TemporaryDirectory() as folder:
            plain, slim = differences(name, Path(folder))
        print(f"| {row.title}{variant} | `{kind}` | {row.note} | {plain:.0e} | {slim:.0e} |", flush=True)


def differences(name: str, folder: Path) -> tuple[float, float]:
    """Of the plain graph from transformers, and of the slim one from torch."""
    model = save_decoder(name, folder / "model")
    tokens, _, plain = through_cache(model, (), folder / "plain")
    _, coded, slim = through_cache(model, SLIM, folder / "slim")
    return float(np.abs(plain - original_logits(model, tokens)).max()), float(np.abs(slim - coded).max())


def through_cache(model: Path, methods: tuple[Method, ...], folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, and the logits of the model with its codes in torch and in onnxruntime."""
    workshop = open_workshop(model, recipe_of(methods))
    tokens = tokens_of(workshop)
    export_slim(workshop, folder)
    return tokens, torch_logits(workshop, tokens), cached_logits(folder, tokens)


if __name__ == "__main__":
    main()
