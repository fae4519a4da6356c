"""What a training has reached, on disk: one that is killed goes on from there, and ends with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvslim.replacing import replacing
from kvslim.types import Watched

FILE = "state.safetensors"
OPTIMIZER = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of a weight
BEST = ("best",)
KINDS = (*BEST, "weight", *OPTIMIZER)


class Reached(BaseModel):
    """How far a training is.

    Attributes:
        step: Steps taken.
        steps: Steps in all; None while a budget of time is not counted in steps yet.
        seconds: Time that they took, evaluations included.
        is_over: Whether it is finished, and the best weights alone are kept.
        watched: Looks at the held-out text.
    """

    step: int = 0
    steps: int | None = None
    seconds: float = 0.0
    is_over: bool = False
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
        """Writes it, whole or not at all; of one that is over, the best weights alone.

        A disk that is full is no reason to lose what took minutes.

        Args:
            folder: Where; it is made.
        """
        if not self.reached.is_over and len(self.optimizer.state) < len(self.weights):
            return  # no step has had any text that counts
        with suppress(OSError, SafetensorError):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / FILE) as partial:
                save_file(self._tensors(), partial, {"reached": self.reached.model_dump_json()})

    def load(self, folder: Path) -> bool:
        """Goes on from what was written; False where there is nothing that can be read."""
        try:
            with safe_open(folder / FILE, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                reached = Reached.model_validate_json(file.metadata()["reached"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        kinds = BEST if reached.is_over else KINDS
        if tensors.keys() != {f"{kind}.{number}" for kind in kinds for number in range(len(self.weights))}:
            return False
        self.reached = reached
        with torch.no_grad():
            for number, (weight, best) in enumerate(zip(self.weights, self.best, strict=True)):
                best.copy_(tensors[f"best.{number}"])
                if not reached.is_over:
                    weight.copy_(tensors[f"weight.{number}"])
                    self.optimizer.state[weight] = {kind: tensors[f"{kind}.{number}"] for kind in OPTIMIZER}
        return True

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Sequence[Tensor]] = {"best": self.best}
        if not self.reached.is_over:
            found["weight"] = [weight.detach() for weight in self.weights]
            found |= {kind: [self.optimizer.state[weight][kind] for weight in self.weights] for kind in OPTIMIZER}
        return {
            f"{kind}.{number}": each.contiguous() for kind, some in found.items() for number, each in enumerate(some)
        }
