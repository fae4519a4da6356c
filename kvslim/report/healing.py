"""What training gave, in a line."""

from __future__ import annotations

from kvslim.types import Manifest


def healing_note(manifest: Manifest) -> str | None:
    """What came of the recipe's `heal`; None where it asks for none."""
    if manifest.recipe.get("heal") is None:
        return None
    healing = manifest.healing
    if healing is None:
        return "not healed: the plan changes nothing that could heal"
    change = f"KL {healing.kl_before:.3g} -> {healing.kl_after:.3g} on calibration text that was kept apart"
    if healing.kept:
        return f"healed in {healing.steps} steps: {change}"
    return f"not healed: {healing.steps} steps gained nothing ({change}), so the weights stay as they were"
