"""Which files make up a model, which of them a verb needs, and how they come from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvslim.errors import ModelError, NotFoundError, UsageError, first_line
from kvslim.loading.origin import CARD

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER = "tokenizer.json"
POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched
FETCH = "fetch the file itself: git lfs pull, or hf download"
# All that `inspect` reads: from these alone the shape of a model is known.
CONFIGS = (CONFIG, ADAPTER_CONFIG)
SETTINGS = (
    *CONFIGS,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
# What transformers makes a fast tokenizer from where there is no tokenizer.json.
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the safetensors of a whole model."""
    return any((folder / name).is_file() for name in (WHOLE, INDEX))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model's weights: one, or the shards that an index names.

    Raises:
        ModelError: The index is broken, points outside the folder, or names a file that is not there.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    shards = _shards(folder)
    known = {path.name for path in folder.glob("*.safetensors") if path.is_file()}
    if strange := [name for name in shards if name not in known]:
        message = f"the index names {strange[0]!r}, which is not a .safetensors file in the folder"
        raise ModelError(message, where=str(folder / INDEX), fix="download the model again")
    return [folder / name for name in shards]


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that make up a model or an adapter; others, such as other formats of it, do not count.

    Raises:
        ModelError: As `weight_files`.
    """
    weights = weight_files(folder) if has_weights(folder) else _present(folder, (ADAPTER_WEIGHTS,))
    vocabularies = () if (folder / TOKENIZER).is_file() else VOCABULARIES
    return [
        *sorted(_present(folder, (*SETTINGS, INDEX))),
        *weights,
        *_present(folder, TEMPLATES),
        *_present(folder, vocabularies),
    ]


def fetch_configs(repository: str, revision: str | None) -> Path:
    """The folder with what tells the shape of a model on the hub; no weights are downloaded.

    Raises:
        NotFoundError: The hub has no such model, or cannot be reached.
    """
    return _fetch(repository, revision, CONFIGS)


def fetch_model(repository: str, revision: str | None) -> Path:
    """The folder with all that makes up a model or an adapter on the hub, and its card.

    Raises:
        NotFoundError: As `fetch_configs`.
        ModelError: The index of the weights is broken.
    """
    folder = _fetch(repository, revision, (CARD, *SETTINGS, *TEMPLATES, WHOLE, INDEX, ADAPTER_WEIGHTS))
    lacking = [] if (folder / TOKENIZER).is_file() else list(VOCABULARIES)
    if (folder / INDEX).is_file() and not (folder / WHOLE).is_file():
        lacking += _shards(folder)
    return _fetch(repository, folder.name, lacking) if lacking else folder


def fetch_file(repository: str, file: str, revision: str | None) -> Path:
    """One file of a repository on the hub.

    Raises:
        UsageError: Its name is none of a GGUF.
        NotFoundError: There is no such file, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    if not file.lower().endswith(".gguf"):
        fix = f"give the whole name of a file: {repository}:FILE.gguf; @ stands before a revision"
        raise UsageError(f"{file!r} is not the name of a .gguf file", where="MODEL", fix=fix)
    return _from_hub(lambda: hf_hub_download(repository, file, revision=revision), f"{file!r} of {repository!r}")


def _fetch(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """The folder of a repository with the files of these names, as far as it has them; of subfolders only templates."""
    from huggingface_hub import snapshot_download

    # To the hub's client a star also stands for slashes.
    below = [f"*/{name}" for name in VOCABULARIES if "*" in name]
    return _from_hub(
        lambda: snapshot_download(repository, revision=revision, allow_patterns=list(names), ignore_patterns=below),
        repr(repository),
    )


def _from_hub(download: Callable[[], str], wanted: str) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(download())
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise NotFoundError(
            f"cannot get {wanted} from the hub: {first_line(error)}",
            where="MODEL",
            fix="check the id and the network, or give a local folder or file",
        ) from error


def _shards(folder: Path) -> list[str]:
    """The names of the weight files in an index, each once."""
    try:
        return sorted({str(name) for name in json.loads((folder / INDEX).read_bytes())["weight_map"].values()})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        fix = "download the model again"
        raise ModelError("the index names no shards", where=str(folder / INDEX), fix=fix) from error


def _present(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        yield from sorted(path for path in folder.glob(name) if path.is_file())
