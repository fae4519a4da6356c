"""Every family of decoders through export and onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.loading.architecture import ARCHITECTURES
from kvslim.runtime.session import DecodeSession

SLIM = ({"kv_pca": {"rank_ratio": 0.5}}, "kv_quant")
TABLE = Table(
    (
        Column("model", "model"),
        Column("model_type", "`model_type`"),
        Column("note", "of its own"),
        Column("plain", "plain", ".0e"),
        Column("slim", "slim", ".0e"),
    )
)


@benchmark("families", table=TABLE, quick={"tokens": 24})
def families(source: Source, *, tokens: int = 40, steps: int = 8) -> Iterator[Values]:
    """Every family through export and onnxruntime, against transformers: the largest difference of any logit.

    Tiny random models, float32: a prefill and 8 cached steps. `plain` is compared with transformers' own model; `slim`
    (half the rank, int8 cache) with the same codes computed in torch.
    """
    for folder in sorted(Path(source.model).iterdir()):
        model = OpenModel(source._replace(model=str(folder), folder=source.folder), LITTLE)
        kind, row = model.spec.model_type, ARCHITECTURES[model.spec.model_type]
        variant = "" if kind == folder.name else f" ({folder.name.partition('-')[2]})"
        ids = np.random.default_rng(0).integers(0, model.spec.vocab_size, tokens)
        plan = model.decided(*SLIM)
        codes = model.codes(plan)
        pairs = {
            "plain": (cached_logits(model.export(), ids, steps), original_logits(folder, ids)),
            "slim": (cached_logits(model.export(plan, codes), ids, steps), model.logits(codes, ids)),
        }
        differences = {name: float(np.abs(ours - theirs).max()) for name, (ours, theirs) in pairs.items()}
        yield {"model": f"{row.title}{variant}", "model_type": f"`{kind}`", "note": row.note, **differences}


def cached_logits(graph: Path, tokens: np.ndarray, steps: int) -> np.ndarray:
    """[n, vocab] logits through the cache: one prefill, then single tokens."""
    session = DecodeSession(graph, capacity=len(tokens), all_positions=True)
    first = len(tokens) - steps
    return np.concatenate([session.step(tokens[:first]), *(session.step([token]) for token in tokens[first:])])


def original_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """[n, vocab] logits as transformers computes them, without any of KVSlim."""
    import torch
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.inference_mode():
        return original(torch.from_numpy(tokens[None])).logits[0].numpy()
