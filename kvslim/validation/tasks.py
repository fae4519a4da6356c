"""Tasks on an artifact: lm-evaluation-harness's own, task files of the user, and plain JSONL. Needs the extra `eval`.

A JSONL file becomes a task of the harness too, so that prompts, scores and standard errors mean the same everywhere.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from kvslim.contract import Frozen
from kvslim.errors import NotFoundError, UnsupportedError, UsageError, fault_of, first_line, suggestion
from kvslim.export.manifest import read_runnable
from kvslim.json_lines import is_json_lines, read_objects
from kvslim.measures import GateResult
from kvslim.progress import Progress, Silent

if TYPE_CHECKING:
    from lm_eval.api.model import LM

BOOTSTRAP = 1000  # bootstrap draws for the standard error of metrics that are not means
SEED = 1234  # seed of the few-shot examples, the harness's default
SPLIT = "test"


class Score(Frozen):
    """A metric of a task, named and computed by the harness."""

    value: float
    stderr: float | None = Field(description="standard error over the items; None if there is none")


class TaskScores(Frozen):
    """The scores of an artifact on a task."""

    items: int | None = Field(description="questions; None for a group of tasks")
    shots: int | None = Field(description="solved examples before each question; None for a group of tasks")
    metrics: dict[str, Score]


class Completion(Frozen):
    """A line of a JSONL task: the text that must follow a prompt."""

    prompt: str
    completion: str = Field(min_length=1)


class Choice(Frozen):
    """A line of a JSONL task: texts that could follow a prompt, and the index of the right one, from 0."""

    prompt: str
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _answered(self) -> Choice:
        if self.answer >= len(self.choices) or not all(self.choices):
            raise ValueError("answer must be the index of a choice, from 0, and no choice may be empty")
        return self


_KEYS = 'write {"prompt", "completion"}, or {"prompt", "choices", "answer"}, on every line'
_LINE: TypeAdapter[Completion | Choice] = TypeAdapter(Completion | Choice)
_FORMS: dict[type[Frozen], dict[str, Any]] = {
    Completion: {
        "output_type": "loglikelihood",
        "doc_to_target": "completion",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    Choice: {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
}


def evaluate(
    artifact: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskScores]:
    """Scores an artifact on tasks.

    Args:
        artifact: The folder.
        tasks: Names that the harness knows, or paths of JSONL files.
        include: A folder with task files of the harness, YAML, which can then be named too.
        limit: How many items of each task to use, from the first; None for all.
        shots: Solved examples before each question; None leaves it to the task.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        progress: Receives the progress.

    Returns:
        The scores by task, in the harness's order.

    Raises:
        UnsupportedError: The extra `eval` is not installed, or the artifact is an encoder.
        NotFoundError: There is no such artifact, task, file or data set.
        UsageError: A JSONL file is not a task, or a text is too long to be scored.
        ArtifactError: A file of the artifact is broken.
    """
    spec = read_runnable(artifact).spec
    if spec.is_encoder:
        raise UnsupportedError("an encoder writes no text", where=str(artifact), fix="give a decoder's artifact")
    _require_harness()
    loaded = load_tasks(tasks, include)
    from kvslim.validation.harness import ArtifactLM

    model = ArtifactLM(artifact, spec, threads=threads, progress=progress)
    return run_tasks(model, loaded, limit=limit, shots=shots, progress=progress)


def accuracy_gates(scores: Mapping[str, TaskScores], limit: float) -> tuple[GateResult, ...]:
    """One gate per task on its accuracy, `acc`; a task without one fails."""
    found = {name: task.metrics.get("acc") for name, task in scores.items()}
    values = {name: None if score is None else score.value for name, score in found.items()}
    return tuple(
        GateResult(
            name=f"min_accuracy of {name}", value=value, limit=limit, passed=value is not None and value >= limit
        )
        for name, value in values.items()
    )


def load_tasks(tasks: Sequence[str], include: Path | None = None) -> Mapping[str, Any]:
    """The harness's tasks for names and JSONL files.

    Raises:
        NotFoundError, UsageError: As `evaluate`.
    """
    if include is not None and not include.is_dir():
        raise NotFoundError("no such folder", where="--include", fix="give a folder with task files")
    names = {task: Path(task).stem if is_json_lines(Path(task)) else task for task in tasks}
    if same := [name for name, count in Counter(names.values()).items() if count > 1]:
        fix = "rename one of the files: scores are told by name"
        raise UsageError(f"several tasks are called {same[0]!r}", where=f"--tasks {','.join(tasks)}", fix=fix)
    specs = {task: _jsonl_task(Path(task)) if is_json_lines(Path(task)) else _named(task) for task in tasks}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager([name for name in tasks if specs[name] == name], include)
    try:
        return manager.load(list(specs.values()))
    except Exception as error:  # libraries raise many types, of a missing data set or network, or a broken file
        where, fix = f"--tasks {','.join(tasks)}", "check the task file and its data set"
        raise NotFoundError(f"cannot load: {first_line(error)}", where=where, fix=fix) from error


def _named(task: str) -> Any:
    """The name of a task; refused where it is a file's, though a file may happen to have a task's bare name."""
    path = Path(task)
    if path.is_file() and (path.suffix or len(path.parts) > 1):
        fix = "name it .jsonl if it is JSON lines; give the folder of a .yaml task with --include"
        raise UsageError("a file of questions is named .jsonl", where=f"--tasks {task}", fix=fix)
    return task


def _manager(names: Sequence[str], include: Path | None) -> Any:
    """The harness's index of tasks. Its own thousands of files are read only if a name is not among the user's."""
    from lm_eval.tasks import TaskManager

    own = None if include is None else str(include)
    manager = TaskManager(include_path=own, include_defaults=False)
    if set(names) - set(manager.task_index):
        manager = TaskManager(include_path=own)
    for name in names:
        if name not in manager.task_index:
            listed = "`lm-eval ls tasks` lists them; --include FOLDER adds your own"
            raise NotFoundError(
                f"no task {name!r}", where="--tasks", fix=suggestion(name, manager.task_index, otherwise=listed)
            )
    return manager


def run_tasks(
    model: LM,
    loaded: Mapping[str, Any],
    *,
    limit: int | None = None,
    shots: int | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskScores]:
    """Scores any of the harness's models on loaded tasks.

    Args:
        model: Such as `ArtifactLM`, or the harness's own `HFLM`.
        loaded: Of `load_tasks`.
        limit: As for `evaluate`.
        shots: As for `evaluate`.
        progress: Receives the progress.
    """
    from lm_eval.evaluator import evaluate as run

    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed != 0:  # do not change a task that asks for 0
            task.set_config(key="num_fewshot", value=fixed if shots is None else shots)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    (progress or Silent()).stage("tasks")
    # The harness would fork for its bootstrap, which can crash a process with onnxruntime's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    found = run(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    sizes, shown = found["n-samples"], found["n-shot"]
    return {
        name: TaskScores(
            items=sizes[name]["effective"] if name in sizes else None,
            shots=shown.get(name) if name in sizes else None,
            metrics=dict(_scores(values)),
        )
        for name, values in found["results"].items()
    }


def _scores(values: Mapping[str, Any]) -> Iterator[tuple[str, Score]]:
    """The metrics of a task from the harness's `acc,none` and `acc_stderr,none`; a filter becomes part of the name."""
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        stderr = float(error) if isinstance(error, int | float) else None
        yield metric if kind == "none" else key, Score(value=float(value), stderr=stderr)


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "tasks need the extra `eval`", where="kvslim eval", fix="pip install 'kvslim[eval]'"
        ) from error


