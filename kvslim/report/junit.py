"""The gates of an artifact as JUnit XML, which CI systems show as test results."""

from __future__ import annotations

from xml.etree import ElementTree

from kvslim.measures import GateResult, Report, Speculation


def junit_xml(report: Report, artifact: str) -> str:
    """One suite with a test case per gate. A gate that fails is a failure with its value and limit.

    A draft that was measured is a case as well, which fails if it changes texts.

    Args:
        report: The measured artifact.
        artifact: Its name, which becomes the class of the test cases.
    """
    gates = [*report.gates, *_of_draft(report.speculation)]
    failures = sum(not gate.passed for gate in gates)
    counts = {"tests": str(len(gates)), "failures": str(failures), "errors": "0", "time": "0"}
    suites = ElementTree.Element("testsuites", {"name": "kvslim", **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": f"gates of {artifact}", **counts, "skipped": "0"})
    for gate in gates:
        _case(suite, gate, artifact)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=False) + "\n"


def _of_draft(found: Speculation | None) -> list[GateResult]:
    """The texts that a draft changes, as a gate."""
    if found is None:
        return []
    return [GateResult(name="draft_differing", value=found.differing, limit=0, passed=not found.differing)]


def _case(suite: ElementTree.Element, gate: GateResult, artifact: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", {"classname": artifact, "name": gate.name, "time": "0"})
    value = "not measured" if gate.value is None else f"{gate.value:.6g}"
    summary = f"{gate.name}: {value}, limit {gate.limit:.6g}"
    if not gate.passed:
        failure = ElementTree.SubElement(case, "failure", {"message": summary, "type": "GateError"})
        failure.text = summary
    ElementTree.SubElement(case, "system-out").text = f"{summary}; {gate.note}" if gate.note else summary
