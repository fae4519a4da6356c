"""transformers' config of a config.json, whose values are checked by name before any weight is read."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from kvslim.errors import ModelError, one_line

# How transformers should run and return, which does not change what the model computes; KVSlim decides it.
HOW_TO_RUN = frozenset(
    {
        "attn_implementation",
        "_attn_implementation",
        "dtype",
        "torch_dtype",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        "use_cache",
        "use_return_dict",
    }
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SIZES = frozenset(
    {
        "dim",
        "ffn_dim",
        "head_dim",
        "hidden_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "n_embd",
        "n_head",
        "n_heads",
        "n_inner",
        "n_layer",
        "n_layers",
        "n_positions",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "type_vocab_size",
        "vocab_size",
        "word_embed_proj_dim",
    }
)
POSITIVE = SIZES | frozenset(
    {
        "attention_factor",
        "attn_logit_softcapping",
        "beta_fast",
        "beta_slow",
        "factor",
        "final_logit_softcapping",
        "high_freq_factor",
        "logits_scaling",
        "long_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "query_pre_attn_scalar",
        "repetition_penalty",
        "rope_theta",
        "rotary_emb_base",
        "rotary_pct",
        "short_factor",
    }
)
DROPOUTS = frozenset(
    {
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "dropout",
        "embd_pdrop",
        "embedding_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "resid_pdrop",
        "residual_dropout",
    }
)
SHARES = DROPOUTS | {"min_p", "partial_rotary_factor", "rotary_pct", "top_p", "typical_p"}
WHOLE = SIZES | {"original_max_position_embeddings", "top_k"}
EPSILONS = frozenset({"layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "rms_norm_eps"})
NUMBERS = POSITIVE | SHARES | WHOLE | EPSILONS | {"temperature"}
LISTS = frozenset({"long_factor", "short_factor"})  # numbers that come as a list
# What configs carry over from other families. transformers keeps a key that a family does not have as an attribute, and
# its caches and KVSlim would read it where the modelling code does not.
STRAYS = ("layer_types", "num_key_value_heads", "sliding_window", "use_sliding_window")
HEADS_DIVIDE = ("gpt2", "gpt_neox", "opt", "stablelm")  # families that read no head_dim
LARGEST = 2**63 - 1
SMALLEST_FLOAT, LARGEST_FLOAT = 2.0**-126, 2.0**127  # of float32, in which models compute
ACTIVATIONS = ("activation_function", "activation", "hidden_act", "hidden_activation")
OLD_LONGROPE = ("su", "yarn")
FIELD = re.compile(r"alidation error for field '(\w+)'")
FIX = "correct it, or download the model again"


def model_config(raw: Mapping[str, Any], where: str) -> Any:
    """The config as a class of transformers, with tokens only where the vocabulary has them.

    Args:
        raw: config.json.
        where: Its path, for errors.

    Raises:
        ModelError: Naming the value that cannot be.
    """
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    kept = _with_names_of_today(_without_how_to_run(raw))
    for key, value in _values(kept):
        if fault := number_fault(key, value):
            raise wrong_value(key, value, fault, where)
    for key in ACTIVATIONS:
        if isinstance(kept.get(key), str) and kept[key] not in ACT2FN:
            raise wrong_value(key, kept[key], "no activation of transformers", where)
    try:
        config = AutoConfig.for_model(**kept)
        _drop_strays(config)
        for key in TOKENS:
            setattr(config, key, _known(getattr(config, key, None), config.get_text_config().vocab_size))
    except Exception as error:  # transformers' config classes raise many exception types
        raise broken_config(error, kept, where) from error
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if ("rope_theta", None) in _values(rope):
        raise wrong_value("rope_theta", None, "this is not a number", where)
    return config


def _drop_strays(config: Any) -> None:
    for key in (*STRAYS, *(["head_dim"] if config.model_type in HEADS_DIVIDE else [])):
        if key in vars(config) and not hasattr(type(config), key):
            delattr(config, key)


def broken_config(error: Exception, raw: Mapping[str, Any], where: str) -> ModelError:
    """What transformers has against a config, with the key where that is known."""
    reason = one_line(error)
    field = FIELD.search(reason)
    if field and field[1] in raw:
        kinds = dict.fromkeys(re.findall(rf"'{field[1]}' expected (?:a )?(\w+)", reason))
        return wrong_value(field[1], raw[field[1]], f"expected {' or '.join(kinds)}".replace("NoneType", "null"), where)
    return ModelError(f"config.json is broken: {reason}", where=where, fix=FIX)


def wrong_value(key: str, value: object, fault: str, where: str) -> ModelError:
    """An error about one value of a file."""
    return ModelError(f"{key} is {reprlib.repr(value)}: {fault}", where=f"{where}: {key}", fix=FIX)


def _without_how_to_run(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config and those inside it, without `HOW_TO_RUN`."""
    return {
        key: _without_how_to_run(value) if isinstance(value, Mapping) else value
        for key, value in raw.items()
        if key not in HOW_TO_RUN
    }


def _with_names_of_today(raw: dict[str, Any]) -> dict[str, Any]:
    """The first configs of Phi-3 call LongRoPE `su` or `yarn`, and transformers would miss what these names ask for."""
    if raw.get("model_type") != "phi3":
        return raw
    ropes = {key: raw[key] for key in ("rope_scaling", "rope_parameters") if isinstance(raw.get(key), Mapping)}
    kinds = {"type", "rope_type"}
    return raw | {
        key: {name: "longrope" if name in kinds and value in OLD_LONGROPE else value for name, value in rope.items()}
        for key, rope in ropes.items()
    }


def _values(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every single value of a config, of those inside it and of its lists, with its key."""
    for key, value in raw.items():
        if key in NUMBERS - LISTS:
            yield key, value
        elif isinstance(value, Mapping):
            yield from _values(value)
        elif isinstance(value, list):
            yield from ((key, entry) for entry in value)
        else:
            yield key, value


def number_fault(key: str, value: Any) -> str | None:
    """What is wrong with a number; nothing where it is not given, or transformers checks it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "this is not a finite number"
    if isinstance(value, int | float) and abs(value) > (LARGEST if isinstance(value, int) else LARGEST_FLOAT):
        return "this is too large"
    if value is None or key not in NUMBERS:
        return None
    if isinstance(value, bool) or not isinstance(value, int if key in WHOLE else int | float):
        return "this is not a whole number" if key in WHOLE else "this is not a number"
    if value < 0 or (value == 0 and key in POSITIVE):
        return "this must be positive" if key in POSITIVE else "this must not be negative"
    if 0 < value < SMALLEST_FLOAT:
        return "this is too small"
    return "this must be at most 1" if key in SHARES and value > 1 else None


def _known(token: Any, vocab_size: int) -> Any:
    """A token id or a list of them, without those that the vocabulary lacks: by these, files say that there is none."""
    if isinstance(token, list):
        return [one for one in token if 0 <= one < vocab_size] or None
    return token if token is not None and 0 <= token < vocab_size else None
