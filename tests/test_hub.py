"""What is downloaded of a model on the hub: what the verb needs, and no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import tiny_hub
from support.tiny_hub import COMMIT, TinyHub

from kvslim.cli import app
from kvslim.errors import ModelError, NotFoundError, UnsupportedError
from kvslim.loading.files import model_files
from kvslim.loading.source import resolve

ID = "someone/model"
LLAMA = json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
SHARDS = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
ODD_SHARDS = json.dumps({"weight_map": {"a": "weights.part-1.safetensors", "b": "weights.part-2.safetensors"}})
# Other formats of the same weights, and files that belong to no verb.
CLUTTER = (
    "LICENSE",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "model.fp16.safetensors",
    "model-Q4_K_M.gguf",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/params.json",
    "original/tokenizer.model",
    "original/model.safetensors",
    "preprocessor_config.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "rust/qwen.tiktoken",
    "trainer_state.json",
)
NAMED = {
    "config_json": "config.json",
    "adapter_config_json": "adapter_config.json",
    "generation_config_json": "generation_config.json",
    "model_safetensors_index_json": "model.safetensors.index.json",
}
FAST = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
# The files of a repository without the clutter, all of which a verb with weights needs; the config's text if not Llama.
NEEDED: dict[str, tuple[str, ...]] = {
    "one file": (*FAST, "model.safetensors"),
    "shards": (
        *FAST,
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ),
    "shards of other names": (
        *FAST,
        "model.safetensors.index.json",
        "weights.part-1.safetensors",
        "weights.part-2.safetensors",
    ),
    "templates": (
        *FAST,
        "model.safetensors",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "special_tokens_map.json",
    ),
    "WordPiece": ("config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"),
    "byte-level BPE": ("config.json", "model.safetensors", "added_tokens.json", "vocab.json", "merges.txt"),
    "SentencePiece": ("config.json", "model.safetensors", "spiece.model"),
    "tiktoken": ("config.json", "model.safetensors", "qwen.tiktoken"),
    "tiktoken as a model": ("config.json", "model.safetensors", "tiktoken.model"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyHub:
    return tiny_hub.install(tmp_path, monkeypatch)


def write(hub: TinyHub, *names: str, repository: str = ID, **texts: str) -> None:
    """A repository with files of these names; `config_json` is the text of config.json, and so on."""
    contents = {"config.json": LLAMA, **{NAMED[name]: text for name, text in texts.items()}}
    for name in names:
        path = hub.root / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents.get(name, "x"))


@pytest.mark.parametrize("case", NEEDED)
def test_whole_model_is_downloaded_without_the_clutter(hub: TinyHub, case: str) -> None:
    index = {"shards of other names": ODD_SHARDS}.get(case, SHARDS)
    write(hub, *NEEDED[case], *CLUTTER, model_safetensors_index_json=index)
    snapshot = resolve(ID)
    assert hub.fetched[ID] == set(NEEDED[case])
    # The same files count in a copy of the whole repository, so that both have one digest.
    assert {path.relative_to(snapshot.path).as_posix() for path in snapshot.files()} == set(NEEDED[case])
    assert snapshot.sha256 == resolve(str(hub.root / ID)).sha256


def test_vocabularies_are_left_out_when_there_is_a_tokenizer(hub: TinyHub) -> None:
    write(hub, *FAST, "model.safetensors", "vocab.json", "merges.txt", "tokenizer.model", "model-00001.safetensors")
    resolve(ID)
    assert hub.fetched[ID] == {*FAST, "model.safetensors"}


def test_inspect_downloads_the_config_alone(hub: TinyHub, capsys: pytest.CaptureFixture[str]) -> None:
    write(hub, *NEEDED["templates"], *CLUTTER)
    assert app.run(["inspect", ID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "llama"
    assert hub.fetched == {ID: {"config.json"}}


ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
ON_BASE = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})


TEXT_GONE = ("--set", "calibration.source=gone.txt")
REFUSED: dict[str, list[str]] = {
    "a text that is not there": ["compress", ID, "-o", "out", *TEXT_GONE],
    "a folder that is taken": ["compress", ID, "-o", "."],
    "a plan of another model": ["compress", ID, "-o", "out", "--plan", "plan.json"],
    "a length beyond the positions": ["plan", ID, "--set", "validation.length=99999"],
    "a recipe for encoders": ["plan", ID, "-r", "encoder"],
    "data that is not there": ["analyze", ID, "--data", "gone.jsonl"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_are_not_downloaded_for_what_is_refused(
    hub: TinyHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    write(hub, *NEEDED["one file"], *CLUTTER)
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text('{"layers": [{"layer": 0}]}')
    assert app.run(REFUSED[case]) in {2, 4, 5}
    assert hub.fetched == {ID: {"config.json"}}


def test_adapter_and_its_base_are_downloaded_as_far_as_needed(hub: TinyHub) -> None:
    write(hub, *ADAPTER, "optimizer.pt", "training_args.bin", adapter_config_json=ON_BASE)
    write(hub, *NEEDED["one file"], *CLUTTER, repository="org/base")
    assert resolve(ID, weights=False).config()["model_type"] == "llama"
    assert hub.fetched == {ID: {"adapter_config.json"}, "org/base": {"config.json"}}
    resolve(ID)
    assert hub.fetched == {ID: set(ADAPTER), "org/base": set(NEEDED["one file"])}


def test_merged_model_that_kept_its_adapter_config_needs_no_base(hub: TinyHub) -> None:
    write(hub, *NEEDED["one file"], "adapter_config.json", adapter_config_json=ON_BASE)
    assert resolve(ID, weights=False).config()["model_type"] == "llama"
    assert resolve(ID).path.name == COMMIT
    assert "org/base" not in hub.fetched


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ('{"model_type": "mixtral", "num_local_experts": 8}', UnsupportedError),
        ('{"model_type": "mamba"}', UnsupportedError),
        ('{"model_type": "llama", "hidden_size": "many"}', ModelError),
        (json.dumps({**json.loads(LLAMA), "quantization_config": {"quant_method": "gptq"}}), UnsupportedError),
        ("{", ModelError),
        ("", ModelError),
    ],
)
def test_weights_are_not_downloaded_of_what_cannot_be_read(hub: TinyHub, config: str, error: type[Exception]) -> None:
    write(hub, *NEEDED["one file"], config_json=config)
    with pytest.raises(error):
        resolve(ID)
    assert hub.fetched == {ID: {"config.json"}}


def test_repository_without_a_config_costs_nothing(hub: TinyHub) -> None:
    write(hub, "model-Q8_0.gguf", "model.safetensors")
    with pytest.raises(NotFoundError, match=r"no config\.json") as error:
        resolve(ID)
    assert "org/name:FILE.gguf" in error.value.fix
    assert hub.fetched == {}


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": {"a": 1, "b": "c"}}', '{"weight_map": [1]}', '{"weight_map": {"a": 7}}']
)
def test_broken_index_on_the_hub_is_named(hub: TinyHub, index: str) -> None:
    settings = {"generation_config_json": "{}", "model_safetensors_index_json": index}
    write(hub, *FAST, "model.safetensors.index.json", **settings)
    with pytest.raises(ModelError, match="the index names"):
        resolve(ID).check()


def test_later_downloads_are_of_the_commit_of_the_first(hub: TinyHub) -> None:
    write(hub, *NEEDED["WordPiece"])
    snapshot = resolve(f"{ID}@v2")
    assert hub.revisions == [(ID, "v2"), (ID, COMMIT), (ID, COMMIT)]
    assert (snapshot.path.name, snapshot.model, snapshot.revision) == (COMMIT, ID, "v2")


def test_files_of_a_model_do_not_change_with_what_lies_beside_them(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    before = resolve(str(folder)).sha256
    for name in ("README.md", "all_results.json", "consolidated.safetensors", "merges.txt"):
        (folder / name).write_text("more")
    assert resolve(str(folder)).sha256 == before
    assert {path.name for path in model_files(folder)} == {path.name for path in tiny_llama.iterdir()}
