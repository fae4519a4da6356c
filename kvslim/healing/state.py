"""What a training has reached, on disk: one that is killed goes on from there, and ends with the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvslim.types import Watched

FILE = "state.safetensors"
KINDS = ("weight", "best", "exp_avg", "exp_avg_sq", "step")


class Reached(BaseModel):
    """How far a training is.

    Attributes:
        step: Steps taken.
        steps: Steps in all; None while a budget of time is not counted in steps yet.
        seconds: Time that they took, evaluations included.
        watched: Looks at the held-out text.
    """

    step: int = 0
    steps: int | None = None
    seconds: float = 0.0
    watched: list[Watched] = []

    @property
    def least(self) -> float:
        """The least KL so far."""
        return min(look.kl for look in self.watched)


@dataclass
class State:
    """A training in memory.

    Attributes:
        weights: What is trained.
        best: What it was when the KL was least.
        optimizer: AdamW over the weights.
        reached: How far it is.
    """

    weights: list[Tensor]
    best: list[Tensor]
    optimizer: torch.optim.AdamW
    reached: Reached

    def save(self, folder: Path) -> None:
        """Writes it, whole or not at all.

        Args:
            folder: Where; it is made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FILE}.partial"
        save_file(_numbered(self._tensors()), partial, {"reached": self.reached.model_dump_json()})
        partial.replace(folder / FILE)

    def load(self, folder: Path) -> bool:
        """Goes on from what was written; False where there is nothing that can be read."""
        try:
            with safe_open(folder / FILE, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                reached = Reached.model_validate_json(file.metadata()["reached"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        if tensors.keys() != _names(len(self.weights)):
            return False
        self.reached = reached
        with torch.no_grad():
            for number, (weight, best) in enumerate(zip(self.weights, self.best, strict=True)):
                weight.copy_(tensors[f"weight.{number}"])
                best.copy_(tensors[f"best.{number}"])
                self.optimizer.state[weight] = {kind: tensors[f"{kind}.{number}"] for kind in KINDS[2:]}
        return True

    def _tensors(self) -> Mapping[str, Sequence[Tensor]]:
        optimized = {kind: [self.optimizer.state[weight][kind] for weight in self.weights] for kind in KINDS[2:]}
        return {"weight": [weight.detach() for weight in self.weights], "best": self.best, **optimized}


def _numbered(tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    return {f"{kind}.{number}": each.contiguous() for kind, some in tensors.items() for number, each in enumerate(some)}


def _names(count: int) -> set[str]:
    return {f"{kind}.{number}" for kind in KINDS for number in range(count)}
