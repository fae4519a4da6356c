"""The model in memory: float32 weights, evaluation mode, KVSlim's attention, and its tokenizer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kvslim.contract import ModelSpec
from kvslim.errors import KvslimError, ModelError, first_line, one_line
from kvslim.loading.config import FIX, model_config
from kvslim.loading.encoders import ENCODERS, HEADS
from kvslim.loading.mapped import MappedWeights, check_folder, mapped_bytes
from kvslim.loading.matched import check_matched, check_shapes, check_trained
from kvslim.loading.snapshot import Snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def load_model(snapshot: Snapshot) -> PreTrainedModel:
    """The causal language model in float32, in evaluation mode.

    Weights in another type or in codes are read and converted one by one, so that memory never holds a second copy.
    Where it is too small even for one, they are mapped from files (`loading/mapped.py`).

    Raises:
        ModelError: The weights are corrupt, or not all and only those of the config, or nobody trained them.
        OutputError: They are larger than memory, and the disk is full.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return _load(MODEL_FOR_CAUSAL_LM_MAPPING, snapshot)


def load_encoder(snapshot: Snapshot, spec: ModelSpec) -> PreTrainedModel:
    """The encoder in float32, in evaluation mode, with its masked-token head if the config names one.

    Raises:
        ModelError: As `load_model`.
    """
    classes, options = encoder_class(spec)
    return _load(classes, snapshot, HEADS, **options)


def encoder_class(spec: ModelSpec) -> tuple[Any, dict[str, bool]]:
    """transformers' model class for an encoder's task, and the arguments of its constructor."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

    if spec.task == "fill-mask":
        return MODEL_FOR_MASKED_LM_MAPPING, {}
    return MODEL_MAPPING, {"add_pooling_layer": False} if ENCODERS[spec.model_type].pooler else {}


def empty_model(classes: Any, snapshot: Snapshot, **options: Any) -> PreTrainedModel:
    """The model of a task's class for its config on torch's meta device: shapes without numbers.

    Raises:
        ModelError: The config describes no model that can be built.
    """
    import torch

    where = str(snapshot.config_file)
    config = model_config(snapshot.config(), where)
    try:
        with torch.device("meta"):
            return classes[type(config)](config, **options)
    except Exception as error:  # modelling code raises many exception types
        message = f"no model can be built from its config: {one_line(error)}"
        raise ModelError(message, where=where, fix=FIX) from error


def check_room(snapshot: Snapshot) -> int:
    """Bytes of temporary files that a decoder's weights take while it is open: 0 where they fit into memory.

    Raises:
        ModelError: They would be large because config.json is that of another model.
        OutputError: They do not fit, and temporary files lie in memory too.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    empty = empty_model(MODEL_FOR_CAUSAL_LM_MAPPING, snapshot)
    size = mapped_bytes(empty)
    if size:
        check_shapes(snapshot.tensors(), empty, str(snapshot.path))
        check_folder()
    return size


def _load(classes: Any, snapshot: Snapshot, idle: re.Pattern[str] | None = None, **options: Any) -> PreTrainedModel:
    """The model of a task's class for its config; `idle` are names of weights that it may leave unused."""
    where = str(snapshot.path)
    empty = empty_model(classes, snapshot, **options)  # whatever fails later is the fault of the weights
    try:
        check_shapes(snapshot.tensors(), empty, where)
        mapped = MappedWeights() if mapped_bytes(empty) else None
        model, info = _read(classes, snapshot, mapped, **options)
        check_matched(info, model.config, where, idle)
        model = snapshot.adapted(model)
        if mapped is not None:
            mapped.follow(model)
    except KvslimError:
        raise
    except Exception as error:  # safetensors, torch and transformers each raise their own exception types
        fix = "download the model again"
        raise ModelError(f"cannot load the weights: {first_line(error)}", where=where, fix=fix) from error
    check_trained(model, where)
    return model.eval()


def _read(
    classes: Any, snapshot: Snapshot, mapped: MappedWeights | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as it is stored, and what transformers tells of loading it; its weights in memory, or mapped."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = model_config(snapshot.config(), str(snapshot.config_file))
    model, info = classes[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=snapshot.tensors() if mapped is None else mapped.read(snapshot.tensors()),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_matched` refuses them by name
        trust_remote_code=False,
        **options,
    )
    if generation := snapshot.generation_config():
        model.generation_config = generation
    return model, info


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
    except Exception as error:  # what reads the tokenizer of a GGUF raises several exception types
        fix = "give a newer GGUF of the model, or the safetensors that the file was made from"
        raise ModelError(
            f"cannot load the tokenizer: {first_line(error)}", where=str(snapshot.path), fix=fix
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer has no tokenizer.json", where=str(snapshot.path), fix="convert it to a fast tokenizer"
        )
    return tokenizer
