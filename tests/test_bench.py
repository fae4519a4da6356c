"""`kvslim bench`: a grid of lengths, threads and batches, its files, and energy."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_artifact import fill
from support.tiny_chat import write_chat
from support.tiny_graph import write_tiny
from support.tiny_report import SPEC
from support.tiny_tokenizer import byte_tokenizer

from kvslim.caches.packed import PackedTensor
from kvslim.cli import app
from kvslim.cli.schemas import output_type
from kvslim.errors import UsageError
from kvslim.progress import Silent
from kvslim.report.bench import bench_csv, drafts_table, timings_table, uncertain_timings
from kvslim.runtime.session import DecodeSession
from kvslim.settings import LEAST_REPEATS
from kvslim.types import Draft, KVLayout
from kvslim.validation import bench, drafts, energy
from kvslim.validation.bench import BenchResult, Grid, Timing
from kvslim.validation.drafts import DraftGain
from kvslim.validation.latency import joules_per_token, time_models
from kvslim.validation.speculation import Pair

TITLE, FASTER = "first, second, ... right", "times the speed"
TOKENS = np.random.default_rng(0).integers(24, size=(3, 12))
Zones = Callable[..., Path]


@pytest.fixture
def artifacts(tmp_path: Path) -> list[Path]:
    """Two artifacts whose graphs run."""
    folders = [tmp_path / "plain", tmp_path / "slim"]
    for folder in folders:
        folder.mkdir()
        fill(folder)
        write_tiny(folder / "model.onnx", int8=folder.name == "slim")
    return folders


@pytest.fixture
def zones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Zones]:
    """Makes counters of energy as Linux shows them."""
    root = tmp_path / "powercap"
    monkeypatch.setattr(energy, "POWERCAP", root)

    def made(**counters: int) -> Path:
        for index, (name, value) in enumerate(counters.items()):
            zone = root / f"intel-rapl:{index}"
            zone.mkdir(parents=True, exist_ok=True)
            (zone / "name").write_text(f"{name.replace('_', '-')}\n")
            (zone / "max_energy_range_uj").write_text("1000000\n")
            (zone / "energy_uj").write_text(f"{value}\n")
        return root

    yield made
    energy.package_zones.cache_clear()


@pytest.mark.parametrize("variant", [{}, {"int8": True}, {"positions": 64}], ids=["fp32", "int8", "positions"])
def test_a_batch_gives_each_sequence_its_own_logits(tmp_path: Path, variant: dict[str, int]) -> None:
    path = write_tiny(tmp_path / "model.onnx", **variant)
    together = DecodeSession(path, capacity=16, batch=3)
    single = DecodeSession(path, capacity=16)
    prompt = together.step(TOKENS[:, :8])
    rest = np.concatenate([together.step(TOKENS[:, index : index + 1]) for index in range(8, 12)], axis=1)
    for row, tokens in enumerate(TOKENS):
        single.reset()
        np.testing.assert_allclose(prompt[row], single.step(tokens[:8]), atol=1e-5)
        np.testing.assert_allclose(rest[row], single.step(tokens[8:]), atol=1e-5)


def test_a_batch_takes_the_same_tokens_when_given_one_row(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.onnx")
    together, single = DecodeSession(path, capacity=16, batch=2), DecodeSession(path, capacity=16)
    np.testing.assert_allclose(together.prefill(TOKENS[0], chunk=5), single.prefill(TOKENS[0], chunk=5), atol=1e-5)


def test_a_batch_that_has_begun_refuses_several_tokens(tmp_path: Path) -> None:
    session = DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=16, batch=3)
    session.step(TOKENS[:, :4])
    with pytest.raises(UsageError, match="token by token"):
        session.step(TOKENS[:, 4:6])
    assert session.length == 4


def test_packed_codes_refuse_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = PackedTensor(layer=0, kind="key_codes", heads=2, dim=8, dtype="codes2", window=4, sinks=1)
    monkeypatch.setattr("kvslim.runtime.session.layout_of", lambda _: KVLayout(tensors=(tensor,)))
    monkeypatch.setattr(DecodeSession, "_vocab", lambda _: 24)
    with pytest.raises(UsageError, match="one sequence"):
        DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=16, batch=2)


def test_bench_writes_every_point_of_the_grid(
    artifacts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(bench, "peak_rss", lambda *arguments: asked.append(arguments) or 1.0)
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "markdown")}
    options = ["--context", "8,16", "--prompt", "4", "--threads", "1,2", "--batch", "1,2", "--repeats", "3", "--json"]
    written = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    assert app.run(["bench", *map(str, artifacts), *options, *written]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert output_type("bench").model_validate(printed)
    results = printed["artifacts"]
    assert list(results) == [str(folder) for folder in artifacts]
    points = [
        (metric, tokens, threads, batch)
        for threads in (1, 2)
        for batch in (1, 2)
        for metric, tokens in (("ttft_ms", 4), ("tpot_ms", 8), ("tpot_ms", 16))
    ]
    for result in results.values():
        timings = result["timings"]
        assert [(each["metric"], each["tokens"], each["threads"], each["batch"]) for each in timings] == points
        for each in timings:
            assert 0 < each["first_quartile_ms"] <= each["median_ms"] <= each["third_quartile_ms"]
            tokens = each["batch"] * (each["tokens"] if each["metric"] == "ttft_ms" else 1)
            assert each["tokens_per_second"] == pytest.approx(1000 * tokens / each["median_ms"])
            assert each["joules_per_token"] is None or each["joules_per_token"] >= 0
    assert {each["ratio"] for each in results[str(artifacts[0])]["timings"]} == {1.0}
    assert [arguments[1:] for arguments in asked] == 2 * [(16, 2, "decode", 2)]
    rows = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    assert len(rows) == 2 * len(points)
    assert float(rows[-1]["median_ms"]) == results[str(artifacts[1])]["timings"][-1]["median_ms"]
    assert files["markdown"].read_text().count("\n| Time per token") == 8


def test_bench_takes_turns_between_artifacts_at_each_point(
    artifacts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[int, str]] = []
    step = DecodeSession.step

    def recording(self: DecodeSession, tokens: np.ndarray) -> np.ndarray:
        order.append((self.batch, self.layout.tensors[0].dtype))
        return step(self, tokens)

    monkeypatch.setattr(DecodeSession, "step", recording)
    models = {folder.name: folder for folder in artifacts}
    for batch in (1, 2):
        time_models(models, (), (8,), 3, 1, batch)
    turns = 2 * ["int8", "float32", "float32", "int8"]
    assert [dtype for batch, dtype in order[::2] if batch == 1] == turns
    assert [dtype for batch, dtype in order[::2] if batch == 2] == turns


DRAFTED = Draft(kind="window", window=4, sinks=1)
BRIEF = ("--context", "24,128,160", "--prompt", "4", "--repeats", "3")


@pytest.fixture
def drafting(tmp_path: Path) -> Path:
    """An artifact with a draft."""
    return write_chat(tmp_path / "drafting", draft=DRAFTED)


def test_bench_writes_texts_with_and_without_a_draft(
    drafting: Path, artifacts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.md"
    options = [*BRIEF, "--threads", "1,2", "--markdown", str(path), "--json"]
    assert app.run(["bench", str(artifacts[0]), str(drafting), *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert output_type("bench").model_validate(printed)
    plain, drafted = printed["artifacts"].values()
    assert plain["drafts"] == []
    points = [(1, 128), (1, 160), (2, 128), (2, 160)]  # 24 are too few to write a text behind
    assert [(gain["threads"], gain["context"]) for gain in drafted["drafts"]] == points
    for gain in drafted["drafts"]:
        assert gain["kind"] == "window"
        assert gain["tokens"] == 4 * 64
        assert 1 <= gain["tokens_per_round"] <= 16
        assert all(0 <= share <= 1 for share in gain["acceptance"])
        assert gain["speed_ratio"] > 0
        assert min(gain["plain_tokens_per_second"], gain["tokens_per_second"]) > 0
    assert path.read_text().count("\n| Text up to a context of ") == 4


def test_draft_is_timed_on_a_text_that_is_given(
    drafting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, prompts = tmp_path / "text.txt", list[list[int]]()
    text.write_text("".join(chr(97 + place % 26) for place in range(200)))
    written = drafts.written_in_turns

    def recording(*arguments: Any) -> Iterator[Pair]:
        prompts.extend(arguments[3])
        return written(*arguments)

    monkeypatch.setattr(drafts, "written_in_turns", recording)
    assert app.run(["bench", str(drafting), *BRIEF, "--text", str(text), "--json"]) == 0
    ids = byte_tokenizer().encode(text.read_text()).ids
    assert prompts == [ids[at : at + size] for size in (64, 96) for at in np.linspace(0, 200 - size, 4).astype(int)]
    assert len(json.loads(capsys.readouterr().out)["artifacts"][str(drafting)]["drafts"]) == 2


@pytest.mark.parametrize(("own_runtime", "batch"), [(False, 8), (True, 1)])
def test_text_is_written_alone_where_a_cache_holds_one_sequence(
    drafting: Path, monkeypatch: pytest.MonkeyPatch, own_runtime: bool, batch: int
) -> None:
    monkeypatch.setattr(KVLayout, "needs_own_runtime", own_runtime)
    asked = list[int]()
    allocate = DecodeSession.allocate

    def recording(self: DecodeSession, rows: int) -> None:
        asked.append(rows)
        allocate(self, rows)

    monkeypatch.setattr(DecodeSession, "allocate", recording)
    found = drafts.bench_drafts(
        {"a": drafting, "b": drafting}, {"a": DRAFTED, "b": DRAFTED}, (128,), (1,), "self", Silent()
    )
    assert asked[1] == min(batch, 4)  # texts, behind a look at what one takes
    assert set(asked[2:]) == {1}  # they are written once for both
    assert found["a"][0].context == found["b"][0].context == 128


def test_long_prompts_are_beginnings_of_one_text() -> None:
    text = list(range(3000))
    assert drafts.prompts_before(text, 2000, 64) == [text[: 2000 - 64 * place] for place in (3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--text", "nowhere.txt"], "no text file"),
        (["--text", "short.txt"], "5 tokens, less than a context of 160"),
        (["--text", "short.txt", "--speculative", "none"], "no artifact has a draft"),
        (["--text", "short.txt", "--context", "24,127"], "timed from 128 tokens on"),
    ],
)
def test_text_of_drafts_is_refused_when_it_is_of_no_use(
    drafting: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    word: str,
) -> None:
    monkeypatch.chdir(drafting)
    Path("short.txt").write_text("hello")
    assert app.run(["bench", str(drafting), *BRIEF, *options]) in (2, 5)
    assert word in capsys.readouterr().err


def test_bench_leaves_drafts_out_when_told(drafting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["bench", str(drafting), *BRIEF, "--speculative", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["artifacts"][str(drafting)]["drafts"] == []


def test_table_of_drafts_shows_speeds_and_what_was_right() -> None:
    gain = DraftGain(
        context=2048,
        kind="lookup",
        threads=None,
        tokens=256,
        plain_tokens_per_second=20,
        tokens_per_second=25,
        speed_ratio=1.25,
        tokens_per_round=1.5,
        acceptance=(0.625, 0.5, 0.25, 0.125, 0.0625),
        uncertain="the machine was busy",
    )
    result = BenchResult(kv_bytes_per_token=8, file_mib=1, peak_rss_mib=2, timings=(), drafts=(gain,))
    table = drafts_table({"a": result, "b": result.model_copy(update={"drafts": ()})})
    assert table.header == ("text", "threads", "a, tokens/s", "draft", "with draft", FASTER, "tokens a run", TITLE)
    assert table.rows == (
        ("Text up to a context of 2048", "-", "20", "lookup", "25", "1.25", "1.50", "62%, 50%, 25%, 12%"),
    )
    (cells,) = csv.DictReader(io.StringIO(bench_csv({"a": result})))
    assert (cells["metric"], cells["tokens"], cells["batch"], cells["kind"]) == ("draft", "2048", "1", "lookup")
    assert (cells["acceptance"], cells["median_ms"]) == ("0.625 0.500 0.250 0.125 0.062", "")
    assert [float(cells[name]) for name in ("plain_tokens_per_second", "tokens_per_second")] == [20, 25]
    assert [float(cells[name]) for name in ("speed_ratio", "tokens_per_round", "peak_rss_mib")] == [1.25, 1.5, 2]
    assert uncertain_timings({"a": result}) == (
        "timings uncertain: the machine was busy (Text up to a context of 2048)",
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--threads", "0"], "--threads"),
        (["--threads", "1,"], "--threads"),
        (["--batch", "-1"], "--batch"),
        (["--csv", "nowhere/out.csv"], "--csv"),
        (["--markdown", "."], "--markdown"),
    ],
)
def test_bench_refuses_a_bad_option_before_it_times(
    artifacts: list[Path], capsys: pytest.CaptureFixture[str], options: list[str], word: str
) -> None:
    assert app.run(["bench", str(artifacts[0]), *options]) == 2
    assert word in capsys.readouterr().err


def test_energy_is_the_sum_of_packages_across_a_wrap(zones: Zones) -> None:
    zones(package_0=900_000, package_1=5, core=7, psys=3)
    before = energy.microjoules()
    assert before == (900_000, 5)
    zones(package_0=100_000, package_1=300_005)
    assert energy.joules_since(before) == pytest.approx(0.5)


def test_energy_is_absent_when_no_counter_can_be_read(zones: Zones) -> None:
    root = zones(package_0=1)
    (root / "intel-rapl:0" / "energy_uj").unlink()
    assert energy.microjoules() == ()
    assert math.isnan(energy.joules_since(()))
    assert joules_per_token(np.array([[1.0, math.nan]]), 4) is None


def test_energy_per_token_is_counted_over_the_timed_runs(zones: Zones, artifacts: list[Path]) -> None:
    counter = zones(package_0=0) / "intel-rapl:0" / "energy_uj"
    step, used = DecodeSession.step, iter(range(1000, 10**6, 1000))

    def spending(self: DecodeSession, tokens: np.ndarray, last: int | None = None) -> np.ndarray:
        counter.write_text(str(next(used)))
        return step(self, tokens, last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeSession, "step", spending)
        runs = time_models({"plain": artifacts[0]}, (4,), (8,), 4, 1, 2)
    assert joules_per_token(runs.tpot[8]["plain"], 2) == pytest.approx(0.001 / 2)
    assert joules_per_token(runs.ttft[4]["plain"], 8) == pytest.approx(0.001 / 8)


def test_table_and_csv_show_energy_only_where_it_was_measured() -> None:
    def result(joules: float | None) -> BenchResult:
        timing = Timing(
            metric="tpot_ms",
            tokens=8,
            threads=None,
            batch=1,
            median_ms=2,
            first_quartile_ms=1,
            third_quartile_ms=3,
            tokens_per_second=500,
            ratio=1,
            joules_per_token=joules,
            uncertain=None,
        )
        return BenchResult(kv_bytes_per_token=8, file_mib=1, peak_rss_mib=2, timings=(timing,))

    assert timings_table({"a": result(None)}).header == ("median (quartiles)", "threads", "batch", "a, ms", "tokens/s")
    table = timings_table({"a": result(0.25), "b": result(0.5)})
    assert table.rows == (
        (
            "Time per token, ms, context of 8",
            "-",
            "1",
            "2.00 (1.00 to 3.00)",
            "500",
            "0.25",
            "2.00 (1.00 to 3.00)",
            "500",
            "1.00",
            "0.5",
        ),
    )
    (row,) = csv.DictReader(io.StringIO(bench_csv({"a": result(None)})))
    assert (row["joules_per_token"], row["threads"], row["kv_bytes_per_token"]) == ("", "", "8.0")


def test_all_positions_mean_the_last_token_that_fits() -> None:
    specs = [SPEC, SPEC.model_copy(update={"max_context": 16384})]
    assert Grid(prompts=(128,), contexts=(512, 8192)).fitted(specs).contexts == (512, 8191)
    assert Grid(prompts=(128,), contexts=(8193,)).fitted(specs).contexts == (8193,)
    assert Grid().fitted([SPEC.model_copy(update={"max_context": 128})]).contexts == (127,)


def test_grid_and_command_ask_for_as_many_turns(capsys: pytest.CaptureFixture[str]) -> None:
    few = LEAST_REPEATS - 1
    with pytest.raises(ValueError, match="repeats"):
        Grid(repeats=few)
    assert app.run(["bench", "x", "--repeats", str(few)]) == 2
    assert f"equal to {LEAST_REPEATS}" in capsys.readouterr().err
