"""Which draft an artifact gets."""

from __future__ import annotations

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
    lends = all(tensor.cache == "full" and tensor.window is None for tensor in layout.tensors)
    pays = choice == "window" or (choice == "auto" and context >= LONG * (draft.window + draft.sinks))
    return draft if lends and pays else Draft(kind="lookup")
