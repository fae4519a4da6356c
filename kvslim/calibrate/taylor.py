"""First-order Taylor score of heads: what the loss on a text would change if a head's output were scaled down.

The score of head h is the mean over windows of |sum over tokens of o_h . dL/do_h|, L being the mean loss of next tokens
(Michel et al., "Are Sixteen Heads Really Better than One?", 2019, section 4.1, equation 2; Molchanov et al.,
"Importance Estimation for Neural Network Pruning", 2019, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvslim.contract import ModelSpec
from kvslim.loading.architecture import Architecture
from kvslim.progress import Progress
from kvslim.transform.device import where
from kvslim.transform.hooks import attached
from kvslim.transform.surgery import attention_modules, slim_modules

Array = np.ndarray


def taylor_scores(
    model: Any,
    architecture: Architecture,
    spec: ModelSpec,
    windows: Array,
    loss_mask: Array,
    progress: Progress,
) -> Array:
    """Scores of all query heads; one window at a time, so that memory follows its length.

    Args:
        model: The prepared model, without codes.
        architecture: Where its parts live.
        spec: Its shape.
        windows: [n, length] token ids.
        loss_mask: [n, length] bool, the tokens whose prediction counts; a window without any is passed over.
        progress: Receives the progress.

    Returns:
        [layers, q_heads], nats per token.
    """
    scores = np.zeros((spec.layers, spec.q_heads))
    used = 0
    with where(model), torch.enable_grad(), _gated(model, architecture, spec) as gates:
        for window, counts in progress.track(list(zip(windows, loss_mask, strict=True)), "windows, with gradients"):
            if not counts[1:].any():
                continue
            tokens = torch.from_numpy(window).to(model.device)
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            following = torch.from_numpy(counts[1:]).to(model.device)
            loss = torch.nn.functional.cross_entropy(logits[following].float(), tokens[1:][following])
            gradients = torch.autograd.grad(loss, gates)
            scores += torch.stack(gradients).abs().double().cpu().numpy()
            used += 1
    return scores / max(used, 1)


@contextmanager
def _gated(model: Any, architecture: Architecture, spec: ModelSpec) -> Iterator[list[Tensor]]:
    """Within the block each head's output is multiplied by a gate of 1, whose gradient is the sum of o . dL/do."""
    gates = [torch.ones(spec.q_heads, requires_grad=True) for _ in range(spec.layers)]

    def multiplied(gate: Tensor) -> Any:
        return lambda _, inputs: ((inputs[0].unflatten(-1, (spec.q_heads, -1)) * gate[:, None]).flatten(-2),)

    outputs = [attention.get_submodule(architecture.output) for attention in attention_modules(model, architecture)]
    hooks = (output.register_forward_pre_hook(multiplied(gate)) for output, gate in zip(outputs, gates, strict=True))
    try:
        with attached(hooks):
            yield gates
    finally:
        for slim in slim_modules(model, architecture):
            slim.hidden = None  # it holds on to the last window's graph
