"""SmolLM2 as a Qwen2 whose keys have large biases, as those of trained Qwen2 models do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SLOWEST = 3  # pairs of coordinates that RoPE turns by least: over 4,096 tokens of SmolLM2 by 3 to 7 degrees
LARGE, USUAL = 60.0, 15.0  # size of a bias in the first two layers and the last, and in all others
SPREAD = 0.8  # of the logarithm of sizes


def save_biased(gguf: Path, folder: Path) -> None:
    """Writes the model of a file of SmolLM2 with biases of its keys, and its tokenizer.

    A bias that RoPE hardly turns moves all scores of a query alike, so the model says nearly the same: perplexity on
    WikiText rises from 13.6 to 13.7. But a few coordinates of its keys are now tens of times larger than all others.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    name = {"gguf_file": gguf.name}
    original: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **name)
    others = {"model_type", "architectures", "quantization_config"}
    shape = {key: value for key, value in original.config.to_dict().items() if key not in others}
    biased: Any = Qwen2ForCausalLM(Qwen2Config(**shape)).to(torch.float32)
    biased.load_state_dict(original.state_dict(), strict=False)  # what is missing are the biases
    random, layers = np.random.default_rng(0), biased.model.layers
    for number, layer in enumerate(layers):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.bias.data.zero_()
        keys = attention.k_proj.bias.data.view(-1, 2, attention.head_dim // 2)  # the two numbers of a pair lie apart
        sizes = (LARGE if number in (0, 1, len(layers) - 1) else USUAL) * np.exp(
            SPREAD * random.standard_normal((len(keys), SLOWEST))
        )
        angles = random.uniform(0, 2 * np.pi, sizes.shape)
        pairs = np.stack([sizes * np.cos(angles), sizes * np.sin(angles)], axis=1)
        keys[..., -SLOWEST:] = torch.from_numpy(pairs.astype(np.float32))
    biased.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **name).save_pretrained(folder)
