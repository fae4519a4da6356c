"""Where a model comes from, and under which licence: what a model card must repeat."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kvslim.types import Source

if TYPE_CHECKING:
    from kvslim.loading.snapshot import Snapshot

CARD = "README.md"
LICENSE = ("license", "license_name", "license_link")
HUB = "https://huggingface.co/"
LONGEST = 200  # characters of a value; longer ones are no names


def source_of(snapshot: Snapshot, sha256: str) -> Source:
    """Where a model comes from, for the manifest.

    Args:
        snapshot: The model's files.
        sha256: Their digest.
    """
    about = snapshot.about()
    named = {name: text for name in LICENSE if (text := _text(about.get(name)))}
    link, repository = named.get("license_link"), snapshot.repository
    if link and "://" not in link:  # a file beside the model's card
        named.pop("license_link")
        if repository:
            named["license_link"] = f"{HUB}{repository}/blob/main/{link}"
    base_model = repository or _text(about.get("base_model"))
    return Source(
        model=snapshot.model,
        revision=snapshot.revision,
        sha256=sha256,
        base_model=base_model,
        blocks=snapshot.block_types,
        **named,
    )


def read_card(folder: Path) -> dict[str, Any]:
    """What the card in a folder says of the model's licence; a card that cannot be read says nothing.

    The base that it names is not the model itself, but what that was made from.
    """
    from huggingface_hub.repocard import metadata_load

    try:
        header = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {name: header.get(name) for name in LICENSE}


def of_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file says of its model, by the hub's names."""
    url = metadata.get("general.base_model.0.repo_url")
    base = url.removeprefix(HUB) if isinstance(url, str) and url.startswith(HUB) else None
    keys = {name: f"general.{name.replace('_', '.')}" for name in LICENSE}
    return {"base_model": base, **{name: metadata.get(key) for name, key in keys.items()}}


def _text(value: object) -> str | None:
    """One line of text; None for anything else."""
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST else None
