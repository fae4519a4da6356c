"""What came of the jobs of a sweep, kept in its folder, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from kvslim.calibrate.text_source import source_digest
from kvslim.contract import Frozen
from kvslim.errors import GateError, KvslimError, OutputError
from kvslim.export.manifest import MANIFEST
from kvslim.replacing import replacing
from kvslim.sweep.asked import Job

FILE = "sweep.json"


class Failure(Frozen):
    """What is wrong, where, how to fix it, and the exit code."""

    message: str
    where: str
    fix: str
    exit_code: int


class Outcome(Frozen):
    """What came of one job."""

    key: str = Field(description="hash of what was asked for")
    passed: bool | None = Field(None, description="whether all gates hold; None where there is no artifact or no gate")
    seconds: float = Field(0.0, description="that it took")
    failure: Failure | None = Field(None, description="why there is no artifact; None where there is one")

    @property
    def exit_code(self) -> int:
        """As `kvslim compress` would have ended."""
        if self.failure is not None:
            return self.failure.exit_code
        return GateError.exit_code if self.passed is False else 0


class Outcomes(Frozen):
    """What came of all jobs so far, by their names."""

    jobs: dict[str, Outcome] = Field({}, description="those that ended")

    @property
    def exit_code(self) -> int:
        """The worst of a job's that failed, else that of failed gates, else 0."""
        failed = [outcome.exit_code for outcome in self.jobs.values() if outcome.failure]
        return max(failed, default=max((outcome.exit_code for outcome in self.jobs.values()), default=0))


def key_of(job: Job) -> str:
    """SHA-256 of what a job asks for, with what its texts hold now."""
    texts = [_held_by(settings.source) for settings in (job.recipe.calibration, job.recipe.validation)]
    asked = [job.model, job.recipe.model_dump(mode="json"), texts]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _held_by(source: str) -> str | None:
    """A digest of a text; None where it cannot be read, which the job itself will tell."""
    try:
        return source_digest(source)
    except (KvslimError, OSError):
        return None


def load_outcomes(folder: Path, jobs: Mapping[str, Job]) -> Outcomes:
    """What came of jobs that still are asked for in an earlier run; those that failed are to be tried again.

    Raises:
        OutputError: The folder holds something else.
    """
    path = folder / FILE
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError("the folder holds no sweep", where=str(folder), fix="give an empty or a new folder")
        return Outcomes()
    try:
        found = Outcomes.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise OutputError("cannot be read", where=str(path), fix="delete it: artifacts are made again") from error
    done = {
        name: outcome
        for name, outcome in found.jobs.items()
        if name in jobs
        and outcome.failure is None
        and outcome.key == key_of(jobs[name])
        and (folder / name / MANIFEST).is_file()
    }
    return Outcomes(jobs=done)


def store_outcomes(folder: Path, outcomes: Outcomes) -> None:
    """Writes them whole or not at all.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILE) as partial:
            partial.write_text(outcomes.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write: {error.strerror}", where=str(folder), fix="give another -o") from error
