"""Counts the parameters of a config on the model's own modules, without allocating them."""

from __future__ import annotations

from kvslim.contract import Frozen, ModelSpec
from kvslim.loading.model import empty_model, encoder_class
from kvslim.loading.snapshot import Snapshot

KINDS = ("products", "head", "embedding", "positions", "others")


class Parameters(Frozen):
    """Parameters, grouped by how a token uses them.

    Attributes:
        products: In matrices that every token is multiplied with.
        head: In the matrix that gives logits, which only the last token of a prompt needs; the embedding, if tied.
        embedding: In a token embedding that is not the head; a token reads one row of it.
        positions: In tables of learned positions or segments; a token reads one row of each.
        others: In norms and biases.
        width: Numbers that a layer's matrices make of a token: those of a layer over the hidden size.
    """

    products: int
    head: int
    embedding: int
    positions: int
    others: int
    width: float

    @property
    def total(self) -> int:
        """The total; a tied table counts once."""
        return self.products + self.head + self.embedding + self.positions + self.others


def count_parameters(snapshot: Snapshot, spec: ModelSpec) -> Parameters:
    """The parameters of the model that `kvslim compress` would export.

    Raises:
        NotFoundError, ModelError: The config cannot be read, or no model can be built from it.
    """
    import torch
    from torch.nn import Embedding
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    classes, options = encoder_class(spec) if spec.is_encoder else (MODEL_FOR_CAUSAL_LM_MAPPING, {})
    model = empty_model(classes, snapshot, **options)
    tables = {id(part.weight) for part in model.modules() if isinstance(part, Embedding)}
    head = getattr(model.get_output_embeddings(), "weight", None)
    counts = dict.fromkeys(KINDS, 0)

    def kind(parameter: torch.Tensor) -> str:
        if parameter is head:
            return "head"
        if parameter is model.get_input_embeddings().weight:
            return "embedding"
        if id(parameter) in tables:
            return "positions"
        return "products" if parameter.ndim == 2 else "others"

    for parameter in model.parameters():
        counts[kind(parameter)] += parameter.numel()
    return Parameters(**counts, width=counts["products"] / (spec.layers * spec.hidden_size))
