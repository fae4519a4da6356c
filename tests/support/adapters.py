"""LoRA adapters of tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

# peft asks transformers by a name that is on its way out.
quiet_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RANK = 4
MATRIX = "model.layers.1.self_attn.q_proj"


def save_adapter(folder: Path, config: dict[str, Any], matrix: str) -> Path:
    """An adapter of one square matrix of 64 columns."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    matrices = {
        f"{matrix}.lora_A.weight": torch.randn(RANK, 64, generator=generator),
        f"{matrix}.lora_B.weight": torch.randn(64, RANK, generator=generator),
    }
    save_file(matrices, folder / "adapter_model.safetensors")
    return folder
