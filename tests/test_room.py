"""`--device`: what a device has room for is the budget and a gate, and what is reached there is told."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_encoders import save_encoder
from support.tiny_gguf import write_gguf

from kvslim.cli import app
from kvslim.cli.schemas import output_type
from kvslim.devices import peak
from kvslim.devices.demand import Cache, decode
from kvslim.devices.limits import bound, longest_context
from kvslim.devices.peak import BRANCH_BYTES, OPEN_BYTES, beside_cache, memory
from kvslim.devices.profile import Device, Quantity, Share, device_text, load_device
from kvslim.devices.room import Room, room_on
from kvslim.errors import GateError, UnsupportedError, UsageError
from kvslim.export.manifest import read_manifest
from kvslim.recipe import Recipe, load_recipe
from kvslim.settings import Budget
from kvslim.types import KVLayout

MIB = 2**20
CONTEXT = 2048
TINY = ["calibration.samples=4", "calibration.length=48", "validation.samples=2", "validation.length=48"]
TINY += ["validation.recall_items=2", "validation.recall_distance=16", "validation.repeats=3"]
TINY += ["validation.prompts=[16]", "validation.contexts=[32]", f"calibration.context={CONTEXT}"]
SETTINGS = [word for setting in (*TINY, "weights=fp32") for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def as_of_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers, one in float32 and the branches for prompts take more than integers save."""
    monkeypatch.setattr(peak, "FLOAT_ROWS", 0.5)
    monkeypatch.setattr(peak, "LAYER_BYTES", 0)


def device_of(mib: float, bandwidth: float = 17.0) -> Device:
    """A device with so much memory."""
    return load_device("raspberry-pi-5-8gb").model_copy(
        update={
            "name": "box",
            "ram_gib": Quantity(value=mib / 2**10, source="test"),
            "usable_share": Share(value=1, source="test"),
            "bandwidth_gb_s": Quantity(value=bandwidth, source="test"),
        }
    )


def recipe_at(context: int, weights: str = "fp32") -> Recipe:
    return load_recipe("balanced", [f"calibration.context={context}", f"weights={weights}"])


def beside_mib(model: Path, kind: str = "fp32", bits: int = 8, context: int = CONTEXT) -> float:
    """What a process holds beside a cache of so many bits."""
    room = room_on(device_of(10_000), str(model), recipe_at(context, kind))
    return beside_cache(room.weights, replace(room.plain, bits=bits), context) / MIB


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A device on which the tiny model's cache of 1 MiB has 0.15 MiB beside its weights."""
    return tmp_path / "box.yaml"


def written(profile: Path, device: Device) -> str:
    profile.write_text(device_text(device))
    return str(profile)


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_room_is_the_memory_that_weights_and_runtime_leave(tiny_llama: Path, kind: str) -> None:
    room = room_on(device_of(beside_mib(tiny_llama, kind) + 0.5), str(tiny_llama), recipe_at(CONTEXT, kind))
    assert room.cache_mib == pytest.approx(0.5, abs=0.01)
    assert room.context == CONTEXT
    integers = replace(room.plain, bits=8)
    held = longest_context(room.device, room.weights, integers, 10 * CONTEXT)
    assert memory(room.weights, integers, held) <= room.device.usable_bytes < memory(room.weights, integers, held + 1)


def test_a_plain_cache_that_fits_needs_no_room_for_rows_in_float32(tiny_llama: Path) -> None:
    plain = 512 * CONTEXT / MIB
    room = room_on(device_of(beside_mib(tiny_llama, bits=32) + plain + 0.1), str(tiny_llama), recipe_at(CONTEXT))
    assert room.cache_mib == pytest.approx(plain + 0.1, abs=0.01)
    rows = beside_mib(tiny_llama) - beside_mib(tiny_llama, bits=32)
    less = room_on(device_of(beside_mib(tiny_llama, bits=32) + plain - 0.1), str(tiny_llama), recipe_at(CONTEXT))
    assert less.cache_mib == pytest.approx(plain - 0.1 - rows, abs=0.01)


