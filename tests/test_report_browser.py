"""The report's page in a real browser: figures that are there, on a phone, in light and in dark, without a script."""

from __future__ import annotations

import json
import os
import re
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from support.chromium import browse, find
from support.tiny_report import manifest

from kvslim.report.compare import compared, regressions
from kvslim.report.page import artifact_page, comparison_page

FIGURES = ["kl", "position", "distance", "tpot", "ttft", "memory", "layers"]
LIMITS = [("a board", 0.115), ("a small phone", 2.0), ("a laptop", 16.0)]
PHONE, DESKTOP = (390, 844), (1280, 900)
LOOK = """
<script>
const size = (node) => node.getBoundingClientRect();
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const shown = (node) => size(node).width > 0 || size(node).height > 0;
const before = (a, b) => a.right <= b.left + 1 || a.bottom <= b.top + 2;
const apart = (a, b) => before(a, b) || before(b, a);
const clashes = (figure) => [...figure.querySelectorAll("svg text")].flatMap((one, index, all) =>
  all.slice(index + 1).filter((other) => !apart(size(one), size(other))).map((other) =>
    `${one.textContent} / ${other.textContent}`));
parent.document.body.dataset.seen = JSON.stringify({
  cut: all("main *").filter((node) => !node.closest(".scroll, svg, details:not([open]), pre")).filter(shown)
    .filter((node) => size(node).right > innerWidth + 1).map((node) => node.outerHTML.slice(0, 80)),
  scrollers: all(".scroll").filter(shown).filter((node) => node.scrollWidth > node.clientWidth)
    .map((node) => getComputedStyle(node).overflowX),
  head: document.querySelector("header").innerText,
  marks: all("mark").map((node) => [node.textContent, getComputedStyle(node).backgroundColor]),
  pairs: all(".answer").map((node) => all("section", node).map(size)),
  best: all("td.best").map((node) => [node.textContent, getComputedStyle(node).fontWeight]),
  width: innerWidth, scrolls: document.documentElement.scrollWidth > innerWidth,
  background: getComputedStyle(document.body).backgroundColor,
  figures: [...document.querySelectorAll("figure")].map((figure) => ({
    name: figure.className, width: size(figure.querySelector("svg")).width,
    legend: all(".legend li", figure).map((node) => node.innerText),
    texts: all("svg text", figure).filter(shown).map((node) => node.textContent),
    height: size(figure.querySelector("svg")).height, right: size(figure).right,
    drawn: [...figure.querySelectorAll("svg .line, svg .mark, svg rect:not(.box)")].filter(shown).length,
    letters: Math.min(...[...figure.querySelectorAll("svg text")].map((text) => size(text).height)),
    overflow: Math.max(...[...figure.querySelectorAll("svg text")].map((text) => Math.max(
      size(text).right - size(figure.querySelector("svg")).right,
      size(figure.querySelector("svg")).left - size(text).left))),
    clashes: clashes(figure), colours: [...new Set([...figure.querySelectorAll("svg .line, svg .mark")].map((node) =>
      getComputedStyle(node).stroke))].length,
  })),
});
</script></body>
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = find()
    if found is None:
        if os.environ.get("KVSLIM_REQUIRE_CHROMIUM") == "1":
            pytest.fail("chromium is missing, and KVSLIM_REQUIRE_CHROMIUM=1 asks for it")
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    return found


def seen(chromium: str, html: str, path: Path, window: tuple[int, int]) -> dict[str, Any]:
    """What a script finds in a copy of the page that may run one, in a frame, as windows are at least 500 wide."""
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(html)
    copy = escape(policy.sub("", html).replace("</body>", LOOK), quote=True)
    size = f'width="{window[0]}" height="{window[1]}"'
    path.write_text(f'<!doctype html><meta charset="utf-8"><body><iframe {size} frameborder="0" srcdoc="{copy}">')
    found = re.search(r'data-seen="([^"]*)"', browse(chromium, path, DESKTOP, "--dump-dom"))
    assert found
    return dict(json.loads(unescape(found[1])))


@pytest.mark.parametrize("window", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_figures_are_drawn_and_readable(chromium: str, tmp_path: Path, window: tuple[int, int]) -> None:
    page = seen(chromium, artifact_page(manifest(), LIMITS), tmp_path / "report.html", window)
    assert page["width"] == window[0]
    assert not page["scrolls"]
    assert [figure["name"] for figure in page["figures"]] == FIGURES
    for figure in page["figures"]:
        assert figure["width"] > 300
        assert figure["height"] > 80
        assert figure["right"] <= window[0]
        assert figure["drawn"] >= 2
        assert figure["letters"] >= 10
        assert figure["overflow"] <= 1
        assert figure["clashes"] == []


@pytest.mark.parametrize("window", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_cut_and_wide_tables_scroll(chromium: str, tmp_path: Path, window: tuple[int, int]) -> None:
    manifests = {"a-model-of-a-very-long-name-and-a-date-2026-11-29": manifest(), "b": manifest(kl=0.02)}
    pages = artifact_page(manifest(kl=0.02), LIMITS), comparison_page(compared(manifests), manifests, limits=LIMITS)
    for html in pages:
        page = seen(chromium, html, tmp_path / "page.html", window)
        assert page["cut"] == []
        assert not page["scrolls"]
        assert set(page["scrollers"]) <= {"auto"}
    assert bool(page["scrollers"]) is (window == PHONE)


def test_head_tells_what_a_reader_looks_for_first(chromium: str, tmp_path: Path) -> None:
    head = seen(chromium, artifact_page(manifest(busy=True), LIMITS), tmp_path / "report.html", DESKTOP)["head"]
    lines = head.splitlines()
    for line in ("✓ all gates hold", "1.74 MiB", "200 tokens/s", "90 ms", "0.004", "97.0%"):
        assert line in lines
    assert "timings uncertain: the machine was busy" in lines
    failed = seen(chromium, artifact_page(manifest(kl=0.05), LIMITS), tmp_path / "failed.html", DESKTOP)["head"]
    assert [line for line in failed.splitlines() if line][1] == "✗ A gate failed"
    assert "all gates hold" not in failed


def test_answers_stand_side_by_side_where_there_is_room(chromium: str, tmp_path: Path) -> None:
    for window, beside in ((DESKTOP, True), (PHONE, False)):
        page = seen(chromium, artifact_page(manifest(), LIMITS), tmp_path / "report.html", window)
        assert [text for text, _ in page["marks"]] == ["king.", "<queen>."]
        assert {colour for _, colour in page["marks"]} == {"rgb(255, 226, 168)"}
        assert len(page["pairs"]) == 2
        assert all((plain["top"] == artifact["top"]) is beside for plain, artifact in page["pairs"])


def test_frontier_names_what_it_shows(chromium: str, tmp_path: Path) -> None:
    figures = seen(chromium, artifact_page(manifest(), LIMITS), tmp_path / "report.html", DESKTOP)["figures"]
    found = {figure["name"]: figure for figure in figures}
    assert {"this artifact", "int8", "q8_0", "fp32", "fp16"} <= set(found["kl"]["texts"])
    assert found["kl"]["legend"] == ["small", "other sizes", "genai", "llama.cpp"]
    assert found["memory"]["legend"][-1].startswith("0.115 GiB, a board: plain, fp32 to ")


def test_best_values_of_a_comparison_stand_out(chromium: str, tmp_path: Path) -> None:
    manifests = {"a": manifest(), "b": manifest(kl=0.002)}
    html = comparison_page(compared(manifests), manifests, limits=LIMITS)
    best = seen(chromium, html, tmp_path / "compare.html", DESKTOP)["best"]
    assert ["0.002", "700"] in best


def test_comparison_draws_every_artifact_in_a_colour_of_its_own(chromium: str, tmp_path: Path) -> None:
    manifests = {"a": manifest(), "b": manifest(kl=0.02, recall=0.9), "c": manifest(slowness=2)}
    comparison = compared(manifests)
    html = comparison_page(comparison, manifests, regressions(comparison, comparison), LIMITS)
    figures = seen(chromium, html, tmp_path / "compare.html", DESKTOP)["figures"]
    assert [figure["name"] for figure in figures] == ["kl", "recall", *FIGURES[1:], "layers", "layers"]
    assert all(figure["clashes"] == [] for figure in figures)
    colours = {figure["name"]: figure["colours"] for figure in figures[:6]}
    assert colours == {"kl": 3, "recall": 4, "position": 3, "distance": 3, "tpot": 3, "ttft": 3}
    assert all(len(figure["legend"]) <= 5 for figure in figures)


def test_page_follows_the_readers_light_or_dark_setting(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(artifact_page(manifest(), LIMITS))
    brightness = []
    for scheme in (1, 0):  # Blink's numbers for light and dark
        shot = tmp_path / f"{scheme}.png"
        browse(chromium, page, PHONE, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}")
        brightness.append(imread(shot)[..., :3].mean())
    assert brightness[0] > 0.85
    assert brightness[1] < 0.25
