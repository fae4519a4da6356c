"""RoPE in KVSlim's own hands: the model's rotary module rotates by nothing, and the slim attention rotates instead.

Every family calls one rotary module for its cosines and sines and applies them to the first coordinates of each head.
Given a cosine of one and a sine of zero that step is the identity, so the slim attention sees q and k before RoPE, in
all families alike, and can rotate in torch or leave it to onnxruntime's fused operators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvslim.loading.architecture import Architecture


@dataclass(frozen=True)
class Rotary:
    """One RoPE of a model.

    Attributes:
        frequencies: [rotary_dim / 2] float64 radians per position.
        scale: Factor of rotated coordinates (the attention factor of YaRN and LongRoPE), 1 for others.
        cos, sin: [positions, rotary_dim / 2] float32 tables, times `scale`.
    """

    frequencies: np.ndarray
    scale: float
    cos: Tensor
    sin: Tensor

    @property
    def dim(self) -> int:
        """Coordinates of a head that are rotated."""
        return 2 * len(self.frequencies)

    def to(self, device: torch.device) -> Rotary:
        """The same with its tables on a device."""
        return replace(self, cos=self.cos.to(device), sin=self.sin.to(device))

    def scaled(self, states: Tensor) -> Tensor:
        """`states` [..., head_dim] before RoPE, times what RoPE multiplies them by."""
        if self.scale == 1:
            return states
        return torch.cat([states[..., : self.dim] * self.scale, states[..., self.dim :]], dim=-1)

    def rotated(self, states: Tensor) -> Tensor:
        """`states` [..., length, head_dim] after RoPE, at positions 0 .. length - 1."""
        length, half = states.shape[-2], len(self.frequencies)
        cos, sin = self.cos[:length], self.sin[:length]
        first, second = states[..., :half], states[..., half : self.dim]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*turned, states[..., self.dim :]], dim=-1)


class _NoRotation(nn.Module):
    """Stands in for a model's rotary module: cosine one, sine zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("cos", torch.ones(1, 1, dim), persistent=False)
        self.register_buffer("sin", torch.zeros(1, 1, dim), persistent=False)

    def forward(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.cos, self.sin


def take_over(model: nn.Module, architecture: Architecture, positions: int) -> list[Rotary | None]:
    """Silences a model's rotary module.

    Args:
        model: The model; edited.
        architecture: Where its parts live.
        positions: Rows of the tables.

    Returns:
        The RoPE of each layer; None where a layer has none.
    """
    layers = list(model.get_submodule(architecture.layers).children())
    if architecture.rotary is None:
        return [None] * len(layers)
    module: Any = model.get_submodule(architecture.rotary)
    made = {kind: _rotary(module, kind, positions) for kind in getattr(module, "layer_types", [None])}
    model.set_submodule(architecture.rotary, _NoRotation(next(iter(made.values())).dim))
    return [_of_layer(layer.get_submodule(architecture.attention), made) for layer in layers]


def _of_layer(attention: Any, made: dict[str | None, Rotary]) -> Rotary | None:
    if not getattr(attention, "use_rope", True):
        return None
    return made[attention.layer_type] if None not in made else made[None]


def _long_frequencies(module: Any, positions: int) -> Tensor | None:
    """LongRoPE's frequencies for contexts beyond the original one, if that is what is asked for."""
    rope = module.config.rope_parameters
    if rope.get("rope_type") != "longrope" or positions <= rope["original_max_position_embeddings"]:
        return None
    frequencies: Tensor = ROPE_INIT_FUNCTIONS["longrope"](module.config, None, seq_len=positions)[0]
    return frequencies.float()


def _rotary(module: Any, kind: str | None, positions: int) -> Rotary:
    """Tables as the model's own module computes them: angles in float32."""
    prefix = "" if kind is None else f"{kind}_"
    frequencies = _long_frequencies(module, positions)
    if frequencies is None:
        frequencies = getattr(module, f"{prefix}inv_freq").detach().float()
    scale = float(getattr(module, f"{prefix}attention_scaling"))
    angles = torch.arange(positions).float()[:, None] * frequencies
    return Rotary(frequencies.double().numpy(), scale, angles.cos() * scale, angles.sin() * scale)
