"""The report's page and its parts, without a browser: words, numbers, scales."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from support.tiny_report import PLAIN, PLAN, SPEC, manifest

from kvslim.caches import FullCache, SharedCache, WindowCache
from kvslim.measures import GateResult, Measures, SampleAnswer, Speculation
from kvslim.recipe import load_recipe
from kvslim.report.advice import expected_gates, likely_fix, nearest_budget, passing_budget
from kvslim.report.answers import compared_answer
from kvslim.report.chart import LEFT, RIGHT, Axis, Rule, Series, chart
from kvslim.report.decisions import decisions
from kvslim.report.figures import figures
from kvslim.report.junit import junit_xml
from kvslim.report.layer_map import layer_map
from kvslim.report.page import artifact_page
from kvslim.report.tiles import tiles
from kvslim.settings import Gates
from kvslim.types import Draft, KVLayout, LayerPlan, Manifest, Plan, PlanPoint

TOKENS, MILLISECONDS = Axis("tokens", base=2), Axis("ms")


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("text")]


def circles(svg: str) -> list[tuple[float, float]]:
    nodes = ElementTree.fromstring(svg).iter("circle")
    return [(float(node.get("cx", "")), float(node.get("cy", ""))) for node in nodes]


def test_page_needs_nothing_from_elsewhere_and_no_script() -> None:
    html = artifact_page(manifest())
    assert not re.search(r"<script|<link|<img|@import|url\(|https?:|src=", html)
    assert "default-src 'none'" in html
    assert '<meta name="viewport"' in html


def test_page_has_the_same_bytes_when_made_again() -> None:
    assert artifact_page(manifest()) == artifact_page(manifest())


def test_page_tells_decisions_with_reasons_and_escapes_them() -> None:
    html = artifact_page(manifest())
    assert "rank 8 of 16; &lt;int8&gt; &amp; more" in html
    assert "<int8>" not in html
    assert "attention removed" in html


def test_page_tells_what_the_draft_is_and_gains() -> None:
    made = manifest()
    assert "<h2>Draft</h2>" not in artifact_page(made)
    assert made.report is not None
    found = Speculation(
        kind="window",
        context=900,
        tokens=256,
        differing=0,
        checked=311,
        tokens_per_round=2.345,
        acceptance=(0.876, 0.5),
        speed_ratio=1.234,
    )
    report = made.report.model_copy(update={"speculation": found})
    html = artifact_page(made.model_copy(update={"draft": Draft(kind="window"), "report": report}))
    _, _, shown = html.partition("<h2>Draft</h2>")
    for told in ("4 sinks and 256 recent tokens", "2.35", "88%, 50%", "1.23", "0, 311", "256 behind 900"):
        assert told in shown
    wrong = report.model_copy(update={"passed": False, "speculation": found.model_copy(update={"differing": 2})})
    failed = artifact_page(made.model_copy(update={"draft": Draft(kind="window"), "report": wrong}))
    assert "2 texts are not those that the model writes without it" in failed.partition("<h2>Draft</h2>")[0]
    (suite,) = ElementTree.fromstring(junit_xml(wrong, "demo"))
    assert (suite.get("failures"), [case.get("name") for case in suite if len(case.findall("failure"))]) == (
        "1",
        ["draft_differing"],
    )


def test_page_tells_the_verdict() -> None:
    assert "all gates hold" in artifact_page(manifest())
    assert "An eighth of the bytes." in artifact_page(manifest())


def test_failed_gate_takes_the_place_of_the_recipes_promise() -> None:
    failed = artifact_page(manifest(limit=0.001))
    assert "A gate failed" in failed
    assert "max_kl: mean KL to plain is 0.004, at most 0.001 was asked for" in failed
    assert "all gates hold" not in failed
    assert "An eighth of the bytes." not in failed.partition("Made from")[0]
    assert '<td class="bad">FAILED</td>' in failed
    advised = manifest(kl=0.05, limit=0.02)
    assert f"Expected to pass: kvslim compress with {passing_budget(advised)}." in artifact_page(advised)


def test_page_says_that_timings_are_uncertain() -> None:
    assert '<p class="warning">timings uncertain: the machine was busy</p>' in artifact_page(manifest(busy=True))
    assert "uncertain" not in artifact_page(manifest())


def test_tiles_stand_beside_what_people_have() -> None:
    found = {tile.label: tile for tile in tiles(manifest())}
    cache = found["KV cache at 4,096 tokens"]
    assert cache.value == "1.74 MiB"
    assert cache.beside == "5.7x smaller than fp32, 2.9x than fp16, 1.5x than q8_0 (10 MiB in fp32, 5 MiB in fp16)"
    speed = found["at a context of 8,192 tokens"]
    assert (speed.value, speed.beside) == ("200 tokens/s", "plain 83.3; 0.42 of its time per token")
    first = found["to the first token of a prompt of 512 tokens"]
    assert (first.value, first.beside) == ("90 ms", "plain 90 ms; 1.00 of its time")
    assert found["recall of facts in the prompt"].beside == "plain 98.0%"
    assert found["mean KL to plain, nats per token"].value == "0.004"


def test_decisions_say_once_what_layers_share() -> None:
    layers = tuple(
        LayerPlan(layer=index, cache=FullCache(stored="int4", rank=8 if index == 2 else 16), refit=True)
        for index in range(5)
    )
    found = decisions(SPEC, Plan(layers=layers))
    assert found.shared == (
        "In all layers, cache: 4-bit integers; tokens kept: all; query heads: all; output projection: fitted again."
    )
    assert found.differing.header == ("layers", "dimensions per head")
    assert found.differing.rows == (("0-1, 3-4", "all 16"), ("2", "8 of 16"))


def test_decisions_need_no_table_when_layers_are_alike() -> None:
    plan = Plan(layers=tuple(LayerPlan(layer=index, cache=FullCache(stored="int8")) for index in range(5)))
    assert decisions(SPEC, plan).differing.rows == ()
    assert "cache: 8-bit integers" in decisions(SPEC, plan).shared


def test_decisions_tell_removed_windowed_packed_and_shared_layers_apart() -> None:
    plan = Plan(layers=(*PLAN.layers[2:], LayerPlan(layer=5, cache=SharedCache(source=2)), *_windowed(6)))
    found = decisions(SPEC.model_copy(update={"layers": 5, "windows": (None,) * 7}), plan)
    rows = {row[0]: dict(zip(found.differing.header, row, strict=True)) for row in found.differing.rows}
    assert rows["2"]["query heads"] == "4 of 8"
    assert rows["3"]["cache"] == "none, attention is removed"
    assert rows["4"]["tokens kept"] == "all, the first 4 and the last 256 exact"
    assert rows["4"]["cache"] == "2-bit codes"
    assert rows["5"]["cache"] == "that of layer 2"
    assert rows["6"]["tokens kept"] == "the first 2 and the last 64"
    assert rows["6"]["dimensions stored finer"] == "keys 8, values 4"


def _windowed(layer: int) -> tuple[LayerPlan, ...]:
    cache = WindowCache(window=64, sinks=2, stored="int4", residual=8, value_residual=4)
    return (LayerPlan(layer=layer, cache=cache),)


def test_answers_mark_the_words_that_differ() -> None:
    sample = SampleAnswer(prompt="p", plain=" a red lamp and", artifact=" a blue lamp and more")
    answer = compared_answer(sample)
    assert [piece.text for piece in answer.plain if piece.differs] == ["red"]
    assert [piece.text for piece in answer.artifact if piece.differs] == ["blue", "more"]
    assert "".join(piece.text for piece in answer.artifact) == "a blue lamp and more"
    assert compared_answer(sample.model_copy(update={"artifact": sample.plain})).same


def test_page_puts_answers_side_by_side_and_escapes_them() -> None:
    html = artifact_page(manifest())
    assert "<mark>&lt;queen&gt;.</mark>" in html
    assert "artifact, the same" in html
    assert "1 of 2 answers is the same to the word." in html


def test_page_leaves_out_what_was_not_measured() -> None:
    bare = manifest().model_copy(update={"report": None, "passed": None, "frontier": ()})
    html = artifact_page(bare)
    assert re.findall(r'<figure class="(\w+)"', html) == ["layers"]
    assert "Sample answers" not in html
    assert "Before and after" not in html
    assert "verdict" not in html.partition("</style>")[2]


def test_page_shows_a_gate_that_nothing_meets() -> None:
    assert "gate 0<" in artifact_page(manifest(limit=0))


def test_page_of_an_encoder_shows_latency_and_no_cache() -> None:
    spec, decoder = SPEC.model_copy(update={"task": "feature-extraction"}), manifest()
    assert decoder.report is not None
    measures = Measures(file_mib=10, embedding_cosine_mean=0.999, latency_ms={"32": 2.0, "128": 6.0})
    report = decoder.report.model_copy(update={"plain": measures, "artifact": measures, "ratio": Measures(file_mib=1)})
    update = {
        "spec": spec,
        "plan": Plan.identity(spec),
        "kv_layout": KVLayout(tensors=()),
        "frontier": (),
        "report": report,
    }
    html = artifact_page(decoder.model_copy(update=update))
    assert re.findall(r'<figure class="(\w+)"', html) == ["latency"]
    assert "0.9990" in html
    assert "Decisions" not in html


def test_chart_puts_points_where_their_values_are() -> None:
    series = Series("a", ((128.0, 0.0), (256.0, 5.0), (512.0, 10.0)), "s0")
    first, middle, last = circles(chart("t", TOKENS, MILLISECONDS, [series]))
    assert (first[0], last[0]) == (LEFT, RIGHT)
    assert middle == ((LEFT + RIGHT) / 2, (first[1] + last[1]) / 2)
    assert last[1] < first[1]


@pytest.mark.parametrize("value", [1e-7, 0.02, 1.0, 768.0, 3e6])
@pytest.mark.parametrize("base", [2, 10, None])
def test_chart_holds_every_value_between_its_ticks(value: float, base: int | None) -> None:
    svg = chart("t", Axis("x", base=base), MILLISECONDS, [Series("a", ((value, value), (value * 3, value)), "s0")])
    assert all(LEFT <= across <= RIGHT for across, _ in circles(svg))
    assert 4 <= len(texts(svg)) <= 16


def test_chart_keeps_labels_of_rules_apart() -> None:
    rules = [Rule("y", value, f"{value} GiB") for value in (2.0, 10.0, 10.1, 10.2)]
    svg = chart("t", TOKENS, Axis("y"), [Series("a", ((1.0, 1.0), (2.0, 5.0)), "s0")], rules)
    lefts = [float(x) for x in re.findall(r'class="rule-label" x="([\d.]+)"', svg)]
    assert lefts[0] == lefts[1]
    assert min(after - before for before, after in pairwise(lefts[1:])) > 50


def test_memory_is_weights_and_cache_with_how_far_each_gets_on_a_device() -> None:
    limits = [("tiny", 0.05), ("board", 0.11), ("laptop", 1.0)]
    (memory,) = (figure for figure in figures({"a": manifest()}, limits) if figure.name == "memory")
    fp32 = (0.11 * 1024 - 100) * 2**20 / 2560
    assert [text for style, text in memory.legend if style == "rule"] == [
        "0.05 GiB, tiny: plain, fp32 does not fit, in fp16 does not fit, a does not fit",
        f"0.11 GiB, board: plain, fp32 to {fp32:,.0f}, in fp16 all, a all",
    ]
    assert {"0.05 GiB", "0.11 GiB", "0", "2k", "8k"} <= set(texts(memory.svg))
    plain, half, artifact = re.findall(r'class="line [^"]*" d="M([^"]*)"', memory.svg)
    ends = [float(path.rpartition(" ")[2]) for path in (plain, half, artifact)]
    assert ends[0] < ends[1] < ends[2]  # higher in the picture: more memory
    assert KVLayout.of(SPEC, Plan.identity(SPEC)).bytes_at(8192) == 8192 * (PLAIN.kv_bytes_per_token or 0)


def test_memory_names_the_smallest_device_when_all_are_large() -> None:
    (memory,) = (figure for figure in figures({"a": manifest()}, [("board", 2.0)]) if figure.name == "memory")
    assert "the smallest, board, has 2 GiB" in memory.caption
    assert not [text for style, text in memory.legend if style == "rule"]


def test_frontier_marks_the_artifact_among_other_sizes_and_other_tools() -> None:
    (frontier,) = (figure for figure in figures({"a": manifest()}) if figure.name == "kl")
    assert {"this artifact", "int8", "int4", "q8_0", "fp32", "fp16", "gate 0.01"} <= set(texts(frontier.svg))
    nodes = [node.get("class", "") for node in ElementTree.fromstring(frontier.svg).iter("circle")]
    assert nodes.count("mark hollow s0") == 3
    assert nodes.count("mark large s0") == 1
    assert nodes.count("mark hollow s1") == 2
    assert [text for _, text in frontier.legend] == ["a", "other sizes", "genai", "llama.cpp"]
    assert "the planner's plans of other sizes and cache types of other tools" in frontier.caption
    by_hand = manifest().model_copy(update={"frontier": (), "alike": manifest().frontier})
    assert "all layers alike in other sizes" in figures({"a": by_hand})[0].caption
    assert [text for _, text in figures({"a": by_hand})[0].legend] == ["a", "other sizes", "genai", "llama.cpp"]


def test_time_has_a_bar_between_its_quartiles() -> None:
    svg = next(figure.svg for figure in figures({"a": manifest()}) if figure.name == "tpot")
    bars = re.findall(r'class="spread s0" d="M([\d.]+) ([\d.]+)h6m-3 0V([\d.]+)', svg)
    marks = [height for left, height in circles(svg)][-3:]
    assert len(bars) == 3
    for (_, low, high), middle in zip(bars, marks, strict=True):
        assert float(low) > middle > float(high)


def test_names_of_points_stand_beside_marks_and_apart() -> None:
    points = tuple((float(place), 5.0) for place in (100, 101, 400))
    series = Series("a", points, "s0", line="none", names=("one", "two", "three"))
    svg = chart("t", TOKENS, Axis("y", high=10), [series])
    nodes = [node for node in ElementTree.fromstring(svg).iter("text") if node.get("class") == "name s0"]
    assert [node.text for node in nodes] == ["one", "two", "three"]
    places = [(float(node.get("x", "")), float(node.get("y", ""))) for node in nodes]
    assert len(set(places)) == 3
    crowded = Series("a", points[:1] * 9, "s0", line="none", names=("name",) * 9)
    assert 4 <= len(re.findall('class="name s0"', chart("t", TOKENS, Axis("y", high=10), [crowded]))) < 9


def test_layer_map_fills_what_is_kept() -> None:
    svg = ElementTree.fromstring(layer_map(manifest()))
    rows = [[rect.get("class") for rect in row.iter("rect") if rect.get("class") != "box"] for row in svg.iter("g")]
    assert rows == [["b8"] * 8, ["b4"] * 8, ["b32"] * 4, [], ["b2"] * 8]
    widths = {float(rect.get("width", "")) for rect in next(svg.iter("g")).iter("rect")}
    assert len(widths) == 2
    assert min(widths) == pytest.approx(max(widths) / 2, abs=0.06)


def test_junit_has_one_case_per_gate_and_a_failure_with_value_and_limit() -> None:
    gates = (
        GateResult(name="max_kl", value=0.02, limit=0.01, passed=False),
        GateResult(name="max_kv_ratio", value=0.125, limit=0.2, passed=True),
        GateResult(name="max_recall_drop", value=None, limit=0.01, passed=False),
    )
    report = manifest().report
    assert report is not None
    suites = ElementTree.fromstring(junit_xml(report.model_copy(update={"gates": gates}), "demo"))
    (suite,) = suites
    assert (suites.tag, suite.tag) == ("testsuites", "testsuite")
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3",
        "failures": "2",
        "errors": "0",
        "skipped": "0",
    }
    assert [case.get("name") for case in suite] == [gate.name for gate in gates]
    messages = [failure.get("message") for failure in suite.iter("failure")]
    assert messages == ["max_kl: 0.02, limit 0.01", "max_recall_drop: not measured, limit 0.01"]


def test_failed_gate_names_the_size_that_is_expected_to_pass() -> None:
    failed = manifest(kl=0.02, limit=0.01)
    size = failed.report.artifact.kv_bytes_per_token if failed.report else None
    points = tuple(
        PlanPoint(cache="int4", kv_bytes_per_token=(size or 0) * 8 / ratio, kv_ratio=ratio, time_ratio=0.9, kl=kl)
        for ratio, kl in ((4, 0.001), (5.337, 0.004), (8, 0.01), (16, 0.1))
    )
    # The artifact lost twice what was expected of its size, so twice 0.004 is the most that passes.
    assert passing_budget(failed.model_copy(update={"frontier": points})) == "--kv-ratio 5.33"
    assert passing_budget(failed.model_copy(update={"frontier": points[2:]})) is None


def _failed(
    gates: dict[str, tuple[float, float]], points: dict[float, tuple[float, float | None]], **budget: float
) -> Manifest:
    """An artifact 8 times smaller with gates (value, limit), and a planner's points (KL, recall lost) by ratio."""
    made = manifest()
    assert made.report is not None
    results = tuple(
        GateResult(name=name, value=value, limit=limit, passed=value <= limit) for name, (value, limit) in gates.items()
    )
    artifact = made.report.artifact.model_copy(update={"kv_bytes_per_token": 320.0})
    frontier = tuple(
        PlanPoint(
            cache="int4",
            kv_bytes_per_token=2560 / ratio,
            kv_ratio=ratio,
            time_ratio=ratio / 10,
            kl=kl,
            recall_drop=drop,
        )
        for ratio, (kl, drop) in points.items()
    )
    report = made.report.model_copy(update={"gates": results, "artifact": artifact})
    return made.model_copy(update={"report": report, "frontier": frontier, "recipe": {"budget": budget}})


