"""How far an encoder with codes is from itself without: `kl_evaluator` for models that write no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kvslim.calibrate.sentences import Sentences
from kvslim.loading.architecture import Architecture
from kvslim.transform.edits import Codes
from kvslim.transform.kl_evaluator import remembering, replaying
from kvslim.transform.surgery import layer_modules, trial

BATCH = 16  # sentences of a forward pass


class _Batch(NamedTuple):
    """Sentences that run at once.

    Attributes:
        tokens: What the model is called with.
        targets: [batch, length] the masked tokens, or None where embeddings are compared.
        outputs: What each layer gives without codes.
        reference: What the model answers without codes.
    """

    tokens: dict[str, Tensor]
    targets: Tensor | None
    outputs: list[Any]
    reference: Tensor


class LossEvaluator:
    """Loss of an encoder with codes, on a few sentences.

    The loss is one minus the cosine of mean-pooled embeddings, or, with a masked-token head, the KL divergence of its
    predictions at masked tokens.

    Args:
        model: The prepared encoder, without codes.
        architecture: Where its parts live.
        sentences: What the loss is taken on.
    """

    def __init__(self, model: Any, architecture: Architecture, sentences: Sentences) -> None:
        self.model, self.architecture = model, architecture
        self.layers = layer_modules(model.base_model, architecture)
        self._batches: list[_Batch] = []
        for tokens, targets in _batches(sentences):
            with remembering(self.layers) as outputs:
                reference = self._answers(tokens, targets)
            self._batches.append(_Batch(tokens, targets, outputs, reference))

    def loss(self, codes: Codes) -> float:
        """Mean over sentences, or over masked tokens in nats."""
        first = next((layer for layer, code in enumerate(codes) if not code.is_empty), None)
        if first is None:
            return 0.0
        losses = []
        with trial(self.model.base_model, self.architecture, codes):
            for batch in self._batches:
                with replaying(self.layers[:first], batch.outputs):
                    answers = self._answers(batch.tokens, batch.targets)
                if batch.targets is None:
                    losses.append(1 - torch.cosine_similarity(batch.reference, answers).double())
                else:
                    losses.append((batch.reference.exp() * (batch.reference - answers)).sum(-1).double())
        return max(float(torch.cat(losses).mean()), 0.0)

    def _answers(self, tokens: dict[str, Tensor], targets: Tensor | None) -> Tensor:
        """Embeddings [batch, hidden], or log probabilities [masked tokens, vocab]."""
        with torch.inference_mode():
            if targets is None:
                states = self.model.base_model(**tokens).last_hidden_state
                mask = tokens["attention_mask"][..., None]
                return (states * mask).sum(1) / mask.sum(1)
            logits: Tensor = self.model(**tokens).logits
            return logits[targets].float().log_softmax(-1)


def _batches(sentences: Sentences) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Sentences of about one length together, so that little is padding."""
    texts = sentences.masked or sentences.texts
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        mask = _padded([[1] * len(texts[index]) for index in part])
        tokens = {"input_ids": _padded([texts[index] for index in part]), "attention_mask": mask}
        targets = _padded([sentences.targets[index] for index in part]) if sentences.masked else None
        yield tokens, None if targets is None else targets.bool()


def _padded(rows: Sequence[Any]) -> Tensor:
    """[n, longest], filled up with zeros on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(np.asarray(row)) for row in rows], batch_first=True)
