"""Tasks on an artifact, against the same tasks on the same model in transformers; without a network."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.harness import needs_harness
from support.models import open_prepared, recipe_of
from support.tiny_artifact import SPEC, fill
from support.tiny_tokenizer import fallback_tokenizer
from support.tiny_writer import write_writer

from kvslim.cli import app
from kvslim.demo.world import document, recall_questions
from kvslim.errors import NotFoundError, UnsupportedError, UsageError
from kvslim.export.manifest import read_manifest, write_manifest
from kvslim.runtime.generate import load_tokenizer
from kvslim.types import KVLayout, Plan
from kvslim.validation.tasks import Choice, Completion, evaluate, load_tasks, read_lines, run_tasks

# lm-eval and accelerate are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")
QUESTIONS = 16

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's plain export, as an artifact that was never measured."""
    folder = tmp_path_factory.mktemp("plain") / "demo"
    folder.mkdir()
    prepared = open_prepared("demo", recipe_of())
    plan = Plan.identity(prepared.spec)
    layout = KVLayout.of(prepared.spec, plan)
    prepared.write_companions(folder, layout, prepared.export(plan, folder))
    shape = {"spec": prepared.spec, "plan": plan, "kv_layout": layout}
    template = folder.with_name("template")
    template.mkdir()
    fill(template)
    write_manifest(folder, read_manifest(template).model_copy(update=shape))
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> dict[str, Path]:
    """The demo's recall questions as completions and as choices; of every second one the story was cut off."""
    tokenizer = load_tokenizer(plain)
    questions = recall_questions(QUESTIONS, 64, lambda text: len(tokenizer.encode(text).ids))
    values, generator = sorted({question.answer for question in questions}), random.Random(0)
    completions, choices = [], []
    for index, question in enumerate(questions):
        prompt = question.prompt if index % 2 else question.prompt[question.prompt.rindex("Question:") :]
        wrong = [value for value in values if value != question.answer]
        options = generator.sample([*generator.sample(wrong, 3), question.answer], 4)
        completions.append({"prompt": prompt, "completion": question.answer})
        choices.append({"prompt": prompt, "choices": options, "answer": options.index(question.answer)})
    folder = tmp_path_factory.mktemp("tasks")
    return {
        name: written(folder / f"{name}.jsonl", rows) for name, rows in (("recall", completions), ("pick", choices))
    }


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = app.run(["eval", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture
def task_folder(files: dict[str, Path], tmp_path: Path) -> Path:
    """A task file of the harness, over local data, with text to generate and text to judge."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(files["recall"])}}}
    data["dataset_kwargs"]["cache_dir"] = str(tmp_path / "cache")  # type: ignore[index]
    common = {**data, "test_split": "test", "num_fewshot": 0}
    said = {
        "task": "demo_say",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "completion",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    read = {
        "task": "demo_read",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "prompt",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in (said, read):
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}))
    return folder


@pytest.mark.golden
@pytest.mark.timeout(900)  # minutes on a busy machine
@needs_harness
def test_plain_export_scores_as_transformers_does_when_the_items_are_the_same(
    plain: Path, files: dict[str, Path], task_folder: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    from kvslim import demo

    names = [str(files["recall"]), str(files["pick"]), "demo_say", "demo_read"]
    original = Path(demo.__file__).parent / "model"
    reference = HFLM(pretrained=str(original), device="cpu", batch_size=1, dtype="float32")
    theirs = run_tasks(reference, load_tasks(names, task_folder))
    ours = evaluate(plain, names, include=task_folder)
    assert 0.4 < ours["recall"].metrics["acc"].value < 1
    assert ours["recall"].items == ours["pick"].items == QUESTIONS
    assert {name: set(task.metrics) for name, task in ours.items()} == {
        name: set(task.metrics) for name, task in theirs.items()
    }
    for name, metric in (("recall", "acc"), ("pick", "acc"), ("pick", "acc_norm"), ("demo_say", "exact_match")):
        assert ours[name].metrics[metric] == theirs[name].metrics[metric]
    for name, metric in (("recall", "perplexity"), ("demo_read", "word_perplexity")):
        assert ours[name].metrics[metric].value == pytest.approx(theirs[name].metrics[metric].value, rel=1e-3)


@pytest.mark.golden
@pytest.mark.timeout(900)  # minutes on a busy machine
@needs_harness
def test_model_scores_the_same_whatever_the_cache_held_before(plain: Path) -> None:
    from kvslim.validation.harness import ArtifactLM

    text = document(1, "heldout", 60)
    spec = read_manifest(plain).spec.model_copy(update={"max_context": 64})
    model = ArtifactLM(plain, spec)
    ids = model.tok_encode(text)[:60]
    alone = model._score(ids[:40], ids[40:50])
    model._score(ids[:45], ids[45:60])
    again = model._score(ids[:40], ids[40:50])
    np.testing.assert_allclose(again[0], alone[0], atol=1e-4)
    assert again[1] == alone[1]
    # What exceeds the model's positions loses its beginning.
    long = model._score(ids * 2, ids[:1])
    fresh = ArtifactLM(plain, spec)
    np.testing.assert_allclose(long[0], fresh._score((ids * 2)[-64:], ids[:1])[0], atol=1e-4)


@pytest.mark.golden
@pytest.mark.timeout(900)  # minutes on a busy machine
@needs_harness
def test_eval_prints_scores_and_exits_3_when_accuracy_is_below_its_limit(
    run: Run, plain: Path, files: dict[str, Path]
) -> None:
    code, out, err = run(plain, "--tasks", files["recall"], "--limit", 2, "--shots", 1, "--min-accuracy", 1, "--json")
    printed = json.loads(out)
    task = printed["tasks"]["recall"]
    assert (code, task["items"], task["shots"]) == (0 if printed["passed"] else 3, 2, 1)
    code, out, err = run(plain, "--tasks", files["pick"], "--limit", 4, "--min-accuracy", 0)
    assert code == 0
    assert re.search(r"pick +acc +\d\.\d{4}", out)
    assert "passed" in out
    code, out, err = run(plain, "--tasks", files["recall"], "--limit", 4, "--min-accuracy", 1)
    assert code == 3
    assert "min_accuracy of recall" in err


@pytest.fixture
def writer(tmp_path: Path) -> Path:
    """A tiny artifact with byte fallback, whose tokenizer knows a word that the model does not."""
    write_writer(tmp_path)
    tokenizer = fallback_tokenizer()
    tokenizer.add_tokens(["wizard"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@needs_harness
@pytest.mark.parametrize(("tokens", "until", "answer"), [(9, "\n", "☕😀"), (11, "😀", "☕"), (3, "é", "☕")])
def test_text_to_generate_has_whole_characters_up_to_its_stop_string(
    writer: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, until: str, answer: str
) -> None:
    from kvslim.validation.harness import ArtifactLM

    written = iter(fallback_tokenizer().encode("☕😀☕☕").ids)
    monkeypatch.setattr("kvslim.runtime.writing.Sampler.draw", lambda *_: next(written))
    model = ArtifactLM(writer, SPEC)
    assert model._generated("é", {"max_gen_toks": tokens, "until": [until]}, 0) == answer


@needs_harness
def test_token_that_the_model_does_not_know_is_named(writer: Path) -> None:
    from kvslim.validation.harness import ArtifactLM

    model = ArtifactLM(writer, SPEC)
    assert len(model.tok_encode("é")) == 2
    with pytest.raises(UsageError, match="'wizard' is token"):
        model.tok_encode("éwizard")


@needs_harness
def test_unknown_task_is_refused_with_the_closest_name(
    run: Run, tmp_path: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    # The harness reads thousands of files for its own names.
    known = TaskManager(include_path=str(task_folder), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: known)
    fill(tmp_path)
    code, out, err = run(tmp_path, "--tasks", "demo_sya", "--include", task_folder)
    assert (code, out) == (5, "")
    assert "did you mean 'demo_say'?" in err


@pytest.mark.parametrize("other", ["b/said.jsonl", "b/said.JSONL", "said"])
def test_tasks_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="several tasks are called 'said'"):
        load_tasks(["a/said.jsonl", other])


@needs_harness
def test_task_with_a_data_set_that_cannot_be_had_is_named(run: Run, tmp_path: Path, task_folder: Path) -> None:
    fill(tmp_path)
    task = json.loads((task_folder / "demo_say.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "gone.json")
    (task_folder / "demo_say.yaml").write_text(json.dumps(task))
    code, _, err = run(tmp_path, "--tasks", "demo_say", "--include", task_folder)
    assert code == 5
    assert "gone.json" in err


def test_missing_extra_is_told_with_the_command_that_installs_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code, out, err = run(tmp_path, "--tasks", "piqa")
    assert (code, out) == (UnsupportedError.exit_code, "")
    assert "pip install 'kvslim[eval]'" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("{", "not JSON"),
        ('{"prompt": "a"}', "not a question: answer: must be given"),
        (
            '{"prompt": "a", "choices": ["b"], "answer": 0}',
            "not a question: choices: tuple should have at least 2 items",
        ),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
            "not a question: .*answer must be the index of a choice",
        ),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "choices": ["b", "c"], "answer": 1}', "two kinds"),
        ('{"prompt": "a", "completion": "\\ud800"}', "not JSON: "),
    ],
)
def test_read_lines_names_what_is_wrong_when_a_file_is_no_task(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_lines(path)


def test_read_lines_gives_the_questions(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "", "completion": "c"}\n')
    assert read_lines(path) == [Completion(prompt="a", completion="b"), Completion(prompt="", completion="c")]
    path.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 1}')
    assert read_lines(path) == [Choice(prompt="a", choices=("b", "c"), answer=1)]
    with pytest.raises(NotFoundError):
        read_lines(tmp_path / "gone.jsonl")
