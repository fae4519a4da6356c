"""Prints the table of docs/clients.md from what `make test-clients` found.

    python tools/clients_table.py [OUTCOMES]

OUTCOMES is pytest's JUnit report, by default build/clients/outcomes.xml; a cell tells what the models agree on, or
what each of them gave. Below it stands which models each client was given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

OUTCOMES = Path(__file__).resolve().parent.parent / "build" / "clients" / "outcomes.xml"
Outcome = dict[str, str]


def main() -> None:
    """Prints the table."""
    path = Path(sys.argv[1]) if sys.argv[1:] else OUTCOMES
    if not path.is_file():
        sys.exit(f"error: no outcomes at {path}\n  fix: run `make test-clients`")
    print(table(read(path)))


def read(path: Path) -> list[Outcome]:
    """What each test recorded of itself; one that failed or was skipped recorded nothing."""
    cases = ElementTree.parse(path).iter("testcase")
    recorded = [{entry.get("name", ""): entry.get("value", "") for entry in case.iter("property")} for case in cases]
    return [outcome for outcome in recorded if "outcome" in outcome]


def table(outcomes: list[Outcome]) -> str:
    """Kinds of artifact by clients, in Markdown."""
    kinds, clients = (list(dict.fromkeys(outcome[key] for outcome in outcomes)) for key in ("kind", "client"))
    lines = [
        ["artifact", *(f"{client} {_version(outcomes, client)}" for client in clients)],
        ["---"] * (1 + len(clients)),
    ]
    lines += [[kind, *(_cell(outcomes, kind, client) for client in clients)] for kind in kinds]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\n{_models(outcomes, kinds, clients)}"


def _models(outcomes: list[Outcome], kinds: list[str], clients: list[str]) -> str:
    """What each client was given; clients that were given the same share a line."""
    lines: dict[str, list[str]] = {}
    for client in clients:
        tried: dict[str, set[str]] = {}
        for outcome in outcomes:
            if outcome["client"] == client:
                tried.setdefault(outcome["model"], set()).add(outcome["kind"])
        models = "; ".join(f"{model} ({_kinds(found, kinds)})" for model, found in tried.items())
        lines.setdefault(models, []).append(client)
    return "\n".join(f"- {' / '.join(names)}: {models}" for models, names in lines.items())


def _version(outcomes: list[Outcome], client: str) -> str:
    versions = {outcome["version"] for outcome in outcomes if outcome["client"] == client}
    return " ".join(sorted(versions - {""}))


def _cell(outcomes: list[Outcome], kind: str, client: str) -> str:
    found = {o["model"]: o["outcome"] for o in outcomes if (o["kind"], o["client"]) == (kind, client)}
    if len(set(found.values())) <= 1:
        return next(iter(found.values()), "not tried")
    return "; ".join(f"{model}: {outcome}" for model, outcome in found.items())


def _kinds(tried: set[str], kinds: list[str]) -> str:
    return "all" if len(tried) == len(kinds) else ", ".join(kind for kind in kinds if kind in tried)


if __name__ == "__main__":
    main()
