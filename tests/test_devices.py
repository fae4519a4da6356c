"""Profiles of devices, the bounds they set, and the measurement that makes one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.models import export_slim, open_prepared, recipe_of
from support.paths import ROOT
from support.tiny_artifact import SPEC

from kvslim.caches import FullCache, PackedCache, WindowCache
from kvslim.cli import app
from kvslim.contract import MIB
from kvslim.devices import kernel_timing, measure, timing
from kvslim.devices.demand import Cache, Demand, StoredWeights, decode, prefill, training
from kvslim.devices.limits import bound, limits, longest_context
from kvslim.devices.peak import CHUNK, LAYER_BYTES, OPEN_BYTES, memory
from kvslim.devices.profile import Device, Quantity, Share, device_text, load_device, shipped_devices
from kvslim.devices.stored_weights import artifact_weights
from kvslim.errors import NotFoundError, UsageError
from kvslim.loading.parameters import Parameters
from kvslim.methods import KvQuant, Method
from kvslim.types import KVLayout, LayerPlan, Plan
from kvslim.validation.measure import file_mib
from kvslim.weight_format import Weights

NAMES = {
    "jetson-orin-nano-8gb",
    "laptop-16gb",
    "laptop-8gb",
    "phone-8gb",
    "raspberry-pi-4-4gb",
    "raspberry-pi-5-4gb",
    "raspberry-pi-5-8gb",
}
# In tiny numbers: 10 GB/s, 100 GFLOP/s.
DEVICE = Device(
    name="test",
    ram_gib=Quantity(value=1, source="test"),
    usable_share=Share(value=0.5, source="test"),
    bandwidth_gb_s=Quantity(value=10, source="test"),
    gflops=Quantity(value=100, source="test"),
)
WEIGHTS = StoredWeights("fp32", stored=5_000, resident=6_000, tables=0, read=4_000, products=900, head=100, width=50)
NOTHING = StoredWeights("none", stored=0, resident=0, tables=0, read=0, products=0, head=0, width=0)
PLAIN = Cache.of("plain", SPEC, Plan.identity(SPEC))
OPEN = OPEN_BYTES + 2 * LAYER_BYTES
TOKEN = 2 * 2 * 2 * 16 * 4  # layers x sides x kv heads x head_dim x 4
READ = 2 * 2 * 4 * 16 * 4  # layers x sides x query heads x head_dim x 4
ATTENTION = 2 * 4 * 16 * 4  # layers x query heads x head_dim x (2 for scores + 2 for values)


def test_every_shipped_profile_is_whole() -> None:
    devices = {name: load_device(name) for name in shipped_devices()}
    assert set(devices) == NAMES
    assert len({device.name for device in devices.values()}) == len(NAMES)
    assert all(device.usable_bytes < device.ram_gib.value * 2**30 for device in devices.values())


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(device_text(DEVICE))
    assert load_device(str(path)) == DEVICE


def test_an_unknown_device_is_a_usage_error_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["inspect", "demo", "--device", "raspbery-pi-5-8g"]) == 2
    assert "did you mean 'raspberry-pi-5-8gb'?" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "fix"), [("nowhere.yaml", "doctor --measure"), ("laptop-8gb.yaml", "laptop-8gb")])
def test_a_missing_device_file_is_not_found(name: str, fix: str) -> None:
    with pytest.raises(NotFoundError, match="no such device file") as error:
        load_device(name)
    assert fix in error.value.fix


def test_a_device_named_twice_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    once = ["inspect", "demo", "--json", "--device", "laptop-8gb"]
    assert app.run(once) == 0
    told = capsys.readouterr().out
    assert app.run([*once, "--device", "laptop-8gb"]) == 0
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bandwidth_gb_s": None}, "bandwidth_gb_s"),
        ({"bandwidth_gb_s": 17}, "bandwidth_gb_s"),
        ({"gflops": {"value": 10}}, "gflops.source"),
        ({"gflops": {"value": 10, "source": ""}}, "gflops.source"),
        ({"gflops": {"value": 0, "source": "x"}}, "gflops.value"),
        ({"ram_gib": {"value": -8, "source": "x"}}, "ram_gib.value"),
        ({"ram_gib": {"value": float("inf"), "source": "x"}}, "ram_gib.value"),
        ({"ram_gib": {"value": 1e308, "source": "x"}}, "ram_gib.value"),
        ({"gflops": {"value": 1e-320, "source": "x"}}, "gflops.value"),
        ({"usable_share": {"value": 1.1, "source": "x"}}, "usable_share.value"),
        ({"cores": 4}, "cores"),
    ],
)
def test_a_bad_device_file_names_the_key(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**DEVICE.model_dump(), **change}))
    with pytest.raises(UsageError, match=word) as error:
        load_device(str(path))
    assert error.value.where == str(path)


@pytest.mark.parametrize("text", ["name: [", "- 1", "\x00"])
def test_a_device_file_that_is_no_mapping_is_a_usage_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError):
        load_device(str(path))


def test_decode_reads_weights_once_and_the_cache_for_each_query_head() -> None:
    demand = decode(WEIGHTS, PLAIN, 300)
    assert demand.bytes_per_token == 4_000 + 300 * READ
    assert demand.flops_per_token == 2 * (900 + 100) + 300 * ATTENTION
    assert demand.memory_bytes == pytest.approx(6_000 + 300 * TOKEN + OPEN + 2.4 * 4 * 50 * 300, abs=1)


def test_memory_grows_by_activations_up_to_a_chunk_and_by_the_cache_beyond() -> None:
    short, whole, long = (memory(WEIGHTS, PLAIN, tokens) for tokens in (CHUNK - 100, CHUNK, CHUNK + 100))
    assert whole - short == pytest.approx(100 * (TOKEN + 2.4 * 4 * 50), abs=1)
    assert long - whole == 100 * TOKEN


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_a_prompt_over_integers_holds_the_rows_of_one_layer_in_float32(stored: str) -> None:
    row = TOKEN / 2
    found = memory(WEIGHTS, in_integers(stored), 2000) - memory(WEIGHTS, PLAIN, 2000)
    integers = 2000 * TOKEN * (1 if stored == "int8" else 0.5) / 4
    assert found == pytest.approx(2 * LAYER_BYTES + 2.5 * row * 2000 + integers - 2000 * TOKEN, abs=2)
    ringed = memory(WEIGHTS, in_integers(stored, 64), 2000) - memory(WEIGHTS, in_integers(stored, 64), 1000)
    assert ringed == 0


def test_a_prompt_over_packed_codes_holds_scores_too() -> None:
    codes = PackedCache(rank=8, bits=2, window=16, sinks=4)
    packed = Cache.of("packed", SPEC, Plan(layers=tuple(LayerPlan(layer=at, cache=codes) for at in range(2))))
    found = (
        memory(WEIGHTS, packed, 2000) - memory(WEIGHTS, packed, 1000) - (packed.bytes_at(2000) - packed.bytes_at(1000))
    )
    assert found == pytest.approx(1000 * (2.5 * 2 * 2 * 8 * 4 + 64 * 4 * 4), rel=0.02)


def test_weights_in_memory_have_sums_for_zero_points_and_a_tied_table_twice() -> None:
    counts = {"products": 3200, "head": 640, "positions": 0, "others": 10, "width": 1}
    tied, apart = (StoredWeights.of(Parameters(**counts, embedding=size), "int4") for size in (0, 640))
    packed = (3200 + 640) // 32 * (16 + 4 + 4) + 10 * 4
    assert tied.resident == apart.resident == packed + 640 // 32 * 20.5
    assert tied.decoding == apart.decoding == packed
    assert StoredWeights.of(Parameters(**counts, embedding=640), "fp32").resident == 4 * (3200 + 2 * 640 + 10)


@pytest.mark.parametrize(("methods", "weights"), [((), "fp32"), ((KvQuant(),), "int4")])
def test_peak_of_a_process_is_what_is_predicted(
    tiny_llama: Path, tmp_path: Path, methods: tuple[Method, ...], weights: Weights
) -> None:
    prepared = open_prepared(tiny_llama, recipe_of(methods, weights))
    plan = export_slim(prepared, tmp_path / "slim")
    stored = artifact_weights(tmp_path / "slim", prepared.spec, "", int(file_mib(tmp_path / "slim") * MIB))
    predicted = memory(stored, Cache.of("", prepared.spec, plan), 512) / MIB
    command = [sys.executable, "-m", "benchmarks.memory.answer", "ours", str(tmp_path / "slim"), "512"]
    peak = float(subprocess.check_output(command, cwd=ROOT, text=True))
    assert peak == pytest.approx(predicted, rel=0.2)


def test_prefill_reads_the_weights_once_a_chunk_and_attends_to_all_before() -> None:
    context = 2 * CHUNK + 100
    demand = prefill(WEIGHTS, PLAIN, context)
    moved = 3 * 4_000 + READ * (CHUNK + 2 * CHUNK + context)
    flops = 2 * (900 * context + 100 * 3) + ATTENTION * context * (context + 1) / 2
    assert demand.bytes_per_token * context == pytest.approx(moved)
    assert demand.flops_per_token * context == pytest.approx(flops)


def test_training_holds_four_numbers_a_parameter_and_takes_three_passes() -> None:
    parameters = Parameters(products=900, head=100, embedding=0, positions=0, others=50, width=0)
    demand = training(SPEC, parameters, PLAIN, 200)
    kept = 4 * 200 * (16 * 64 * 2 + 257)
    assert demand.memory_bytes == 16 * 1050 + kept
    assert demand.bytes_per_token * 200 == pytest.approx(40 * 1050 + 2 * kept)
    assert demand.flops_per_token * 200 == pytest.approx(3 * (2 * 1000 * 200 + ATTENTION * 200 * 201 / 2))


def test_a_window_is_read_no_further_than_it_reaches() -> None:
    layers = (
        LayerPlan(layer=0, cache=WindowCache(window=32, sinks=4)),
        LayerPlan(layer=1, heads=(0, 1), cache=FullCache(stored="int8")),
    )
    cache = Cache.of("slim", SPEC, Plan(layers=layers))
    ring, rest = 2 * 4 * 16 * 4, 2 * 2 * 16
    assert cache.read_at(10) == 10 * ring + 10 * rest
    assert cache.read_at(100) == 36 * ring + 100 * rest
    assert cache.flops_at(100) == 4 * 16 * (4 * 36 + 2 * 100)


def in_integers(stored: str, window: int | None = None) -> Cache:
    """A cache of integers in all layers, each with a sliding window of the model or none."""
    layers = tuple(LayerPlan(layer=layer, cache=FullCache(stored=stored)) for layer in range(SPEC.layers))
    spec = SPEC.model_copy(update={"windows": (window,) * SPEC.layers})
    return Cache.of(stored, spec, Plan(layers=layers))


@pytest.mark.parametrize(("stored", "ratio"), [("int8", 0.59), ("int4", 0.67)])
def test_decoding_over_integers_takes_the_measured_share_of_float32(stored: str, ratio: float) -> None:
    demand = decode(WEIGHTS, in_integers(stored), 300)
    assert demand.timed_bytes_per_token == pytest.approx(4_000 + ratio * 300 * READ)
    assert demand.timed_flops_per_token == demand.flops_per_token
    assert demand.bytes_per_token < demand.timed_bytes_per_token < decode(WEIGHTS, PLAIN, 300).bytes_per_token


@pytest.mark.parametrize(("gflops", "binds"), [(10_000, "bandwidth"), (1, "compute")])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(("stored", "ratio"), [("int8", 1.04), ("int4", 1.04)])
def test_a_prompt_over_integers_is_slower_by_what_was_measured(
    stored: str, window: int | None, ratio: float, gflops: float, binds: str
) -> None:
    device = DEVICE.model_copy(update={"gflops": Quantity(value=gflops, source="test")})
    plain = Cache.of("plain", SPEC.model_copy(update={"windows": (window,) * SPEC.layers}), Plan.identity(SPEC))
    before, after = (bound(device, prefill(NOTHING, cache, 2000)) for cache in (plain, in_integers(stored, window)))
    assert (before.binds, after.binds) == (binds, binds)
    assert after.seconds_per_token == pytest.approx(ratio * before.seconds_per_token)


def test_no_prompt_is_expected_to_be_faster_than_over_the_plain_cache() -> None:
    rings = Plan(layers=tuple(LayerPlan(layer=layer, cache=WindowCache(window=32, sinks=4)) for layer in range(2)))
    plain, ringed = limits(DEVICE, NOTHING, (PLAIN, Cache.of("rings", SPEC, rings)), 4096, (2000,))
    speeds = [{each.demand.stage: each.tokens_per_second for each in found.stages} for found in (plain, ringed)]
    assert speeds[0]["prefill"] == speeds[1]["prefill"]
    assert speeds[0]["decode"] < speeds[1]["decode"]


def test_packed_codes_take_longer_than_float32_and_their_ring_as_long() -> None:
    cache = PackedCache(rank=8, bits=2, window=16, sinks=4)
    packed = Cache.of("packed", SPEC, Plan(layers=tuple(LayerPlan(layer=at, cache=cache) for at in range(2))))
    ring = 2 * 2 * 4 * 8 * 4 * 20  # layers x sides x query heads x rank x 4 bytes x rows
    codes = 2 * 2 * 4 * 8 * 4 * 300
    assert packed.timed_read_at(300, "decode") == pytest.approx(ring + 2.2 * codes, rel=0.1)
    assert packed.timed_read_at(300, "decode") > packed.read_at(300)


@pytest.mark.parametrize(
    ("moved", "flops", "memory", "seconds", "binds"),
    [
        (2e9, 1e9, 1, 0.2, "bandwidth"),
        (1e9, 3e10, 1, 0.3, "compute"),
        (2e9, 1e9, 2**29 + 1, 0.2, "memory"),
    ],
)
def test_the_slower_resource_binds(moved: float, flops: float, memory: int, seconds: float, binds: str) -> None:
    counts = {"bytes_per_token": moved, "flops_per_token": flops}
    timed = {f"timed_{name}": value for name, value in counts.items()}
    demand = Demand(stage="decode", context=1, memory_bytes=memory, **counts, **timed)
    found = bound(DEVICE, demand)
    assert (found.seconds_per_token, found.binds) == (pytest.approx(seconds), binds)
    assert found.tokens_per_second == pytest.approx(1 / seconds)


def test_longest_context_is_the_last_that_fits() -> None:
    fits = int(DEVICE.usable_bytes - OPEN - 6_000 - 2.4 * 4 * 50 * CHUNK) // TOKEN
    assert longest_context(DEVICE, WEIGHTS, PLAIN, 10**9) == fits
    assert longest_context(DEVICE, WEIGHTS, PLAIN, 512) == 512
    huge = StoredWeights("fp32", stored=2**40, resident=2**40, tables=0, read=2**40, products=2**38, head=0, width=1)
    assert longest_context(DEVICE, huge, PLAIN, 512) == 0


PACKED = Plan(
    layers=tuple(LayerPlan(layer=layer, cache=PackedCache(rank=8, bits=2, window=16)) for layer in range(SPEC.layers))
)
KERNELS = {
    "fp32 product": 0.001,
    "fp32 matrix": 1e-5,
    "float32 attention": 0.002,
    "layer": 1e-4,
    "int8 attention": 0.004,
}
TIMED = DEVICE.model_copy(
    update={"kernels": {name: Quantity(value=value, source="test") for name, value in KERNELS.items()}}
)


def test_timed_kernels_forecast_a_token_and_leave_a_prompt_to_its_bound() -> None:
    """By hand: two layers of four matrices each; keys and values of four query heads of 16 numbers."""
    weights = replace(WEIGHTS, kinds={"fp32": 1_000})
    token = decode(weights, PLAIN, 100)
    seconds = 1_000 / 1e6 + 2 * 4 / 1e4 + 2 * 2 * 4 * 16 * 100 / 2e6 + 2 / 1e5
    found = bound(TIMED, token)
    assert (found.is_forecast, found.seconds_per_token) == (True, pytest.approx(seconds))
    assert not bound(DEVICE, token).is_forecast
    prompt = prefill(weights, PLAIN, 100)
    assert bound(TIMED, prompt) == bound(DEVICE, prompt)


@pytest.mark.parametrize("other", [in_integers("int4"), Cache.of("packed", SPEC, PACKED)])
def test_what_was_not_timed_has_its_bound(other: Cache) -> None:
    weights = replace(WEIGHTS, kinds={"fp32": 1_000})
    assert bound(TIMED, decode(weights, other, 100)) == bound(DEVICE, decode(weights, other, 100))


def test_limits_tell_what_ends_the_context() -> None:
    slim = Cache("nothing", KVLayout(tensors=()), ())
    long, short = limits(DEVICE, WEIGHTS, [PLAIN, slim], 10**7, [64])
    assert (long.longest_by, short.longest_by, short.longest_context) == ("memory", "positions", 10**7)
    assert [entry.demand.stage for entry in long.stages] == ["prefill", "decode"]


def test_measured_profile_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "PART_BYTES", 2**22)
    monkeypatch.setattr(measure, "SIDE", 64)
    for name, small in {"SIDES": (32, 64), "CONTEXT": 64, "LAYERS": 2}.items():
        monkeypatch.setattr(kernel_timing, name, small)
    monkeypatch.setattr(timing, "REPEATS", 2)
    path = tmp_path / "this.yaml"
    assert app.run(["doctor", "--measure", str(path), "--json"]) in {0, 4}  # 4: the disk here is full, say
    device = load_device(str(path))
    assert json.loads(capsys.readouterr().out)["device"] == device.model_dump(mode="json")
    assert 0.1 < device.bandwidth_gb_s.value < 10_000
    assert 0.01 < device.gflops.value < 100_000
    kinds, caches = ("fp32", "int8", "int4"), ("float32", "int8", "int4")
    timed = {f"{kind} {what}" for kind in kinds for what in ("product", "matrix")}
    assert device.kernels.keys() == timed | {f"{cache} attention" for cache in caches} | {"layer"}


@pytest.mark.parametrize(("name", "code"), [("this.txt", 2), ("nowhere/this.yaml", 2)])
def test_measure_refuses_a_file_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    monkeypatch.setattr(measure, "measure_device", lambda: pytest.fail("measured"))
    assert app.run(["doctor", "--measure", str(tmp_path / name)]) == code
    assert "--measure" in capsys.readouterr().err
