"""What reports say of an artifact's draft: its kind, what it gains, and why it is not the one that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from kvslim.measures import Speculation
from kvslim.report.tables import NONE, Table
from kvslim.speculative.choice import window_refusal
from kvslim.types import Draft, Manifest

SHOWN = 4  # places of proposals


def draft_note(found: Speculation | None) -> str | None:
    """What the draft gains, and whether the texts are the model's; None where there is none."""
    if found is None:
        return None
    if found.differing:
        return f"draft: {found.kind}, and {found.differing} texts are not those that the model writes without it"
    advice = "" if found.speed_ratio >= 1 else "; it does not pay here: do without it (compress --draft none)"
    checked = f"with {found.checked:,} proposals the texts are the model's own"
    return (
        f"draft: {found.kind}, {found.tokens_per_round:.2f} tokens a run and {found.speed_ratio:.2f} times the speed "
        f"without it, behind {found.context:,} tokens of held-out text; "
        f"{checked if found.checked else 'it proposed nothing that could be checked'}{advice}"
    )


def fallback_note(manifest: Manifest) -> str | None:
    """A warning where a window draft was asked for and the artifact has another one; None where not."""
    if manifest.recipe.get("draft") != "window" or manifest.draft is None or manifest.draft.kind == "window":
        return None
    return f"warning: the draft is {manifest.draft.kind}, not window: {window_refusal(manifest.kv_layout)}"


def draft_table(draft: Draft | None, found: Speculation | None) -> Table:
    """A draft and what it gains, a row for each number; no rows where there is no draft."""
    if draft is None:
        return Table((), ())
    measured = () if found is None else _measured(found)
    return Table(("", ""), (("kind", _kind(draft)), *measured), words=True)


def shares(acceptance: Sequence[float]) -> str:
    """How often the first few proposals of a run were right."""
    return ", ".join(f"{share:.0%}" for share in acceptance[:SHOWN]) or NONE


def _measured(found: Speculation) -> tuple[tuple[str, str], ...]:
    return (
        ("times the speed without it", f"{found.speed_ratio:.2f}"),
        ("tokens a run of the graph", f"{found.tokens_per_round:.2f}"),
        ("first, second, ... proposal right", shares(found.acceptance)),
        ("texts that are not the model's own, and proposals checked", f"{found.differing}, {found.checked:,}"),
        ("tokens written, and tokens before them", f"{found.tokens:,} behind {found.context:,}"),
    )


def _kind(draft: Draft) -> str:
    if draft.kind == "lookup":
        return "lookup: n-grams of the text"
    return f"window: the model over {draft.sinks} sinks and {draft.window} recent tokens, and n-grams of the text"
