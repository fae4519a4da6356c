"""A device that is not the CPU, made of the CPU: it stands for a GPU where there is none.

Its tensors hold their numbers in a tensor of the CPU. An operation that meets numbers of both fails as it would on a
GPU, and so does whoever reads the numbers without bringing them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Module:
    """What torch asks of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float32]

    def manual_seed_all(self, seed: int) -> None:
        """It draws no numbers of its own."""

    def get_rng_state(self, device: int) -> None:
        """It has none."""

    def set_rng_state(self, state: None, device: int) -> None:
        """It has none."""


_setup_privateuseone_for_python_backend("far", _Module())
FAR = torch.device("far", 0)
COPIES = {"aten::_to_copy", "aten::copy_"}  # from one device to another
INDEXING = "aten::index", "aten::_index_put", "aten::_unsafe_index"  # takes places from anywhere


class FarTensor(torch.Tensor):
    """A tensor of the device.

    Attributes:
        near: Its numbers.
    """

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> FarTensor:
        made: FarTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
            requires_grad=near.requires_grad,
        )
        made.near = near
        return made

    def __repr__(self, **_: Any) -> str:
        return f"far {self.near}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def far_device() -> Iterator[None]:
    """Within the block the device is there."""
    with _Constructors(), _Operations():
        yield


class _Constructors(TorchFunctionMode):
    """What torch makes of lists before any operation is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.tensor or torch.device(kwargs.get("device") or "cpu").type != FAR.type:
            return func(*args, **kwargs)
        return _far(torch.tensor(*args, **kwargs | {"device": "cpu"}))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, device = func.name().partition(".")[0], kwargs.get("device")
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    is_far = [isinstance(each, FarTensor) for each in tensors]
    if name not in COPIES and not name.startswith(INDEXING):
        apart = {far for each, far in zip(tensors, is_far, strict=True) if each.dim()}
        assert len(apart) < 2, f"{name} meets numbers of two devices"
    near_args, near_kwargs = tree_map(_near, (args, kwargs))
    found = func(*near_args, **near_kwargs | ({} if device is None else {"device": torch.device("cpu")}))
    first = func._schema.arguments[0].alias_info if func._schema.arguments else None
    if first is not None and first.is_write:
        return args[0] if func._schema.returns else None
    goes_far = any(is_far) if device is None else torch.device(device).type == FAR.type
    return tree_map(_far, found) if goes_far else found


def _near(value: Any) -> Any:
    return value.near if isinstance(value, FarTensor) else value


def _far(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with torch.inference_mode(mode=False):  # views of tensors from elsewhere could not be made inside
        return FarTensor(value)
