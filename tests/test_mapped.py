"""Models larger than memory: their weights lie in files without names, and everything comes out the same."""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from support.adapters import MATRIX, quiet_peft, save_adapter
from support.models import in_chunks, open_prepared, recipe_of, tokens_of
from support.paths import ROOT
from support.tiny_decoders import save_decoder
from support.tiny_gguf import write_gguf

from kvslim import checks, memory
from kvslim.errors import ModelError, OutputError
from kvslim.loading.mapped import MappedWeights, in_file, let_go
from kvslim.loading.model import load_model
from kvslim.loading.source import read_spec, resolve
from kvslim.methods import KvPca
from kvslim.pipeline import compress
from kvslim.planning.decide import decide
from kvslim.recipe import Recipe
from kvslim.runtime.session import DecodeSession
from kvslim.types import Plan
from kvslim.weight_format import WeightFormat

ModelOf = Callable[[str], Path]
GPTQ = WeightFormat(type="int4", method="gptq")
LARGE = 2**40
RANK = KvPca(rank=8)


@contextmanager
def memory_of(size: int, cache: Path) -> Iterator[None]:
    """Within the block the machine has so many bytes left, and nothing is known from earlier runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "usable_memory", lambda: size)
        patch.setenv("KVSLIM_CACHE", str(cache))
        yield


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of their own for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def maps_of(folder: Path) -> list[str]:
    """The files of a folder that are mapped into memory, those without names too."""
    gc.collect()
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f" {folder}/" in line]


class Made(NamedTuple):
    """All that comes out of a model: statistics, plan, matrices as they are now, and the files of its graph."""

    statistics: dict[str, np.ndarray]
    plan: Any
    weights: dict[str, torch.Tensor]
    files: dict[str, str]


def made(model: Path, recipe: Recipe, folder: Path, room: int) -> Made:
    with memory_of(room, folder / "cache"):
        prepared = open_prepared(model, recipe)
        statistics = {name: value for name, value in vars(prepared.statistics).items() if isinstance(value, np.ndarray)}
        plan = decide(recipe, prepared.spec, prepared.statistics)
        weights = {name: weight.detach().clone() for name, weight in prepared.model.named_parameters()}
        prepared.install(prepared.codes(plan))
        (graph := folder / "graph").mkdir(parents=True)
        prepared.export(plan, graph)
        prepared.release()
    return Made(statistics, plan, weights, {path.name: digest(path) for path in sorted(graph.iterdir())})


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def check_same(model: Path, recipe: Recipe, folder: Path) -> None:
    """Everything is the same to the bit, whether weights are in memory or mapped."""
    small, large = (made(model, recipe, folder / str(room), room) for room in (0, LARGE))
    assert small.statistics.keys() == large.statistics.keys()
    for name, values in large.statistics.items():
        np.testing.assert_array_equal(small.statistics[name], values, err_msg=name)
    assert small.plan == large.plan
    assert all(torch.equal(small.weights[name], weight) for name, weight in large.weights.items())
    assert small.files == large.files
    assert len(large.files) == 2


# Tied tables, and projections that are packed or of another form.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "weights"),
    [("llama", "fp32"), ("qwen3", GPTQ), ("phi3", GPTQ), ("gpt2", "int4")],
    ids=str,
)
def test_everything_is_the_same_to_the_bit(
    tiny_model: ModelOf, tmp_path: Path, family: str, weights: str | WeightFormat
) -> None:
    check_same(tiny_model(family), recipe_of([RANK], weights), tmp_path)


@pytest.mark.slow
def test_blocks_of_a_gguf_are_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, tmp_path / "x.gguf", "Q4_0")
    check_same(path, recipe_of([RANK], "stored"), tmp_path)


@pytest.mark.slow
@quiet_peft
def test_merged_adapter_is_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_llama), "r": 4, "target_modules": ["q_proj"]}
    check_same(save_adapter(tmp_path / "lora", config, f"base_model.model.{MATRIX}"), recipe_of([RANK]), tmp_path)


@pytest.mark.slow
def test_artifact_is_the_same_to_the_byte(tiny_llama: Path, tmp_path: Path) -> None:
    for room in (0, LARGE):
        with memory_of(room, tmp_path / f"cache{room}"):
            compress(str(tiny_llama), recipe_of([RANK], "int4"), tmp_path / str(room))
    names = [path.name for path in (tmp_path / "0").iterdir() if path.name.startswith("model.onnx")]
    assert sorted(names) == ["model.onnx", "model.onnx_data"]
    assert all(digest(tmp_path / "0" / name) == digest(tmp_path / str(LARGE) / name) for name in names)


@pytest.mark.parametrize("weights", ["fp32", "int4", GPTQ], ids=str)
def test_all_weights_are_in_files_that_end_with_the_model(
    tiny_model: ModelOf, tmp_path: Path, temporary: Path, weights: str | WeightFormat
) -> None:
    with memory_of(0, tmp_path / "cache"):
        prepared = open_prepared(tiny_model("qwen3"), recipe_of([RANK], weights))
        model = prepared.model
    tables = [part.weight.data_ptr() for part in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert tables[0] == tables[1]  # tied
    lines = maps_of(temporary)
    assert all(line.endswith("(deleted)") for line in lines)
    places = {int(line.partition("-")[0], 16) for line in lines}
    others = places - {weight.data_ptr() for weight in model.parameters()}
    assert len(places) - len(others) == len(list(model.parameters()))
    assert bool(others) == (weights != "fp32")  # blocks
    del model
    prepared.release()
    assert not maps_of(temporary)


def test_arrays_in_files_take_no_memory_until_they_are_read_again(temporary: Path) -> None:
    numbers = np.arange(2**20, dtype=np.int32).reshape(2, -1)
    found = in_file(numbers)
    np.testing.assert_array_equal(found, numbers)
    assert resident(temporary) > 1000
    let_go()
    assert resident(temporary) == 0
    np.testing.assert_array_equal(found, numbers)


def test_what_is_written_stays_when_pages_are_let_go(temporary: Path) -> None:
    weights = MappedWeights()
    numbers = torch.randn(300, 1000)
    found = weights.put(numbers.to(torch.bfloat16))
    assert torch.equal(found, numbers.to(torch.bfloat16).float())
    assert resident(temporary) > 1000
    found.mul_(2)
    let_go()
    assert resident(temporary) == 0
    assert torch.equal(found, 2 * numbers.to(torch.bfloat16).float())
    assert not list(temporary.iterdir())


def resident(folder: Path) -> int:
    """KiB of a folder's files that are in the memory of this process."""
    lines, found, inside = Path("/proc/self/smaps").read_text().splitlines(), 0, False
    for line in lines:
        if "-" in line.split()[0]:
            inside = f" {folder}/" in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_layers_let_go_of_their_weights(tiny_llama: Path, tmp_path: Path, temporary: Path) -> None:
    with memory_of(0, tmp_path / "cache"):
        model = load_model(resolve(str(tiny_llama)))
    assert resident(temporary) <= 20  # all of them were looked at, and norms last
    seen = [layer.register_forward_hook(lambda *_: left.append(resident(temporary))) for layer in model.model.layers]
    left: list[int] = []
    with torch.inference_mode():
        model(input_ids=torch.arange(20)[None])
    assert left == [0] * len(seen)
    assert resident(temporary) == 0


