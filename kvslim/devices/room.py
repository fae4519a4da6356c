"""What a device leaves for a cache: its memory beside the weights, and the time of a token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from kvslim.contract import MIB, ModelSpec, WeightType
from kvslim.devices.demand import BLOCK, LEAST_BYTES, LEAST_PACKED, Cache, StoredWeights, decode
from kvslim.devices.limits import Limits, bound, limits
from kvslim.devices.peak import BRANCH_BYTES, FLOAT, beside_cache, open_bytes
from kvslim.devices.profile import Device
from kvslim.digits import three_digits
from kvslim.errors import GateError, UnsupportedError
from kvslim.loading.parameters import Parameters
from kvslim.loading.snapshot import Snapshot
from kvslim.recipe import Recipe
from kvslim.settings import Budget
from kvslim.types import KVLayout, Plan
from kvslim.weight_format import WeightFormat

INT8_RATIO = 4  # times smaller than the plain cache: what nearly every model takes without a loss


@dataclass(frozen=True)
class Room:
    """What a device has room for.

    Attributes:
        device: The device.
        spec: The model's shape.
        weights: Its weights as they are to be stored.
        plain: Its cache in float32.
        context: Tokens that the cache holds.
        cache_bytes: Bytes that it may take.
        time_ratio: Time per token over that of the plain cache; None for no limit.
        shares: Whether weights may take fewer or more bits, so that they share the memory with the cache.
        is_tight: Whether they must take fewer than they would.
    """

    device: Device
    spec: ModelSpec
    weights: StoredWeights
    plain: Cache
    context: int
    cache_bytes: int
    time_ratio: float | None = None
    shares: bool = False
    is_tight: bool = False

    @property
    def cache_mib(self) -> float:
        """MiB that the cache may take."""
        return self.cache_bytes / MIB

    def budget(self, asked: Budget | None) -> Budget | None:
        """The budget of a planner: what was asked, the time, and the memory where a cache in int8 would take more.

        Args:
            asked: Limits of time and quality; None for none.
        """
        limits = {} if asked is None else asked.model_dump(exclude_none=True)
        if self.time_ratio is not None:
            limits["time_ratio"] = min(self.time_ratio, limits.get("time_ratio", 1.0))
        if self.is_tight or self.cache_bytes * INT8_RATIO < self.plain.bytes_at(self.context):
            opened = open_bytes(self.spec.layers) + BRANCH_BYTES * self.spec.layers  # as a budget of memory counts it
            decoding = opened + self.weights.decoding + self.cache_bytes
            size = {"memory_mib": decoding / MIB} if self.shares else {"kv_mib": self.cache_mib}
            limits |= {**size, "context": self.context}
        return Budget.model_validate(limits) if limits else None

    def reached(self, plan: Plan) -> tuple[Limits, ...]:
        """What the device allows with the plain cache, and with that of a plan."""
        caches = self.plain, Cache.of("planned", self.spec, plan)
        return tuple(limits(self.device, self.weights, caches, self.spec.max_context, (self.context,)))


def room_on(device: Device, model: str, recipe: Recipe, tokens_per_second: float | None = None) -> Room:
    """The room that a device has for the cache of a model at the recipe's target context. No weights are read.

    Args:
        device: The device.
        model: As for `kvslim compress`.
        recipe: Says how the weights are stored, and the target context.
        tokens_per_second: What decoding there is to reach; None for no limit.

    Raises:
        KvslimError: The model cannot be read, or has no cache.
        GateError: The weights leave no room for a cache, or no time to read one.
    """
    from kvslim.loading.parameters import count_parameters
    from kvslim.loading.source import read_spec, resolve

    snapshot = resolve(model, weights=False)
    spec = recipe.fitted(read_spec(snapshot, recipe.calibration.context))
    if spec.is_encoder:
        raise UnsupportedError(
            f"{spec.model_type} is an encoder: it has no KV cache to fit into a device",
            where="--device",
            fix="time it with `kvslim bench`",
        )
    parameters, context = count_parameters(snapshot, spec), recipe.calibration.target(spec)
    weights = with_rope(planned_weights(snapshot, parameters, recipe.weights, is_encoder=False), spec)
    plain = Cache.of("plain", spec, Plan.identity(spec, recipe.layout, recipe.window_cache))
    shares = recipe.weights.type == "auto" and recipe.weights.is_open
    left = _left(device, weights, plain, context)
    if is_tight := shares and left <= 0:
        weights = with_rope(StoredWeights.in_bytes(parameters, "int4", LEAST_BYTES, LEAST_PACKED), spec)
        left = _left(device, weights, plain, context)
    if left <= 0:
        raise _too_large(device, parameters, weights, plain, context)
    ratio = None if tokens_per_second is None else _time_ratio(device, weights, plain, context, tokens_per_second)
    return Room(device, spec, weights, plain, context, left, ratio, shares=shares, is_tight=is_tight)


def _left(device: Device, weights: StoredWeights, plain: Cache, context: int) -> int:
    """Bytes that a cache may take: one of integers, which needs more beside it, unless the plain one fits."""
    free = device.usable_bytes - beside_cache(weights, plain, context)
    if free >= plain.bytes_at(context):
        return free
    return device.usable_bytes - beside_cache(weights, replace(plain, bits=8), context)


def planned_weights(
    snapshot: Snapshot, parameters: Parameters, weights: WeightFormat, *, is_encoder: bool
) -> StoredWeights:
    """A model's weights as a format would store them."""
    settled = weights.settled(is_encoder=is_encoder, has_blocks=snapshot.has_blocks)
    if settled.type == "stored" and snapshot.has_blocks:
        number = snapshot.bytes_per_number
        return StoredWeights.in_bytes(parameters, settled.type, number, number + FLOAT / BLOCK)
    return StoredWeights.of(parameters, settled.like)


