"""The model in memory: float32 weights, evaluation mode, KVSlim's attention, and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvslim.errors import ModelError
from kvslim.load.encoders import ENCODERS
from kvslim.load.source import Snapshot
from kvslim.types import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def load_model(snapshot: Snapshot) -> PreTrainedModel:
    """The causal language model in float32, in evaluation mode.

    Raises:
        ModelError: The weights are corrupt, missing in part, or of another shape than the config says.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, snapshot)


def load_encoder(snapshot: Snapshot, spec: ModelSpec) -> PreTrainedModel:
    """The encoder in float32, in evaluation mode, with its masked-token head where the config names one.

    Raises:
        ModelError: As `load_model`.
    """
    from transformers import AutoModel, AutoModelForMaskedLM

    if spec.task == "fill-mask":
        return _load(AutoModelForMaskedLM, snapshot)
    return _load(AutoModel, snapshot, **({"add_pooling_layer": False} if ENCODERS[spec.model_type].pooler else {}))


def _load(model_class: Any, snapshot: Snapshot, **options: Any) -> PreTrainedModel:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fix = "download the model again"
    try:
        model, info = model_class.from_pretrained(
            snapshot.path,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # safetensors, torch and transformers each raise their own types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load the weights: {reason}", where=str(snapshot.path), fix=fix) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{len(missing)} weights are missing, first {missing[0]!r}", where=str(snapshot.path), fix=fix)
    return model.eval()


def load_tokenizer(snapshot: Snapshot) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(snapshot.path, local_files_only=True)
    except Exception as error:  # transformers raises several types for a missing or broken tokenizer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot load the tokenizer: {reason}",
            where=str(snapshot.path),
            fix="add tokenizer.json (save_pretrained of the tokenizer)",
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer has no tokenizer.json", where=str(snapshot.path), fix="convert it to a fast tokenizer"
        )
    return tokenizer
