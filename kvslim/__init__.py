"""KVSlim: smaller KV caches for ONNX language models, measured."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvslim.api import analyze, bench, compress, load, plan, validate

__version__ = "0.1.0"
__all__ = ["analyze", "bench", "compress", "load", "plan", "validate"]

# Since 1.29, onnxruntime's wheels send usage data to their maker. They look for this once, when they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """The functions of `kvslim.api`, imported on first use so that `import kvslim` stays instant."""
    if name not in __all__:
        raise AttributeError(f"module 'kvslim' has no attribute {name!r}")
    from kvslim import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
