"""What a command line asks for: a recipe, with the room of a device in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kvslim.errors import UsageError
from kvslim.recipe import Recipe
from kvslim.settings import Budget, Gates

if TYPE_CHECKING:
    from kvslim.devices.limits import Limits
    from kvslim.devices.room import Room
    from kvslim.types import Plan


class Asked(NamedTuple):
    """A recipe, and what the device that it is for has room for; None without a device."""

    recipe: Recipe
    room: Room | None

    def reached(self, plan: Plan) -> tuple[Limits, ...]:
        """What the device allows with the plain cache and with that of a plan; nothing without a device."""
        return () if self.room is None else self.room.reached(plan)


def asked_for(
    model: str,
    read: Callable[[Budget | None], Recipe],
    budget: Budget | None,
    device: str | None,
    tokens_per_second: float | None,
) -> Asked:
    """The recipe that the options describe; what a device has room for is a budget and a gate in it.

    Args:
        model: As for `kvslim compress`.
        read: Gives the recipe within a budget.
        budget: The limits that were asked for.
        device: A profile, of which memory and speed are limits of the cache; None for none.
        tokens_per_second: What decoding there is to reach; None for no limit.

    Raises:
        KvslimError: As `read_recipe`, `load_device` and `room_on`.
    """
    if device is None:
        if tokens_per_second is not None:
            raise UsageError("there is no device", where="--tokens-per-second", fix="add --device NAME")
        return Asked(read(budget), None)
    if budget is not None and (budget.kv_ratio or budget.kv_mib or budget.memory_mib):
        fix = "give --device, or one of --kv-ratio, --kv-mib-at and --memory-mib"
        raise UsageError("a device and a size both limit the bytes", where="--device", fix=fix)
    from kvslim.devices.profile import load_device
    from kvslim.devices.room import room_on

    room = room_on(load_device(device), model, read(budget), tokens_per_second)
    recipe = read(room.budget(budget))
    own = None if recipe.splits_memory else recipe.gates.max_kv_mib or room.cache_mib
    return Asked(recipe.gated(Gates(max_kv_mib=own)), room)