def _jsonl_task(path: Path) -> dict[str, Any]:
    """A task of the harness from a JSONL file; prompt and answer are joined without a separator."""
    from datasets import Dataset

    lines = read_lines(path)
    rows = Dataset.from_list([line.model_dump(mode="json") for line in lines])
    return {
        "task": path.stem,
        "custom_dataset": lambda **_: {SPLIT: rows},
        "test_split": SPLIT,
        "fewshot_split": SPLIT,
        "doc_to_text": "prompt",
        "target_delimiter": "",
        **_FORMS[type(lines[0])],
    }


def read_lines(path: Path) -> list[Completion] | list[Choice]:
    """The questions of a JSONL task.

    Raises:
        NotFoundError: There is no such file.
        UsageError: It is not JSONL, a line has other keys, or there are two kinds of lines.
    """
    if not path.is_file():
        raise NotFoundError(f"no task file {str(path)!r}", where="--tasks", fix="give a path that ends in .jsonl")
    lines: list[Any] = [_line(record, where) for where, record in read_objects(path, _KEYS)]
    if len({type(line) for line in lines}) != 1:
        fault = "the file mixes two kinds of lines" if lines else "the file is empty"
        raise UsageError(fault, where=str(path), fix=_KEYS)
    return lines


def _line(record: dict[str, Any], where: str) -> Completion | Choice:
    try:
        return _LINE.validate_python(record)
    except ValidationError as error:
        fault = error.errors()[-1]
        told = fault_of({**fault, "loc": fault["loc"][1:]}, "line")  # without the kind of line that was tried last
        raise UsageError(f"not a question: {told}", where=where, fix=_KEYS) from error
