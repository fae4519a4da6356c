"""Tokenizer files that cannot be read: the one at fault is named before weights are read, with what helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kvslim.errors import ModelError
from kvslim.loading.model import load_tokenizer
from kvslim.loading.source import resolve

WHOLE, CONFIG, SPECIAL, ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
AGAIN, CORRECT = "download it again", "correct its values"
CASES: dict[str, tuple[dict[str, str | None], str, str, str]] = {
    # what is written (None: removed), the file that is named, words, fix
    "empty": ({WHOLE: ""}, WHOLE, "is not JSON: Expecting value", AGAIN),
    "cut_off": ({WHOLE: '{"version": "1.0", "model'}, WHOLE, "is not JSON", AGAIN),
    "nested": ({CONFIG: "[" * 100_000}, CONFIG, "is not JSON", AGAIN),
    "config_is_a_list": ({CONFIG: "[]"}, CONFIG, "is not an object", AGAIN),
    "special_is_a_number": ({SPECIAL: "5"}, SPECIAL, "is not an object", AGAIN),
    "pointer": ({WHOLE: POINTER}, WHOLE, "a pointer of Git LFS", "git lfs pull"),
    "of_a_new_kind": (
        {WHOLE: '{"version": "1.0", "model": {"type": "BPE9"}}'},
        WHOLE,
        "by tokenizers 0.",
        "newer version",
    ),
    "class_is_a_number": ({CONFIG: '{"tokenizer_class": 5}'}, CONFIG, "cannot load the tokenizer", CORRECT),
    "end_is_a_number": ({CONFIG: '{"eos_token": 5}'}, CONFIG, "eos_token has to be", CORRECT),
    "length_is_text": ({CONFIG: '{"model_max_length": "2k"}'}, CONFIG, "model_max_length is '2k': this", CORRECT[:7]),
    "added_id_is_text": ({ADDED: '{"a": "b"}'}, CONFIG, "cannot load the tokenizer", CORRECT),
    "none": (
        {WHOLE: None, CONFIG: None},
        "",
        "no tokenizer.json, and none can be made: there is no vocabulary",
        "add tokenizer.json",
    ),
    "pieces_alone": (
        {WHOLE: None, CONFIG: None, "tokenizer.model": "x"},
        "",
        "sentencepiece, which reads tokenizer.model, is not installed",
        "pip install",
    ),
    "merges_without_words": (
        {WHOLE: None, "vocab.json": "{}", "merges.txt": ""},
        "",
        "no tokenizer.json, and none can be made",
        "add tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_broken_file_is_named(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("kvslim.loading.tokenizer.find_spec", lambda _: None)
    files, place, words, fix = CASES[name]
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    for file, text in files.items():
        (model / file).unlink(missing_ok=True)
        if text is not None:
            (model / file).write_text(text)
    with pytest.raises(ModelError) as error:
        load_tokenizer(resolve(str(model)))
    assert error.value.where.removesuffix(": model_max_length") == str(model / place)
    assert words in error.value.message
    assert fix in error.value.fix


@pytest.mark.parametrize("config", [{"model_max_length": None}, {"tokenizer_class": "Yours"}, {"unk_token": None}])
def test_value_that_changes_nothing_is_accepted(tiny_llama: Path, tmp_path: Path, config: dict[str, object]) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / CONFIG).write_text(json.dumps({**json.loads((model / CONFIG).read_text()), **config}))
    found, expected = (load_tokenizer(resolve(str(folder)))("a b").input_ids for folder in (model, tiny_llama))
    assert found == expected
