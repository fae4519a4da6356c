"""Which draft an artifact gets."""

from __future__ import annotations

from kvslim.measures import DraftKind
from kvslim.types import Draft, DraftChoice, KVLayout

LONG = 3  # times the rows of the window draft that a text must have for it to pay


def draft_of(choice: DraftChoice, layout: KVLayout, context: int) -> Draft | None:
    """The draft of an artifact; None for none.

    A window draft reads some rows of full caches. Where a layer keeps another kind, or the model's own window, there is
    the lookup alone. `auto` also leaves it at that where the text gets no longer than a few windows.

    Args:
        choice: As in a recipe.
        layout: The cache of the artifact.
        context: The target context in tokens.
    """
    if choice == "none":
        return None
    draft = Draft(kind="window")
    pays = choice == "window" or (choice == "auto" and kind_at(draft, context) == "window")
    return draft if pays and window_refusal(layout) is None else Draft(kind="lookup")


def kind_at(draft: Draft, context: int) -> DraftKind:
    """What a draft proposes by at a context: in short texts a window draft leaves it to the lookup."""
    return draft.kind if context >= LONG * (draft.window + draft.sinks) else "lookup"


def window_refusal(layout: KVLayout) -> str | None:
    """Why there is no window draft over a cache, or None if there can be one."""
    other = next((tensor for tensor in layout.tensors if tensor.cache != "full" or tensor.window is not None), None)
    if other is None:
        return None
    kept = "has the model's own sliding window" if other.cache == "full" else f"keeps a cache of kind {other.cache}"
    return f"it reads rows of full caches, and layer {other.layer} {kept}"