SIZES = {4.0: (0.001, None), 5.333: (0.004, 0.01), 8.0: (0.01, 0.04), 16.0: (0.1, None)}


@pytest.mark.parametrize(
    ("gates", "budget"),
    [
        ({"max_recall_drop": (0.08, 0.05)}, "--kv-ratio 5.33"),  # 0.01 and the 0.04 that this one lost beyond 0.04
        ({"max_recall_drop": (0.08, 0.045)}, "--max-recall-drop 4.5"),  # nothing is known of 4 times smaller
        ({"max_recall_drop": (0.08, 0.045), "max_kl": (0.03, 0.02)}, "--max-kl 0.02 --max-recall-drop 4.5"),
        ({"max_recall_drop": (0.08, 0.05), "max_kl": (0.03, 0.02)}, "--kv-ratio 5.33"),
        ({"max_recall_drop": (0.03, 0.05), "max_kl": (0.03, 0.005)}, "--kv-ratio 4"),
        ({"max_recall_drop": (0.03, 0.05), "max_kl": (0.03, 0.001)}, None),
        ({"max_time_ratio": (1.0, 0.7)}, "--kv-ratio 5.33"),
        ({"min_top1_agreement": (0.5, 0.4), "max_kl": (0.01, 0.1)}, None),
        ({"max_memory_mib": (250.0, 300.0), "max_kl": (0.03, 0.005)}, None),  # the weights would have other bits
    ],
)
def test_nearest_size_that_is_expected_to_pass_is_named(
    gates: dict[str, tuple[float, float]], budget: str | None
) -> None:
    assert passing_budget(_failed(gates, SIZES, kv_ratio=8)) == budget


