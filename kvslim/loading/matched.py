"""Stored weights and model must match: nothing missing, left over or of another shape, and all of it trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvslim.errors import ModelError
from kvslim.loading.mapped import let_go

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Masks and tables that older versions of transformers stored, and that follow from the config.
BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids)$")
SCALES = re.compile(r"scale|zero_point|zeros|absmax", re.IGNORECASE)
LAYER = re.compile(r"\.(?:layers?|h)\.(\d+)\.")
# Trained matrices of language models spread by 1e-3 to 1; codes without their scale, by more than the most.
LEAST_SPREAD, MOST_SPREAD = 1e-8, 10.0
PART = 2**20  # numbers that are looked at together
LARGEST = 1e6  # Norms and biases of released models reach a thousand.
HEAD = "lm_head.weight"
CONFIG_FIX = "use the config.json that was saved with these weights"
TRAINED_FIX = "save it again from the model that was trained, with all its parts gathered and its scales applied"


def check_shapes(stored: Mapping[str, Any], model: PreTrainedModel, where: str) -> None:
    """Refuses tensors of another shape while none is read yet, as far as they are stored under the model's names.

    Args:
        stored: Tensors by name; of those in codes the shape is not known here.
        model: The model that config.json describes, without numbers.
        where: The model's files.

    Raises:
        ModelError: Naming the first tensor that does not match.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.get_shape() for name, tensor in stored.items() if hasattr(tensor, "get_shape")}
    both = [(name, shape, wanted[name]) for name, shape in shapes.items() if name in wanted]
    _refuse_shapes([one for one in both if list(one[1]) != one[2]], model.config, where)


def check_matched(info: Mapping[str, Any], config: Any, where: str, idle: re.Pattern[str] | None = None) -> None:
    """Refuses weights that are not those of the model that config.json describes.

    Args:
        info: What transformers tells of loading.
        config: The model's transformers config.
        where: The model's files.
        idle: Names of weights that the model may leave unused, beside buffers.

    Raises:
        ModelError: Naming the first tensor that does not match.
    """
    _refuse_shapes(info["mismatched_keys"], config, where)
    kinds = [BUFFERS] if idle is None else [BUFFERS, idle]
    unused = sorted(name for name in info["unexpected_keys"] if not any(kind.search(name) for kind in kinds))
    if missing := sorted(info["missing_keys"]):
        if parts := _parts(missing, unused):
            message = f"the weights are parts of something larger, {' and '.join(map(repr, parts))}"
            raise ModelError(message, where=where, fix="save the part that is the model alone, with save_pretrained")
        message = f"{_count(missing, 'weight is missing', 'weights are missing')}, first {missing[0]!r}"
        raise ModelError(message, where=where, fix=_missing_fix(missing))
    if unused:
        raise ModelError(
            f"{_count(unused, 'tensor is stored', 'tensors are stored')} that the model of config.json does not use: "
            f"{', '.join(map(repr, unused[:3]))}",
            where=where,
            fix=_unused_fix(unused, config),
        )


def check_trained(model: PreTrainedModel, where: str) -> None:
    """Refuses weights that no training leaves: not finite, all alike, or of a scale beyond reason.

    Raises:
        ModelError: Naming the first of them.
    """
    import torch

    for name, weight in model.named_parameters():
        # In float64 a sum cannot overflow; it copies what it adds up, so part by part.
        if not all(part.sum(dtype=torch.float64).isfinite() for part in weight.detach().flatten().split(PART)):
            fix = "download the model again; if it is your own, its training diverged"
            raise ModelError(f"weights are not finite, first {name!r}", where=where, fix=fix)
        if fault := _untrained(weight.detach()):
            raise ModelError(f"nobody trained {name!r}: {fault}", where=where, fix=TRAINED_FIX)
        let_go()
    if name := next(_dead_norms(model), None):
        raise ModelError(f"nobody trained {name!r}: it makes all zeros of any input", where=where, fix=TRAINED_FIX)


def _dead_norms(model: PreTrainedModel) -> Iterator[str]:
    """Norms that pass nothing on. Their weights alone do not tell, since some families add one to them."""
    import torch

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and weight is not None and not weight.any():
            with torch.inference_mode():
                if not module(torch.arange(len(weight), dtype=weight.dtype)).any():
                    yield name


def _untrained(weight: torch.Tensor) -> str | None:
    """What shows that a weight was not trained."""
    if weight.ndim < 2 or min(weight.shape) == 1:  # a vector may well be zero, such as an unused bias
        largest = float(weight.abs().max())
        return f"an entry is {largest:.3g}" if largest > LARGEST else None
    spread = float(weight.std())
    if spread < LEAST_SPREAD:
        return "its entries are all alike" if weight.any() else "its entries are all zero"
    return (
        f"its entries spread by {spread:.3g}, as codes do without their scales" if not spread <= MOST_SPREAD else None
    )


def _refuse_shapes(different: Iterable[tuple[str, Sequence[int], Sequence[int]]], config: Any, where: str) -> None:
    """Raises for the first of the tensors, given with what is stored and what is expected."""
    if found := sorted(different):
        name, stored, expected = found[0]
        message = f"{name!r} has shape {list(stored)}, and config.json asks for {list(expected)}"
        raise ModelError(message, where=where, fix=_shape_fix(found, config))


def _shape_fix(different: Sequence[tuple[str, Sequence[int], Sequence[int]]], config: Any) -> str:
    """What helps against other shapes: a vocabulary that was resized has them in the embedding and its head alone."""
    rows = {stored[0] for _, stored, expected in different if tuple(expected[:1]) == (config.vocab_size,)}
    if len(rows) == 1 and len(different) == (1 if config.tie_word_embeddings else 2):
        return f"set vocab_size to {rows.pop()} in config.json: the vocabulary was resized after it was saved"
    return CONFIG_FIX


def _missing_fix(missing: Sequence[str]) -> str:
    if missing == [HEAD]:
        return "give the weights of the whole model; if its embeddings are its head, set tie_word_embeddings to true"
    return f"give all files of the weights, and {CONFIG_FIX}"


def _parts(missing: Sequence[str], unused: Iterable[str]) -> list[str]:
    """What stands in front of the names of all weights, where a training tool saved its own module."""
    stored = set(unused)
    fronts = sorted(name.removesuffix(missing[0]) for name in stored if name.endswith(f".{missing[0]}"))
    return [front.rstrip(".") for front in fronts if all(front + name in stored for name in missing)]


def _unused_fix(unused: Iterable[str], config: Any) -> str:
    """What helps against tensors that are left over."""
    if any(SCALES.search(name.rpartition(".")[2]) for name in unused):
        return "put the quantization_config of the weights back into config.json, or give a model that is not quantised"
    layers = [int(found[1]) for name in unused if (found := LAYER.search(name))]
    if layers and min(layers) >= config.num_hidden_layers:
        return f"{CONFIG_FIX}: this one has {config.num_hidden_layers} layers"
    return CONFIG_FIX


def _count(names: Sequence[str], one: str, more: str) -> str:
    return f"1 {one}" if len(names) == 1 else f"{len(names)} {more}"
