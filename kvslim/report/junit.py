"""The gates of an artifact as JUnit XML, which CI systems show as test results."""

from __future__ import annotations

from xml.etree import ElementTree

from kvslim.measures import GateResult, Report


def junit_xml(report: Report, artifact: str) -> str:
    """One suite with a test case per gate. A gate that fails is a failure with its value and limit.

    Args:
        report: The measured artifact.
        artifact: Its name, which becomes the class of the test cases.
    """
    failures = sum(not gate.passed for gate in report.gates)
    counts = {"tests": str(len(report.gates)), "failures": str(failures), "errors": "0", "time": "0"}
    suites = ElementTree.Element("testsuites", {"name": "kvslim", **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": f"gates of {artifact}", **counts, "skipped": "0"})
    for gate in report.gates:
        _case(suite, gate, artifact)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=False) + "\n"


def _case(suite: ElementTree.Element, gate: GateResult, artifact: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", {"classname": artifact, "name": gate.name, "time": "0"})
    value = "not measured" if gate.value is None else f"{gate.value:.6g}"
    summary = f"{gate.name}: {value}, limit {gate.limit:.6g}"
    if not gate.passed:
        failure = ElementTree.SubElement(case, "failure", {"message": summary, "type": "GateError"})
        failure.text = summary
    ElementTree.SubElement(case, "system-out").text = f"{summary}; {gate.note}" if gate.note else summary