def test_plan_is_expected_to_fail_by_what_the_planner_saw_of_its_size() -> None:
    frontier = _failed({}, SIZES).frontier
    gates = Gates(max_kl=0.005, max_recall_drop=0.03, max_kv_ratio=0.01)
    found = expected_gates(gates, frontier, 320.0, 0.009)
    assert [(gate.name, gate.value, gate.passed) for gate in found] == [
        ("max_kl", 0.009, False),
        ("max_recall_drop", 0.04, False),
    ]
    assert nearest_budget(found, frontier, 320.0, by_size=True) == "--kv-ratio 5.33"
    assert [gate.name for gate in expected_gates(gates, (), 320.0, 0.009)] == ["max_kl"]


def test_no_search_is_named_where_the_planner_has_searched() -> None:
    gates = {"max_recall_drop": (0.08, 0.045)}
    assert passing_budget(_failed(gates, SIZES, max_kl=0.02)) is None


def test_search_is_named_where_the_planner_has_not_run() -> None:
    assert passing_budget(_failed({"max_kl": (0.02, 0.01)}, {})) == "--max-kl 0.01"
    assert passing_budget(_failed({"max_kl": (0.005, 0.01), "max_recall_drop": (0.2, 0.01)}, {})) == (
        "--max-kl 0.01 --max-recall-drop 1"
    )