CHILD = """
import sys
import torch
from kvslim import memory
from kvslim.loading.model import load_model
from kvslim.loading.source import resolve
from kvslim.validation.rss import own_peak_mib
tiny, model = sys.argv[1:]
for folder, room in ((tiny, 0), (model, 0), (model, 2**40)):
    memory.usable_memory = lambda: room
    before = own_peak_mib()
    loaded = load_model(resolve(folder))
    with torch.inference_mode():
        loaded(input_ids=torch.arange(100)[None])
    print(own_peak_mib() - before)
    del loaded
"""


@pytest.mark.slow
def test_memory_holds_a_part_of_the_weights(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 128}
    model = save_decoder("llama", tmp_path / "model", **sizes)
    weights = (model / "model.safetensors").stat().st_size / 2**20
    command = [sys.executable, "-c", CHILD, str(tiny_llama), str(model)]
    _, held, whole = map(float, subprocess.check_output(command, cwd=ROOT, text=True).split())
    assert weights > 180
    assert held < 0.25 * weights
    assert whole > 0.8 * weights


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_sessions_make_no_copy_of_float_weights(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    prepared = open_prepared(tiny_llama, recipe_of(weights=weights))
    prepared.export(Plan.identity(prepared.spec), tmp_path)
    tokens, entry = tokens_of(prepared), "session.disable_prepacking"
    plain, found, logits = onnxruntime.InferenceSession, [], []

    def opened(graph: Any, options: Any, **others: Any) -> Any:
        try:
            found.append(options.get_session_config_entry(entry) == "1")
        except RuntimeError:  # it is not set
            found.append(False)
        return plain(graph, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    for room in (LARGE, 0):
        with memory_of(room, tmp_path / "cache"):
            session = DecodeSession(tmp_path, capacity=len(tokens), all_positions=True)
        logits.append(in_chunks(session, tokens, [8, 1]))
    assert found == [False, weights == "fp32"]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("limit", [0, 20_000])
def test_full_disk_is_told_and_nothing_is_left(tiny_llama: Path, tmp_path: Path, temporary: Path, limit: int) -> None:
    snapshot, limits = resolve(str(tiny_llama)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with memory_of(0, tmp_path / "cache"), pytest.raises(OutputError, match="larger than memory") as error:
            load_model(snapshot)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.where == str(temporary)
    assert "TMPDIR" in error.value.fix
    del error
    assert not maps_of(temporary)
    assert not list(temporary.iterdir())


def test_nothing_is_left_of_a_model_that_is_refused(tiny_llama: Path, tmp_path: Path, temporary: Path) -> None:
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with memory_of(0, tmp_path / "cache"), pytest.raises(ModelError, match="9 tensors are stored"):
        load_model(resolve(str(tmp_path)))
    assert not maps_of(temporary)
    assert not list(temporary.iterdir())


def test_disk_is_asked_for_weights_larger_than_memory(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(checks, "check_space", lambda needed: asked.append(needed[Path(tempfile.gettempdir())]))
    snapshot = resolve(str(tiny_llama))
    numbers = sum(weight.numel() for weight in load_model(snapshot).parameters())
    for room in (4 * numbers - 1, 8 * numbers - 1, 8 * numbers):
        with memory_of(room, tmp_path / "cache"):
            checks.check_files(snapshot, read_spec(snapshot), recipe_of(weights="int4"))
    assert asked[0] == asked[1] == asked[2] + 4 * numbers


def test_temporary_files_in_memory_are_refused(
    tiny_llama: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disks(**_: Any) -> list[SimpleNamespace]:
        return [SimpleNamespace(mountpoint=str(place), fstype=kind) for place, kind in kinds.items()]

    snapshot = resolve(str(tiny_llama))
    monkeypatch.setattr("psutil.disk_partitions", disks)
    kinds = {"/": "ext4", str(temporary): "tmpfs"}
    with memory_of(0, tmp_path / "cache"), pytest.raises(OutputError, match=r"lies in memory too \(tmpfs\)") as error:
        checks.check_files(snapshot, read_spec(snapshot), recipe_of())
    assert (error.value.where, "TMPDIR" in error.value.fix) == (str(temporary), True)
    with memory_of(LARGE, tmp_path / "cache"):
        checks.check_files(snapshot, read_spec(snapshot), recipe_of())
    kinds = {"/": "tmpfs", str(temporary): "ext4"}
    with memory_of(0, tmp_path / "cache"):
        checks.check_files(snapshot, read_spec(snapshot), recipe_of())
