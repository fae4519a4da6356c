"""A tokenizer's chat template: messages become one text, as transformers' `apply_chat_template` puts it together."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvslim.errors import ArtifactError, UsageError
from kvslim.messages import Messages, flattened

CONFIG = "tokenizer_config.json"
DEFAULT = "default"


class ChatTemplate:
    """The template of a folder's tokenizer, run in jinja2's sandbox, as it came with a model from anywhere.

    Args:
        folder: Folder with tokenizer_config.json.

    Raises:
        UsageError: The tokenizer has no chat template, or none that is called default among several.
        ArtifactError: tokenizer_config.json or the template in it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        config = _read_config(folder)
        where, templates = str(folder / CONFIG), _templates(config)
        if DEFAULT not in templates:
            raise _without_default(templates, where)
        self._template = _compiled(templates[DEFAULT], where)
        self._special = {name: text for name, text in map(_special, config.items()) if text is not None}

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether the tokenizer has a template; of several, one that is called default.

        Raises:
            ArtifactError: tokenizer_config.json cannot be read.
        """
        return DEFAULT in _templates(_read_config(folder))

    def render(self, messages: Messages) -> str:
        """The text of a conversation up to where the model's answer begins.

        Args:
            messages: As for `flattened`.

        Raises:
            UsageError: A content is no text, or the template refuses the messages.
        """
        common = {"tools": None, "documents": None, "add_generation_prompt": True}
        flat = flattened(messages)
        try:
            return self._template.render(messages=flat, **common, **self._special)
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


def _templates(config: dict[str, Any]) -> dict[str, str]:
    """The templates of a config by name: a single one is the default; several are a list of pairs or a mapping."""
    found = config.get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    if isinstance(found, list):
        pairs = [(entry.get("name"), entry.get("template")) for entry in found if isinstance(entry, dict)]
    else:
        pairs = list(found.items()) if isinstance(found, dict) else []
    return {name: template for name, template in pairs if isinstance(name, str) and isinstance(template, str)}


def _without_default(templates: Mapping[str, str], where: str) -> UsageError:
    """There is no template, or it is not known which of several to use."""
    message, fix = "the tokenizer has no chat template", "give a plain prompt, without --chat, --system and messages"
    if templates:
        message += f" called {DEFAULT!r}, only {', '.join(sorted(templates))}"
        fix = f"call the one to use {DEFAULT!r}, or {fix}"
    return UsageError(message, where=where, fix=fix)


def _special(entry: tuple[str, Any]) -> tuple[str, str | None]:
    """A special token of the config, such as `bos_token`: text, or a mapping that holds it."""
    name, value = entry
    text = value.get("content") if isinstance(value, dict) else value
    return name, text if name.endswith("_token") and isinstance(text, str) else None