@pytest.mark.parametrize(("limit", "budget"), [(0.01, "--max-kl 0.01"), (0.002, None)])
def test_search_is_named_only_where_some_size_keeps_the_margin(limit: float, budget: str | None) -> None:
    failed = _failed({"max_kl": (0.02, limit)}, {4.0: (0.001, None), 8.0: (0.02, None)})
    assert passing_budget(failed.model_copy(update={"frontier": (), "alike": failed.frontier})) == budget


def test_no_size_is_named_when_the_gate_passed() -> None:
    assert passing_budget(manifest(kl=0.002, limit=0.01)) is None


@pytest.mark.parametrize(
    ("recipe", "overrides", "failed", "advice"),
    [
        ("small", [], {"max_kl"}, "use a milder recipe"),
        ("lossless", ["weights=int8"], {"max_kl", "min_top1_agreement"}, "as no recipe is milder"),
        ("lossless", ["methods.kv_quant.bits=4"], {"max_kl"}, "use a milder recipe"),
        ("lossless", [], {"max_kv_ratio", "max_file_mib"}, "use a recipe that saves more"),
        ("small", [], {"max_kl", "max_kv_ratio"}, None),
    ],
)
def test_advice_fits_the_recipe_and_the_gates_that_failed(
    recipe: str, overrides: list[str], failed: set[str], advice: str | None
) -> None:
    names = ["max_kl", "min_top1_agreement", "max_kv_ratio", "max_file_mib"]
    gates = [GateResult(name=name, value=1, limit=1, passed=name not in failed) for name in names]
    found = likely_fix(load_recipe(recipe, overrides).model_dump(mode="json"), gates)
    assert found == advice or (advice is not None and found is not None and found.endswith(advice))
