"""Plans with all that was fitted and trained for them, in one safetensors file.

A plan alone says what to fit; the file holds the numbers, so that the same graph can be written again on a machine
that never saw the calibration text, and a training can go on. Its metadata have the plan, the structure of the edits
around their arrays, what they were made for, and a digest of it all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvslim.caches import Cache
from kvslim.caches.base import read_cache
from kvslim.caches.clustering import Formed
from kvslim.calibrate.statistics import sha256_of
from kvslim.errors import ArtifactError, UsageError
from kvslim.replacing import replacing
from kvslim.transform.edits import (
    Affine,
    Array,
    Channels,
    Codes,
    Features,
    FittedPlan,
    KeptHeads,
    LayerEdit,
    LinearCode,
    Rounding,
)
from kvslim.types import Plan

FORMAT = 2
NAME = "edits.safetensors"
CLASSES: dict[str, type[Any]] = {
    each.__name__: each for each in (LayerEdit, KeptHeads, LinearCode, Rounding, Channels, Affine, Formed, Features)
}


def save_fitted(path: Path, fitted: FittedPlan) -> None:
    """Writes a file, whole or not at all; the same plan and numbers give the same bytes."""
    arrays: dict[str, Array] = {}
    layers = [_taken_apart(code, f"layers.{index}", arrays) for index, code in enumerate(fitted.codes)]
    told = {"plan": fitted.plan.model_dump(mode="json"), "layers": layers, "made_for": fitted.made_for}
    text = json.dumps({"format": FORMAT, **told}, sort_keys=True)
    with replacing(path) as partial:
        # One entry: safetensors writes several in an order of chance.
        save_file(arrays, partial, {"kvslim": json.dumps([text, _digest(text, arrays)])})


def load_fitted(path: Path) -> FittedPlan:
    """Reads a file that `save_fitted` wrote.

    Raises:
        ArtifactError: It is damaged, of another kind, or of a format that this version does not read.
    """
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text, digest = json.loads((file.metadata() or {})["kvslim"])
        data = json.loads(text)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _unreadable("this holds no plan with its numbers", path) from error
    if data.get("format") != FORMAT:
        raise _unreadable(f"format {data.get('format')} is not one that this KVSlim reads", path)
    if digest != _digest(text, arrays):
        raise _unreadable("the file is damaged: its digest is not that of what it holds", path)
    try:
        codes = tuple(_put_together(layer, arrays) for layer in data["layers"])
        return FittedPlan(Plan.model_validate(data["plan"]), codes, data["made_for"])
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise _unreadable("this holds no plan with its numbers", path) from error


def merged(fitted: Sequence[FittedPlan]) -> FittedPlan:
    """Trainings of one plan, on several machines or texts, as one: the mean of their weights.

    Weights that were trained from one beginning mostly average well (Wortsman et al., "Model soups: averaging weights
    of multiple fine-tuned models improves accuracy without increasing inference time", 2022, section 3).

    Raises:
        UsageError: They are for different models, did not begin with the same numbers, or have trained other weights.
    """
    first = fitted[0]
    for other in fitted[1:]:
        if fault := _apart(first, other):
            raise UsageError(
                f"{fault}, so their weights cannot be merged",
                where="--plan",
                fix="merge trainings that began with the same edits.safetensors",
            )
    codes = tuple(
        replace(layers[0], weights=_mean(layers)) for layers in zip(*(one.codes for one in fitted), strict=True)
    )
    return first._replace(codes=codes)


def _apart(one: FittedPlan, other: FittedPlan) -> str | None:
    """Why two are not trainings of one plan; None where they are."""
    if one.made_for != other.made_for:
        return "these plans are for different models, or for weights that are stored in different ways"
    if digest_of(_untrained(one)) != digest_of(_untrained(other)):
        return "these plans were fitted to different numbers"
    if _trained(one) != _trained(other):
        return "these plans have other weights trained, or one of them none"
    return None


def _untrained(fitted: FittedPlan) -> Codes:
    return tuple(replace(code, weights={}) for code in fitted.codes)


def _trained(fitted: FittedPlan) -> list[set[str]]:
    return [set(code.weights) for code in fitted.codes]


def _mean(layers: Sequence[LayerEdit]) -> dict[str, Array]:
    return {
        name: np.mean([layer.weights[name] for layer in layers], axis=0, dtype=np.float64).astype(array.dtype)
        for name, array in layers[0].weights.items()
    }


def digest_of(codes: Codes) -> str:
    """SHA-256 of edits, the same for the same numbers."""
    arrays: dict[str, Array] = {}
    layers = [_taken_apart(code, f"layers.{index}", arrays) for index, code in enumerate(codes)]
    return _digest(json.dumps(layers, sort_keys=True), arrays)


def _taken_apart(value: Any, name: str, arrays: dict[str, Array]) -> Any:
    """A value as JSON; its arrays go to `arrays`, by the name of their place."""
    if isinstance(value, np.ndarray):
        arrays[name] = np.ascontiguousarray(value)
        return {"array": name}
    if isinstance(value, Cache):
        return {"cache": value.model_dump(mode="json")}
    if is_dataclass(value):
        parts = {
            each.name: _taken_apart(getattr(value, each.name), f"{name}.{each.name}", arrays) for each in fields(value)
        }
        return {"class": type(value).__name__, "parts": {key: part for key, part in parts.items() if part is not None}}
    if isinstance(value, Mapping):
        found = {key: _taken_apart(each, f"{name}.{key}", arrays) for key, each in value.items()}
        return {"mapping": found} if found else None
    return [_number(each) for each in value] if isinstance(value, tuple) else _number(value)


def _number(value: Any) -> Any:
    """A number of numpy's as one of Python's."""
    return value.item() if isinstance(value, np.generic) else value


def _put_together(value: Any, arrays: Mapping[str, Array]) -> Any:
    """The reverse of `_taken_apart`."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "cache" in value:
        return read_cache(value["cache"])
    if "mapping" in value:
        return {key: _put_together(each, arrays) for key, each in value["mapping"].items()}
    return CLASSES[value["class"]](**{key: _put_together(each, arrays) for key, each in value["parts"].items()})


def _digest(text: str, arrays: Mapping[str, Array]) -> str:
    return sha256_of({name: arrays[name] for name in sorted(arrays)}, text)


def _unreadable(message: str, path: Path) -> ArtifactError:
    return ArtifactError(message, where=str(path), fix="give a file that KVSlim wrote, or plan again")
