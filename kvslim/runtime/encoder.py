"""Texts to embeddings on stock onnxruntime: numpy in, numpy out; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvslim.errors import ArtifactError, UsageError
from kvslim.export.manifest import read_manifest
from kvslim.runtime.generate import load_tokenizer
from kvslim.runtime.opening import open_session, run_graph
from kvslim.token_ids import check_ids, check_unicode

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Texts = Sequence[Sequence[int]]
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
_HIDDEN, _LOGITS = "last_hidden_state", "logits"


def mean_pool(hidden: Floats, mask: Ids) -> Floats:
    """The mean of a text's hidden states, padding left out: `pooling_mode_mean_tokens` of sentence-transformers.

    Args:
        hidden: [batch, length, hidden] states.
        mask: [batch, length], 1 for tokens and 0 for padding.

    Returns:
        [batch, hidden] embeddings, not normalised.
    """
    weights = mask[:, :, None].astype(np.float32)
    pooled: Floats = (hidden * weights).sum(1) / np.maximum(weights.sum(1), 1e-9)
    return pooled


def pad(texts: Texts) -> tuple[Ids, Ids]:
    """Token lists as one batch, filled up on the right, with its mask; both [batch, length].

    Raises:
        UsageError: There are no texts, or one has no tokens.
    """
    lengths = [len(text) for text in texts]
    if not lengths or min(lengths) < 1:
        raise UsageError("a text without tokens has no embedding", where="texts", fix="pass at least one token each")
    ids, mask = np.zeros((2, len(texts), max(lengths)), dtype=np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return ids, mask


class EncoderSession:
    """An encoder's graph.

    Attributes:
        has_logits: Whether the graph has a masked-token head.

    Args:
        model: The `.onnx` file, or the folder that holds `model.onnx`.
        threads: Threads of one operator; None leaves the choice to onnxruntime.

    Raises:
        NotFoundError: There is no such file.
        ArtifactError: onnxruntime cannot load it, or it is not an encoder's graph.
    """

    def __init__(self, model: Path, *, threads: int | None = None) -> None:
        self._model = model
        self._session = open_session(model, threads)
        self._inputs = [node.name for node in self._session.get_inputs()]
        outputs = [node.name for node in self._session.get_outputs()]
        if _HIDDEN not in outputs or not _INPUTS.issuperset(self._inputs):
            raise ArtifactError(
                f"not an encoder: inputs {', '.join(self._inputs[:4])}, outputs {', '.join(outputs[:4])}",
                where=str(model),
                fix="name a folder that `kvslim compress` made of an encoder",
            )
        self.has_logits = _LOGITS in outputs

    def hidden_states(self, ids: Ids, mask: Ids, types: Ids | None = None) -> Floats:
        """The last layer's states.

        Args:
            ids: [batch, length] token ids.
            mask: [batch, length], 1 for tokens and 0 for padding.
            types: [batch, length], 1 for tokens of the second of two sentences, where the family tells them apart.

        Returns:
            [batch, length, hidden].

        Raises:
            ArtifactError: onnxruntime fails, as it does on more tokens than the model has positions.
        """
        return self._run(_HIDDEN, ids, mask, types)

    def logits(self, ids: Ids, mask: Ids, types: Ids | None = None) -> Floats:
        """What the masked-token head says of each token, [batch, length, vocab]; arguments as `hidden_states`.

        Raises:
            UsageError: The graph has no such head.
            ArtifactError: onnxruntime fails.
        """
        if not self.has_logits:
            raise UsageError(
                "the graph has no masked-token head", where=str(self._model), fix="compress a ...ForMaskedLM model"
            )
        return self._run(_LOGITS, ids, mask, types)

    def embed(self, texts: Texts) -> Floats:
        """The mean-pooled embedding of each list of token ids, [batch, hidden]; see `mean_pool`."""
        ids, mask = pad(texts)
        return mean_pool(self.hidden_states(ids, mask), mask)

    def encode(self, texts: Sequence[str], batch: int = 8) -> Floats:
        """The mean-pooled embedding of each text, [n, hidden].

        Args:
            texts: Any number of texts, none beyond the model's positions.
            batch: Texts that run at once.

        Raises:
            NotFoundError, ArtifactError: The folder's tokenizer.json or kvslim.json is missing or broken, or
                onnxruntime fails.
            UsageError: A text is not Unicode, or has a token that the model does not know.
        """
        tokenizer, spec = load_tokenizer(self._model), read_manifest(self._model).spec
        for text in texts:
            check_unicode(text, where="texts")
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        check_ids([*chain(*tokens)], spec.vocab_size, tokenizer.id_to_token, where="texts")
        parts = [self.embed(tokens[start : start + batch]) for start in range(0, max(1, len(tokens)), batch)]
        return np.concatenate(parts)

    def _run(self, output: str, ids: Ids, mask: Ids, types: Ids | None) -> Floats:
        values = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(ids) if types is None else types,
        }
        feed = {name: values[name] for name in self._inputs}
        return run_graph(self._session, output, feed, str(self._model))
