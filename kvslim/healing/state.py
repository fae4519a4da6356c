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
MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER = (*MOMENTS, "step")  # what AdamW keeps of each
BEST = ("best",)
KINDS = (*BEST, "change", *OPTIMIZER)


class Reached(BaseModel):
    """How far a training is.

    Attributes:
        step: Steps taken.
        steps: Steps in all; None while a budget of time is not counted in steps yet.
        cuts: How often it went back to the best weights, with a smaller rate.
        seconds: Time that they took, evaluations included.
        is_over: Whether it is finished, and the best changes alone are kept.
        watched: Looks at the held-out text.
    """

    step: int = 0
    steps: int | None = None
    cuts: int = 0
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
        changes: What is trained.
        best: What it was when the KL was least.
        optimizer: AdamW over the changes.
        reached: How far it is.
    """

    changes: list[Tensor]
    best: list[Tensor]
    optimizer: torch.optim.AdamW
    reached: Reached

    def keep(self) -> None:
        """Keeps the changes as the best."""
        for best, change in zip(self.best, self.changes, strict=True):
            best.copy_(change.detach())

    def go_back(self) -> None:
        """Takes up the best changes again, with nothing that the optimizer remembers of the way from there."""
        self.reached.cuts += 1
        with torch.no_grad():
            for best, change in zip(self.best, self.changes, strict=True):
                change.copy_(best)
        for kept in self.optimizer.state.values():
            for tensor in kept.values():
                tensor.zero_()

    def save(self, folder: Path) -> None:
        """Writes it, whole or not at all; of one that is over, the best changes alone.

        A disk that is full is no reason to lose what took minutes.

        Args:
            folder: Where; it is made.
        """
        if not self.reached.is_over and len(self.optimizer.state) < len(self.changes):
            return  # no step has had any text that counts
        with suppress(OSError, SafetensorError):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / FILE) as partial:
                save_file(self._tensors(), partial, {"reached": self.reached.model_dump_json()})

    def load(self, folder: Path) -> bool:
        """Goes on from what was written; False where there is nothing that can be read."""
        with suppress(OSError):
            for left in folder.glob(f"{FILE}.*"):
                left.unlink()  # of a training that was killed while it wrote
        try:
            with safe_open(folder / FILE, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                reached = Reached.model_validate_json(file.metadata()["reached"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        kinds = BEST if reached.is_over else KINDS
        if tensors.keys() != {f"{kind}.{number}" for kind in kinds for number in range(len(self.changes))}:
            return False
        self.reached = reached
        with torch.no_grad():
            for number, (change, best) in enumerate(zip(self.changes, self.best, strict=True)):
                best.copy_(tensors[f"best.{number}"])
                if not reached.is_over:
                    change.copy_(tensors[f"change.{number}"])
                    moments = {kind: tensors[f"{kind}.{number}"].to(change.device) for kind in MOMENTS}
                    self.optimizer.state[change] = {"step": tensors[f"step.{number}"], **moments}
        return True

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Sequence[Tensor]] = {"best": self.best}
        if not self.reached.is_over:
            found["change"] = [change.detach() for change in self.changes]
            found |= {kind: [self.optimizer.state[change][kind] for change in self.changes] for kind in OPTIMIZER}
        return {
            f"{kind}.{number}": each.cpu().contiguous()
            for kind, some in found.items()
            for number, each in enumerate(some)
        }
