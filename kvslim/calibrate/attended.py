"""What attention does with keys and values: how much each key receives, and what sharing attention would cost."""

from __future__ import annotations

import torch
from torch import Tensor

from kvslim.calibrate.recording import SINKS
from kvslim.transform.attention import Observed

QUERY_BLOCK = 256


def attend(seen: Observed, gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention that each key receives, by key and by age, outputs, and what it costs heads to share their attention.

    All are taken from all queries but the first eighth.

    The first queries have few keys to choose from. Queries go in blocks, so that memory grows with the length alone.

    Returns:
        [batch, kv_heads, length] mean over group and queries, summing to 1; [kv_heads, buckets] the same by age, sinks
        left out, summed over the batch; the outputs, float64 [batch, kv_heads, group, queries, head_dim]; and the
        sharing loss [q_heads, q_heads], mean over queries, summed over the batch.
    """
    key, value, length = seen.key, seen.value, seen.key.shape[2]
    grouped = seen.query.unflatten(1, (key.shape[1], -1))
    received, outputs = torch.zeros(key.shape[:3], dtype=torch.float64), []
    by_age = torch.zeros(key.shape[1], length.bit_length(), dtype=torch.float64)
    power = value_power(value, gram)
    sharing = torch.zeros(power.shape[1], power.shape[1], dtype=torch.float64)
    for start in range(length // 8, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        weights = seen.scoring.weights(grouped[..., start:stop, :], key[:, :, None, :stop], start)
        mean = weights.mean(2)
        received[:, :, :stop] += mean.sum(2)
        by_age += _by_age(mean.sum(0)[:, :, SINKS:], start - SINKS, by_age.shape[1])
        outputs.append(torch.einsum("bhgst,bhtd->bhgsd", weights, value[:, :, :stop]).double())
        sharing += sharing_loss(weights.flatten(1, 2), power[..., :stop]).sum(0)
    queries = length - length // 8
    return received / queries, by_age / queries, torch.cat(outputs, dim=3), sharing / queries


def value_power(value: Tensor, gram: Tensor) -> Tensor:
    """Squared norms of what values add to the hidden states beyond their mean: [batch, q_heads, keys].

    Args:
        value: [batch, kv_heads, keys, head_dim].
        gram: [kv_heads, group, head_dim, head_dim] of each query head's W_O^T W_O.
    """
    centred = value - value.mean(2, keepdim=True)
    return torch.einsum("bhtd,hgde,bhte->bhgt", centred, gram, centred).flatten(1, 2)


def sharing_loss(weights: Tensor, power: Tensor) -> Tensor:
    """Sum over queries of the squared error that a head's output gets by the weights of another.

    Args:
        weights: [batch, heads, queries, keys] attention weights.
        power: [batch, heads, keys] squared norms of each head's values.

    Returns:
        float64 [batch, heads, heads]; entry i, j is what head i loses by the weights of head j.
    """
    weights, power = weights.double(), power.double()  # heads that attend alike differ by little
    products = (weights * power[:, :, None]).flatten(2) @ weights.flatten(2).transpose(1, 2)
    squares = power @ weights.square().sum(2).transpose(1, 2)
    own = products.diagonal(dim1=1, dim2=2)
    loss = (own[:, :, None] + squares - 2 * products).clamp(min=0)
    return loss * (1 - torch.eye(loss.shape[1], dtype=loss.dtype))


def _by_age(weights: Tensor, lead: int, buckets: int) -> Tensor:
    """Sums of weights [heads, queries, keys] over ages 0, 1..2, 3..6 and so on: [heads, buckets].

    Args:
        weights: Causal attention.
        lead: Age of the first key at the first query.
        buckets: Number of them.
    """
    heads, queries, keys = weights.shape
    # Each row a place further right than the one above it: columns are then ages, and one sum serves a diagonal.
    skewed = torch.nn.functional.pad(weights.flip(-1), (0, queries)).flatten(1)[:, : queries * (keys + queries - 1)]
    sums = skewed.unflatten(1, (queries, keys + queries - 1)).sum(1).double()
    age = (torch.arange(keys + queries - 1) + lead - keys + 1).clamp(min=0)
    bucket = (age + 1).float().log2().floor().long()
    return torch.zeros(heads, buckets, dtype=torch.float64).index_add_(1, bucket, sums)
