"""Statistics of attention outputs, gathered from texts of any length: what encoders' heads are chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvslim.calibrate.parts import parts_recorded
from kvslim.calibrate.recorder import output_gram
from kvslim.calibrate.statistics import HeadStatistics
from kvslim.contract import ModelSpec
from kvslim.loading.architecture import Architecture
from kvslim.progress import Progress
from kvslim.transform.hooks import attached
from kvslim.transform.projections import projection
from kvslim.transform.surgery import attention_modules

Texts = Sequence[Sequence[int]]


def collect_heads(
    model: Any,
    architecture: Architecture,
    spec: ModelSpec,
    texts: Texts,
    progress: Progress,
) -> HeadStatistics:
    """Runs texts through a prepared model without codes; every token counts alike.

    Args:
        model: The model without a head.
        architecture: Where its parts live.
        spec: Its shape.
        texts: Token ids of each.
        progress: Receives the progress.
    """
    attentions = attention_modules(model, architecture)
    sums = [_Sums(spec) for _ in attentions]
    hooks = (
        attention.get_submodule(architecture.output).register_forward_pre_hook(total)
        for attention, total in zip(attentions, sums, strict=True)
    )
    with attached(hooks), torch.inference_mode(), parts_recorded(model, architecture) as parts:
        for text in progress.track(texts, "sentences"):
            model(input_ids=torch.tensor([text]))
    grams = [output_gram(attention, architecture, spec) for attention in attentions]
    added = [part.finish() for part in parts]
    for attention, total, layer in zip(attentions, sums, added, strict=True):
        weight, bias = projection(attention, architecture, "output")
        layer["attention_mean"] = weight @ total.mean.numpy().ravel() + (0.0 if bias is None else bias)
    return HeadStatistics(
        output_mean=np.stack([total.mean.numpy() for total in sums]),
        fluctuation=np.stack([total.fluctuation(gram) for total, gram in zip(sums, grams, strict=True)]),
        **{name: np.stack([layer[name] for layer in added]) for name in added[0]},
    )


class _Sums:
    """Sums over the tokens of one layer's attention outputs, in float64."""

    def __init__(self, spec: ModelSpec) -> None:
        self.tokens, self.heads = 0, (spec.q_heads, spec.head_dim)
        self.total: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def __call__(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """Adds what an output projection reads, [batch, length, q_heads * head_dim]."""
        outputs = inputs[0].double().flatten(0, 1).unflatten(-1, self.heads)
        self.tokens += len(outputs)
        self.total = self.total + outputs.sum(0)
        self.square = self.square + torch.einsum("thd,the->hde", outputs, outputs)

    @property
    def mean(self) -> Tensor:
        """[q_heads, head_dim]."""
        return torch.as_tensor(self.total) / self.tokens

    def fluctuation(self, gram: np.ndarray) -> np.ndarray:
        """[q_heads] variances of what each head adds; `gram` as `output_gram` gives it."""
        covariance = torch.as_tensor(self.square) / self.tokens - torch.einsum("hd,he->hde", self.mean, self.mean)
        found: np.ndarray = np.einsum("hde,hde->h", covariance.numpy(), gram.reshape(covariance.shape))
        return found