def with_rope(weights: StoredWeights, spec: ModelSpec) -> StoredWeights:
    """The weights of a graph, which holds RoPE's sines and cosines too."""
    return replace(weights, stored=weights.stored + spec.rope_bytes, resident=weights.resident + spec.rope_bytes)


def _time_ratio(
    device: Device, weights: StoredWeights, plain: Cache, context: int, tokens_per_second: float
) -> float | None:
    """The time per token, over that of the plain cache, at which a device is so fast; None where plain is."""
    none = Cache("none", KVLayout(tensors=()), plain.q_heads)
    most, reached = (bound(device, decode(weights, cache, context)).tokens_per_second for cache in (none, plain))
    if tokens_per_second >= most:
        raise GateError(
            f"{device.name} decodes fewer than {tokens_per_second:,g} tokens per second beside "
            f"{_words(weights)}, with any cache",
            where="--tokens-per-second",
            fix=f"ask for less than {three_digits(most)}, or for smaller --weights",
        )
    return reached / tokens_per_second if reached < tokens_per_second else None


def _too_large(device: Device, parameters: Parameters, weights: StoredWeights, plain: Cache, context: int) -> GateError:
    most = weights.stored + _left(device, weights, plain, context)
    kinds: tuple[WeightType, ...] = get_args(WeightType)
    fitting = [kind for kind in kinds if _left(device, StoredWeights.of(parameters, kind), plain, context) > 0]
    mended = f"store them smaller, with --weights {fitting[0]}" if fitting else "take a smaller model"
    return GateError(
        f"{_words(weights)} take {weights.stored / MIB:,.0f} MiB, and {device.name} leaves "
        f"{most / MIB:,.0f} MiB for weights and cache",
        where="--device",
        fix=mended,
    )


def _words(weights: StoredWeights) -> str:
    return "the blocks of the file" if weights.name == "stored" else f"weights in {weights.name}"
