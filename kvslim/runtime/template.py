"""A tokenizer's chat template: messages become one text, as transformers' `apply_chat_template` puts it together."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvslim.errors import ArtifactError, UsageError

CONFIG = "tokenizer_config.json"
Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """The template of a folder's tokenizer, run in jinja2's sandbox, as it came with a model from anywhere.

    Args:
        folder: Folder with tokenizer_config.json.

    Raises:
        UsageError: The tokenizer has no chat template.
        ArtifactError: tokenizer_config.json or the template in it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        config = _read_config(folder)
        source = _source(config)
        if source is None:
            raise UsageError(
                "the tokenizer has no chat template",
                where=str(folder / CONFIG),
                fix="give a plain prompt, without --chat, --system and messages",
            )
        self._template = _compiled(source, str(folder / CONFIG))
        self._special = {name: text for name, text in map(_special, config.items()) if text is not None}

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether the tokenizer has a template.

        Raises:
            ArtifactError: tokenizer_config.json cannot be read.
        """
        return _source(_read_config(folder)) is not None

    def render(self, messages: Messages) -> str:
        """The text of a conversation up to where the model's answer begins.

        Args:
            messages: Each with `role` and `content`.

        Raises:
            UsageError: The template refuses the messages.
        """
        common = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self._template.render(messages=[dict(message) for message in messages], **common, **self._special)
        # A template is code that came with the model, and fails in as many ways.
        except Exception as error:
            raise UsageError(
                f"the chat template refuses these messages: {error}",
                where="messages",
                fix="give the roles and contents that the model was made for",
            ) from error


class _Generation(Extension):
    """`{% generation %}`, with which templates mark what a model is trained on; nothing to do here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compiled(source: str, where: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[[str], str]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(functions)
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise ArtifactError(
            f"the chat template is broken: {error}", where=where, fix="export the model again"
        ) from error


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def _to_json(value: Any, **options: Any) -> str:
    """jinja2's own filter escapes what HTML does not take."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{CONFIG} is not JSON: {error}", where=str(path), fix="export the model again") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{CONFIG} is no mapping", where=str(path), fix="export the model again")
    return config


def _source(config: dict[str, Any]) -> str | None:
    """The template itself; of several with names, the one called default."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _special(entry: tuple[str, Any]) -> tuple[str, str | None]:
    """A special token of the config, such as `bos_token`: text, or a mapping that holds it."""
    name, value = entry
    text = value.get("content") if isinstance(value, dict) else value
    return name, text if name.endswith("_token") and isinstance(text, str) else None
