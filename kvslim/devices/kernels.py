"""How long attention takes over integers, next to float32, as measured.

The roofline alone would make an int8 cache four times as fast as float32, since it has a quarter of the bytes. The
operator first turns integers into numbers, so it gains less in decoding, and nothing for a prompt. Each ratio is the
least of those that a benchmark measured on x86, so that a bound stays a bound:

- decode: `attention-kernel` (docs/kv_quant.md). Packed codes: `cache-memory` (docs/packed.md), from whole tokens, whose
  ratio is below that of their attention; at 2 bits alone.
- prefill: `prompt-attention` (docs/artifact.md), the branch for prompts at 512 new tokens. Packed codes were not
  measured, and count as float32.
"""

from __future__ import annotations

from typing import Literal

from kvslim.contract import CacheType

Step = Literal["prefill", "decode"]

DECODE: dict[CacheType, float] = {"float32": 1, "int8": 0.59, "int4": 0.67, "codes3": 2.2, "codes2": 2.2, "codes1": 2.2}
PREFILL: dict[CacheType, float] = {"float32": 1, "int8": 1.04, "int4": 1.04}


def kernel_ratio(step: Step, stored: CacheType) -> float:
    """The time of attention to stored numbers over that to as many in float32.

    Args:
        step: Reading a prompt, or one token after it.
        stored: How the numbers are stored.
    """
    return DECODE[stored] if step == "decode" else PREFILL.get(stored, 1)
