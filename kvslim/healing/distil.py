"""Healing: the model with its codes learns to say what the model without them says.

The loss is KL(teacher || student) of the next token, at every other position of a text (Hinton et al., "Distilling the
Knowledge in a Neural Network", 2015, section 2, at temperature 1). The cache is in place as the graph will have it:
ranks, windows, removed parts, shared caches, and rounding that gradients pass through. AdamW (Loshchilov and Hutter,
"Decoupled Weight Decay Regularization", 2019) trains the projections of attention, and of MLPs where parts are gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvslim.healing.changes import Changes
from kvslim.healing.held_out import HeldOut
from kvslim.healing.recompute import left_bytes, recompute
from kvslim.healing.schedule import TIMED, batch_of, is_evaluated, rate_of, steps_within
from kvslim.healing.state import Reached, State
from kvslim.healing.student import Student
from kvslim.healing.text import Texts
from kvslim.loading.architecture import Architecture
from kvslim.progress import Progress
from kvslim.settings import Heal
from kvslim.transform.copies import sharing_copy
from kvslim.transform.device import free_bytes, where
from kvslim.transform.edits import Codes
from kvslim.transform.kl_evaluator import logits_at, predicting
from kvslim.types import Healing, Watched

TOKENS = 1024  # of a step
BETAS = 0.9, 0.99  # for trainings of tens or hundreds of steps
MOST_GRADIENT = 1.0  # norm
PATIENCE = 4  # evaluations without a better one
WORSE = 1.1  # times the least KL is more than chance: on 2,048 tokens of SmolLM2 it moves by some 5 %
CUT = 1 / 3  # of the rate, after so bad a one
LEFT = 0.5  # of the memory, at most, for what a step leaves in the layers


def healed(
    model: Any,
    architecture: Architecture,
    codes: Codes,
    texts: Texts,
    settings: Heal,
    seed: int,
    folder: Path,
    progress: Progress,
) -> tuple[Codes, Healing]:
    """Codes with trained weights, or as they were where these are no better on text that the training never saw.

    Args:
        model: The prepared model, without codes; it stays as it is.
        architecture: Where its parts live.
        codes: One entry per layer.
        texts: Three parts of one text.
        settings: How long, and how fast.
        seed: Of the order of the text.
        folder: Receives what the training has reached; one that was killed goes on from there.
        progress: Receives the progress.
    """
    start = time.monotonic()
    teacher = sharing_copy(model, architecture, model.device)
    student = Student(teacher, architecture, codes)

    def judged() -> float:
        return HeldOut(teacher, *texts.judged).kl(student.model)  # too large to keep while weights are trained

    middle = time.monotonic()
    without = judged()
    judging = time.monotonic() - middle
    training = _Training(teacher, student, texts, settings, seed, folder)
    training.run(progress, time.monotonic() - start + judging)
    best, after, reached = training.best(), judged(), training.state.reached
    found = Healing(
        steps=reached.step,
        tokens=reached.step * training.size * texts.trained.windows.shape[1],
        seconds=reached.seconds,
        kl_before=without,
        kl_after=after,
        kept=after < without,
        watched=tuple(reached.watched),
    )
    return (best if found.kept else codes), found


class _Training:
    """A student, what it learns from, and how far it is.

    Args:
        teacher: The model without codes.
        student: The one with them.
        texts: To train on and to watch.
        settings: How long, and how fast.
        seed: Of the order of the text.
        folder: Where what is reached is kept.
    """

    def __init__(self, teacher: Any, student: Student, texts: Texts, settings: Heal, seed: int, folder: Path) -> None:
        self.teacher, self.student, self.settings, self.seed, self.folder = teacher, student, settings, seed, folder
        self.windows = torch.from_numpy(texts.trained.windows).to(teacher.device)
        self.counted = torch.from_numpy(predicting(*texts.trained)).to(teacher.device)
        self.watched = HeldOut(teacher, *texts.watched)
        self.size = max(1, min(TOKENS // self.windows.shape[1], len(self.windows)))
        with where(teacher):
            left = left_bytes(student.model, student.layers, self.windows[: self.size])
        if left > LEFT * free_bytes(teacher.device):
            recompute(student.layers)
        self.changes = Changes(student.weights)
        optimizer = torch.optim.AdamW(self.changes.values, lr=settings.rate, betas=BETAS)
        best = [torch.zeros_like(change) for change in self.changes.values]
        self.state = State(self.changes.values, best, optimizer, Reached(steps=settings.steps))
        if self.state.load(folder):
            self.changes.apply()
        else:
            self._watch()

    def run(self, progress: Progress, aside: float) -> None:
        """Takes all steps, or those up to the last of some evaluations that were no better.

        Args:
            progress: Receives the progress.
            aside: Seconds of a budget of time that go to what is done before and after.
        """
        reached, timed = self.state.reached, list[float]()
        progress.tell(self._told)
        while not self._is_over:
            for step in progress.track(self._steps(reached.steps), "steps", reached.steps):
                start = time.monotonic()
                self._step(step)
                reached.step += 1
                timed.append(time.monotonic() - start)
                reached.seconds += timed[-1]
                if reached.steps is None and len(timed) > TIMED:
                    evaluation = reached.watched[0].seconds
                    left = 60 * (self.settings.minutes or 0.0) - aside
                    reached.steps = steps_within(left, timed, evaluation)
                if reached.steps is not None and is_evaluated(reached.step, reached.steps):
                    self._watch()
                    self.state.save(self.folder)
                    progress.tell(self._told)

    def best(self) -> Codes:
        """The codes of the least KL, which the student has from now on; the training is over."""
        if not self.state.reached.is_over:
            self.state.reached.is_over = True
            self.state.save(self.folder)
        self.changes.apply(self.state.best)
        return self.student.trained()

    def _steps(self, known: int | None) -> Iterator[int]:
        """The steps to take, as long as no more is known of how many there are."""
        while self.state.reached.steps == known and not self._is_over:
            yield self.state.reached.step

    @property
    def _is_over(self) -> bool:
        reached = self.state.reached
        kls = [look.kl for look in reached.watched]
        no_better = len(kls) > PATIENCE and min(kls[-PATIENCE:]) > min(kls)
        return reached.is_over or no_better or reached.step == reached.steps

    @property
    def _told(self) -> str:
        watched = self.state.reached.watched
        return f"KL {watched[0].kl:.3g} -> {watched[-1].kl:.3g}"

    def _step(self, step: int) -> None:
        optimizer = self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate * CUT**self.state.reached.cuts * rate_of(step, self.state.reached.steps)
        rows = torch.from_numpy(batch_of(step, len(self.windows), self.size, self.seed))
        places = torch.arange(step % 2, self.windows.shape[1], 2)
        counted = self.counted[rows][:, places]
        if not counted.any():
            return  # prompts alone
        with where(self.teacher), torch.enable_grad():
            self._loss(self.windows[rows], counted, places).backward()
        self.changes.take_gradients()
        torch.nn.utils.clip_grad_norm_(self.changes.values, MOST_GRADIENT)
        optimizer.step()
        self.changes.apply()

    def _loss(self, tokens: Tensor, counted: Tensor, places: Tensor) -> Tensor:
        """Cross entropy to what the teacher says, whose gradient is that of the KL."""
        with torch.no_grad():
            expected = logits_at(self.teacher, tokens, places)[counted].float().softmax(-1)
        found = logits_at(self.student.model, tokens, places)[counted].float()
        return torch.nn.functional.cross_entropy(found, expected)

    def _watch(self) -> None:
        """Measures the held-out text; keeps the weights if they are the best so far, goes back if much worse."""
        start, reached = time.monotonic(), self.state.reached
        kl = self.watched.kl(self.student.model)
        if not reached.watched or kl < reached.least:
            self.state.keep()
        elif kl > WORSE * reached.least:
            self.state.go_back()
            self.changes.apply()
        reached.seconds += time.monotonic() - start
        reached.watched.append(Watched(step=reached.step, seconds=reached.seconds, kl=kl))
