"""The table of an emulated board says what was found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

OUTCOMES = """<testsuites><testsuite>
<testcase name="a"><properties><property name="bundle_mib" value="53.26"/></properties></testcase>
<testcase name="b"/>
<testcase name="c"><properties>
<property name="graph" value="int4 cache"/><property name="apart" value="1.26e-05"/>
<property name="noise" value="3e-06"/><property name="cost" value="2e-05"/>
<property name="cost_there" value="4e-05"/><property name="exact" value="None"/>
<property name="continued" value="2e-06"/><property name="edges" value="1"/>
</properties></testcase>
<testcase name="d"><properties>
<property name="graph" value="int8 weights"/><property name="apart" value="0.07"/>
<property name="noise" value="3e-06"/><property name="cost" value="0.07"/>
<property name="cost_there" value="0.06"/><property name="exact" value="2e-6"/>
<property name="continued" value="None"/><property name="edges" value="None"/>
</properties></testcase>
</testsuite></testsuites>"""


def test_table_has_a_line_for_each_graph(tmp_path: Path) -> None:
    (tmp_path / "outcomes.xml").write_text(OUTCOMES)
    command = [sys.executable, str(ROOT / "tools" / "arm_table.py"), str(tmp_path / "outcomes.xml")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table.splitlines()[2:] == [
        "| int4 cache | 1e-05 | 3e-06 | 2e-05 | 4e-05 | - | 2e-06 | 1 |",
        "| int8 weights | 7e-02 | 3e-06 | 7e-02 | 6e-02 | 2e-06 | - | - |",
        "",
        "The demo's bundle for linux-aarch64: 53.3 MiB.",
    ]
    missing = subprocess.run([*command[:2], str(tmp_path / "none.xml")], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "make test-arm" in missing.stderr
