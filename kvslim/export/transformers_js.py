"""What transformers.js reads of an artifact besides the graph: a key of its own in `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Without "dtype" the browser asks for model_quantized.onnx; without the count of weight files it fetches none.
TRANSFORMERS_JS_CONFIG: dict[str, Any] = {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}


def with_transformers_js_config(config: Mapping[str, Any]) -> str:
    """The model's own `config.json` with `transformers.js_config` for this folder, in place of any other."""
    return json.dumps({**config, "transformers.js_config": TRANSFORMERS_JS_CONFIG}, indent=2) + "\n"