def test_room_for_int8_leaves_the_recipe_alone_and_less_is_a_budget(tiny_llama: Path) -> None:
    beside, plain = beside_mib(tiny_llama), 512 * CONTEXT / MIB
    ample = room_on(device_of(beside + plain / 3.9), str(tiny_llama), recipe_at(CONTEXT))
    asked = Budget(max_kl=0.02)
    assert (ample.budget(None), ample.budget(asked)) == (None, asked)
    small = room_on(device_of(beside + plain / 4.1), str(tiny_llama), recipe_at(CONTEXT))
    assert small.budget(None) == Budget(kv_mib=small.cache_mib, context=CONTEXT)
    assert small.budget(asked) == Budget(kv_mib=small.cache_mib, context=CONTEXT, max_kl=0.02)


def test_weights_of_no_format_in_particular_share_the_memory_with_the_cache(tiny_llama: Path) -> None:
    device = device_of(beside_mib(tiny_llama, "int4") + 0.1)
    room = room_on(device, str(tiny_llama), recipe_at(CONTEXT, "auto"))
    assert room.weights.name == "int4"
    assert room.cache_mib == pytest.approx(0.1, abs=0.01)
    decoding = room.cache_mib + (room.weights.decoding + OPEN_BYTES + 2 * BRANCH_BYTES) / MIB
    assert room.budget(None) == Budget(memory_mib=decoding, context=CONTEXT)
    ample = room_on(device_of(1000), str(tiny_llama), recipe_at(CONTEXT, "auto"))
    assert ample.budget(None) is None


def test_weights_that_fit_with_fewer_bits_alone_leave_the_split_to_measurement(tiny_llama: Path) -> None:
    device = device_of(beside_mib(tiny_llama, "int4", bits=32, context=8) - 0.001)
    with pytest.raises(GateError, match="weights in int4 take"):
        room_on(device, str(tiny_llama), recipe_at(8, "int4"))
    room = room_on(device, str(tiny_llama), recipe_at(8, "auto"))
    assert room.is_tight
    decoding = room.cache_mib + (room.weights.decoding + OPEN_BYTES + 2 * BRANCH_BYTES) / MIB
    assert room.budget(None) == Budget(memory_mib=decoding, context=8)


def test_blocks_of_a_file_take_the_bits_that_they_have(tiny_llama: Path, tmp_path: Path) -> None:
    bits = {"int4": 5.125, "int8": 8 + 40 / 128, "stored": 9}
    path = write_gguf(tiny_llama, tmp_path / "model.gguf", "Q8_0")
    rooms = [room_on(device_of(1000), str(path), recipe_at(CONTEXT, kind)) for kind in ("int4", "int8", "auto")]
    assert [room.weights.name for room in rooms] == list(bits)
    int4, int8, stored = (room.weights.stored for room in rooms)
    assert (stored - int4) / (int8 - int4) == pytest.approx(
        (9 - bits["int4"]) / (bits["int8"] - bits["int4"]), rel=1e-4
    )


def _speed(room: Room, *bits: int) -> float:
    layout = room.plain.layout if bits else KVLayout(tensors=())
    demand = decode(room.weights, Cache("", layout, room.plain.q_heads, *bits), room.context)
    return bound(room.device, demand).tokens_per_second


def test_speed_is_a_limit_of_time_where_the_plain_cache_is_too_slow(tiny_llama: Path) -> None:
    device, model, recipe = device_of(1000, bandwidth=0.01), str(tiny_llama), recipe_at(CONTEXT)
    plain = _speed(room_on(device, model, recipe), 32)
    assert room_on(device, model, recipe, plain * 0.99).budget(None) is None
    faster = room_on(device, model, recipe, plain * 2)
    assert faster.time_ratio == pytest.approx(0.5)
    assert faster.budget(None) == Budget(time_ratio=faster.time_ratio)
    assert faster.budget(Budget(time_ratio=0.3, max_kl=1)) == Budget(time_ratio=0.3, max_kl=1)
    assert faster.budget(Budget(time_ratio=0.8)) == Budget(time_ratio=faster.time_ratio)


