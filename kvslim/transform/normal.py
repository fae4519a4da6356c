"""Modules in the one form that surgery and the exporter know, computing what they computed before."""

from __future__ import annotations

from torch import nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D


def normalise(model: nn.Module) -> None:
    """Makes each Conv1D a Linear, and each tanh-approximated GELU written out a GELU that onnxruntime fuses."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, _linear(module))
        elif isinstance(module, NewGELUActivation):
            model.set_submodule(name, nn.GELU(approximate="tanh"))


def _linear(conv: Conv1D) -> nn.Linear:
    """Conv1D is a Linear that keeps its weight transposed."""
    inputs, outputs = conv.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear
