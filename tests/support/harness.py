"""Whether lm-eval is there."""

from __future__ import annotations

import importlib.util
import os

import pytest

REQUIRED = os.environ.get("KVSLIM_REQUIRE_EVAL") == "1"
needs_harness = pytest.mark.skipif(
    not REQUIRED and any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate")),
    reason="needs lm-eval and accelerate",
)
