"""A tokenizer that knows more tokens than its model: refused where text becomes ids, and only if the text has one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.models import open_prepared, recipe_of
from support.tiny_artifact import describe
from support.tiny_encoders import save_encoder
from support.tiny_writer import write_writer
from tokenizers import AddedToken, Tokenizer

import kvslim
from kvslim.cli import app
from kvslim.errors import UsageError
from kvslim.loading.source import read_spec, resolve
from kvslim.prepared.encoder import PreparedEncoder
from kvslim.progress import Silent
from kvslim.settings import Calibration, Validation

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if messages[0].role == 'user' %}<|answer|>{% endif %}"
PLAIN = "some words that any model knows. " * 20


class WeightsReadError(Exception):
    """The text was found good, and the model would be read now."""


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise WeightsReadError

    for name in ("decoder.load_model", "encoder.load_encoder"):
        monkeypatch.setattr(f"kvslim.prepared.{name}", read)


def enlarge(folder: Path, *tokens: str) -> Path:
    """Gives the tokenizer of a folder more tokens."""
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.save(path)
    return folder


def source(folder: Path, name: str, text: str) -> str:
    path = folder / name
    record = {"prompt": PLAIN, "completion": text} if "completion" in name else {"text": text}
    path.write_text(json.dumps(record) if path.suffix == ".jsonl" else text)
    return str(path)


SOURCES = [("calibration", "text.txt"), ("calibration", "completion.jsonl"), ("validation", "text.jsonl")]


@pytest.mark.parametrize(("part", "name"), SOURCES)
def test_decoders_text_is_refused_before_weights_are_read(
    tiny_llama: Path, tmp_path: Path, part: str, name: str
) -> None:
    model = enlarge(shutil.copytree(tiny_llama, tmp_path / "model"), "<tool>", "wizard")
    kind = {"calibration": Calibration, "validation": Validation}[part]
    good, bad = (source(tmp_path, f"{index}-{name}", text) for index, text in enumerate((PLAIN, PLAIN + "A wizard.")))
    with pytest.raises(WeightsReadError):
        _ = open_prepared(model, recipe_of().model_copy(update={part: kind(source=good)})).model
    with pytest.raises(UsageError, match=r"'wizard' is token 258, but .* tokens 0 to 256 only") as caught:
        open_prepared(model, recipe_of().model_copy(update={part: kind(source=bad)}))
    assert caught.value.where == bad


def test_plan_exits_as_on_bad_input(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = enlarge(shutil.copytree(tiny_llama, tmp_path / "model"), "<tool>")
    text = source(tmp_path, "text.txt", PLAIN + "<tool>")
    assert app.run(["plan", str(model), "-r", "balanced", "--set", f"calibration.source={text}"]) == 2
    assert "'<tool>' is token 257" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "mask", "found"),
    [
        ("a wizard and a lamp. Another line.\n" * 9, None, "'wizard' is token"),
        (None, "<hidden>", "'<hidden>' is token"),
        (None, None, None),
    ],
)
def test_encoders_text_and_mask_are_refused_before_weights_are_read(
    tmp_path: Path, text: str | None, mask: str | None, found: str | None
) -> None:
    model = enlarge(save_encoder("bert", "fill-mask", tmp_path / "model"), "wizard", "<hidden>")
    if mask is not None:
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token": mask}))
    update = {} if text is None else {"calibration": Calibration(source=source(tmp_path, "text.txt", text))}
    snapshot = resolve(str(model))
    with pytest.raises(WeightsReadError if found is None else UsageError, match=found):
        PreparedEncoder(snapshot, read_spec(snapshot), recipe_of().model_copy(update=update), Silent())


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact whose tokenizer gives ids beyond its model's 257."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    enlarge(write_writer(folder), "<tool>", "<|answer|>", "wizard")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    describe(folder)
    return folder


def test_bad_lines_of_a_file_are_errors_and_the_rest_is_answered(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user, system = ({"role": role, "content": "hello"} for role in ("user", "system"))
    lines = [
        ({"prompt": "hello"}, None),
        ({"prompt": "a wizard"}, "'wizard' is token 258"),
        ({"messages": [user]}, "'<|answer|>' is token 257"),
        ({"messages": [system]}, None),
        ({"prompt": "wizardwizard"}, "'wizard' is token 258"),
        ({"prompt": "end"}, None),
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line, _ in lines))
    for batch in ("1", "4"):
        code = app.run(["generate", str(artifact), "--file", str(path), "--max-new-tokens", "2", "--batch", batch])
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert code == 2
        for number, ((_, error), answer) in enumerate(zip(lines, answers, strict=True), start=1):
            assert ("completion" in answer) == (error is None)
            assert error is None or error in answer["error"]["message"]
            assert error is None or answer["error"]["where"] == f"{path}, line {number}"


def test_prompts_are_refused_by_every_way_to_generate(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-p", "a wizard"], ["-p", "hello", "--chat"]):
        assert app.run(["generate", str(artifact), *arguments]) == 2
        assert "but the model has embeddings for tokens 0 to 256 only" in capsys.readouterr().err
    text = kvslim.load(artifact)
    with pytest.raises(UsageError, match="wizard"):
        text.generate("wizard")
    with pytest.raises(UsageError, match="wizard"):
        text.generate_batch(["hello", "wizard"])