def test_what_no_cache_can_reach_is_refused_with_the_most_that_one_can(tiny_llama: Path) -> None:
    device, model, recipe = device_of(1000, bandwidth=0.01), str(tiny_llama), recipe_at(CONTEXT)
    most = _speed(room_on(device, model, recipe))
    with pytest.raises(GateError, match="box decodes fewer than") as caught:
        room_on(device, model, recipe, most)
    assert caught.value.fix == f"ask for less than {most:.0f}, or for smaller --weights"
    assert room_on(device, model, recipe, most * 0.99).time_ratio is not None


def test_weights_that_do_not_fit_name_the_format_that_does(tiny_llama: Path) -> None:
    between = (beside_mib(tiny_llama) + beside_mib(tiny_llama, "int8")) / 2
    with pytest.raises(GateError, match="weights in fp32 take") as caught:
        room_on(device_of(between), str(tiny_llama), recipe_at(CONTEXT))
    assert "--weights int8" in caught.value.fix
    with pytest.raises(GateError) as caught:
        room_on(device_of(0.01), str(tiny_llama), recipe_at(CONTEXT))
    assert caught.value.fix == "take a smaller model"


def test_encoder_has_no_cache_to_fit(tmp_path: Path) -> None:
    model = save_encoder("bert", "fill-mask", tmp_path / "model")
    with pytest.raises(UnsupportedError, match="no KV cache"):
        room_on(device_of(1000), str(model), load_recipe("encoder"))


def test_compress_keeps_to_a_device_and_tells_what_is_reached(
    tiny_llama: Path, tmp_path: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = 0.15
    name = written(profile, device_of(beside_mib(tiny_llama) + room))
    out = str(tmp_path / "out")
    command = ["compress", str(tiny_llama), "-o", out, "--device", name, "--gate", "max_kl=9", *SETTINGS]
    assert app.run(command) == 0
    captured = capsys.readouterr()
    manifest = read_manifest(tmp_path / "out")
    assert manifest.report is not None
    gates = {gate.name: gate for gate in manifest.report.gates}
    assert gates["max_kv_mib"].limit == pytest.approx(room, abs=0.01)
    assert gates["max_kv_mib"].value == manifest.kv_layout.bytes_at(CONTEXT) / MIB <= gates["max_kv_mib"].limit
    assert manifest.context == CONTEXT
    told = r"2,048 tokens on box \(0\.0831 GiB\): plain does not fit \(86 MiB\); this one 85 MiB, up to \S+ tokens/s; "
    assert re.search(told + r"longest context 2,048 tokens \(positions\)\n", captured.err), captured.err
    assert app.run(["plan", str(tiny_llama), "--device", name, "--json", *SETTINGS]) == 0
    told = json.loads(capsys.readouterr().out)
    assert output_type("plan").model_validate(told)
    plain, own = told["devices"]
    assert (plain["cache"], own["cache"]) == ("plain", "planned")
    assert plain["longest_context"] < CONTEXT <= own["longest_context"]


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--device", "laptop-8gb", "--kv-ratio", "8"], "--device"),
        (["--device", "laptop-8gb", "--kv-mib-at", "1k=8"], "--device"),
        (["--device", "laptop-8gb", "--memory-mib", "1k=200"], "--device"),
        (["--tokens-per-second", "5"], "--tokens-per-second"),
        (["--device", "laptop-8"], "--device"),
    ],
)
def test_device_is_refused_where_it_says_nothing_or_something_else(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], options: list[str], where: str
) -> None:
    assert app.run(["plan", str(tiny_llama), *options]) == UsageError.exit_code
    assert f"where: {where}\n" in capsys.readouterr().err
