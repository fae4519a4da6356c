"""The model in memory: float32 weights, evaluation mode, KVSlim's attention, and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvslim.contract import ModelSpec
from kvslim.errors import KvslimError, ModelError
from kvslim.loading.encoders import ENCODERS
from kvslim.loading.snapshot import Snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def load_model(snapshot: Snapshot) -> PreTrainedModel:
    """The causal language model in float32, in evaluation mode.

    Weights in another type or in codes are read and converted one by one, so that memory never holds a second copy.

    Raises:
        ModelError: The weights are corrupt or incomplete, or their shapes do not match the config.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return _load(MODEL_FOR_CAUSAL_LM_MAPPING, snapshot)


def load_encoder(snapshot: Snapshot, spec: ModelSpec) -> PreTrainedModel:
    """The encoder in float32, in evaluation mode, with its masked-token head if the config names one.

    Raises:
        ModelError: As `load_model`.
    """
    classes, options = encoder_class(spec)
    return _load(classes, snapshot, **options)


def encoder_class(spec: ModelSpec) -> tuple[Any, dict[str, bool]]:
    """transformers' model class for an encoder's task, and the arguments of its constructor."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

    if spec.task == "fill-mask":
        return MODEL_FOR_MASKED_LM_MAPPING, {}
    return MODEL_MAPPING, {"add_pooling_layer": False} if ENCODERS[spec.model_type].pooler else {}


def _load(classes: Any, snapshot: Snapshot, **options: Any) -> PreTrainedModel:
    """The model of a task's class for its config."""
    import torch

    where, fix = str(snapshot.path), "download the model again"
    try:
        model, missing = _read(classes, snapshot, **options)
        if missing:
            raise ModelError(f"{len(missing)} weights are missing, first {missing[0]!r}", where=where, fix=fix)
        model = snapshot.adapted(model)
    except KvslimError:
        raise
    except Exception as error:  # safetensors, torch and transformers each raise their own exception types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load the weights: {reason}", where=where, fix=fix) from error
    # A sum makes no copy of the weights, and in float64 it cannot overflow.
    broken = (name for name, weight in model.named_parameters() if not weight.sum(dtype=torch.float64).isfinite())
    if name := next(broken, None):
        raise ModelError(f"weights are not finite, first {name!r}", where=where, fix=fix)
    return model.eval()


def _read(classes: Any, snapshot: Snapshot, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model as it is stored, and the weights that are not."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = AutoConfig.for_model(**snapshot.config())
    model, info = classes[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=snapshot.tensors(),
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
        **options,
    )
    if generation := snapshot.generation_config():
        model.generation_config = generation
    return model, sorted(info["missing_keys"])


def load_tokenizer(snapshot: Snapshot) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer.

    Raises:
        ModelError: There is none, or it cannot be read.
        UnsupportedError: It is code that came with the model.
    """
    try:
        tokenizer = snapshot.tokenizer()
    except KvslimError:
        raise
    except Exception as error:  # transformers raises several exception types for a missing or broken tokenizer
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
