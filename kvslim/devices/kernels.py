"""How long attention takes over integers, next to float32, as measured.

The roofline alone would make an int8 cache four times as fast as float32, since it has a quarter of the bytes. The
operator first turns integers into numbers, so it gains less in decoding, and nothing for a prompt. Each ratio is the
least of those that a benchmark measured on x86, so that a bound stays a bound:

- decode: `attention-kernel` (docs/kv_quant.md). Packed codes: `cache-memory` (docs/packed.md), from whole tokens, whose
  ratio is below that of their attention; at 2 bits alone.
- prefill: `prompt-attention` (docs/artifact.md), the branch for prompts at 512 new tokens. Layers with a sliding window
  of the model have no such branch. Packed codes were not measured, and count as float32.
"""

from __future__ import annotations

from typing import Literal

from kvslim.contract import CacheType, KVTensor

Step = Literal["prefill", "decode"]

DECODE: dict[CacheType, float] = {"float32": 1, "int8": 0.59, "int4": 0.67, "codes3": 2.2, "codes2": 2.2, "codes1": 2.2}
PREFILL: dict[CacheType, float] = {"float32": 1, "int8": 1.08, "int4": 1.13}
PREFILL_WINDOW: dict[CacheType, float] = {"float32": 1, "int8": 3.4, "int4": 4.9}


def kernel_ratio(step: Step, stored: CacheType, tensor: KVTensor) -> float:
    """The time of attention to a tensor's numbers over that to as many in float32.

    Args:
        step: Reading a prompt, or one token after it.
        stored: How the numbers are stored.
        tensor: The tensor; a window without sinks is the model's own.
    """
    if step == "decode":
        return DECODE[stored]
    is_windowed = tensor.window is not None and tensor.sinks is None
    return (PREFILL_WINDOW if is_windowed else PREFILL).get(stored, 1)
