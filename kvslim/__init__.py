"""KVSlim: smaller KV caches for ONNX language models, measured."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvslim.api import analyze, bench, compress, load, plan, validate

__version__ = "0.1.0"
__all__ = ["analyze", "bench", "compress", "load", "plan", "validate"]


def __getattr__(name: str) -> Any:
    """The functions of `kvslim.api`, imported on first use so that `import kvslim` stays instant."""
    if name not in __all__:
        raise AttributeError(f"module 'kvslim' has no attribute {name!r}")
    from kvslim import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, where the functions win over the subpackages `plan`, `validate` and `load`.

    Importing a subpackage sets it as an attribute of its parent. Without this class `kvslim.plan` would be the function
    or the subpackage, depending on what was imported before. `from kvslim.plan.x import y` works either way.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
