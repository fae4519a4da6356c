"""KVSlim: smaller KV caches for ONNX language models, measured."""

from __future__ import annotations

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
