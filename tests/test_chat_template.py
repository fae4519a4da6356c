"""Chat templates give the text that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_tokenizer import byte_tokenizer

from kvslim.errors import ArtifactError, UsageError
from kvslim.runtime.template import CONFIG, ChatTemplate

PLAIN = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPLATES = {
    "plain": PLAIN,
    "blocks": "{{ bos_token }}\n  {%- for m in messages %}\n  {% if m.role == 'user' %}\n U {{ m.content | trim }}\n"
    "  {% else %}\n  S {{ m['content'] }}\n  {% endif %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "tools": "{% if tools is none and documents is none %}no tools{% endif %}{{ strftime_now('%Y') }}",
}
MESSAGES = [
    {"role": "system", "content": "Be <brief> & «kind»."},
    {"role": "user", "content": " Whose lamp is red? \n"},
    {"role": "assistant", "content": "Mira's 👩"},
    {"role": "user", "content": "And blue?"},
]


def written(folder: Path, template: object, **more: object) -> Path:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **more}
    (folder / CONFIG).write_text(json.dumps(config if template is None else {**config, "chat_template": template}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_equals_that_of_transformers(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(written(tmp_path, TEMPLATES[name]))
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(tmp_path).render(MESSAGES) == expected


def test_template_is_the_default_when_there_are_several(tmp_path: Path) -> None:
    several = [{"name": "tools", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    assert ChatTemplate(written(tmp_path, several)).render(MESSAGES[1:2]) == MESSAGES[1]["content"]


def test_special_tokens_are_read_when_they_are_mappings(tmp_path: Path) -> None:
    token = {"content": "<end>", "special": True}
    assert ChatTemplate(written(tmp_path, "{{ eos_token }}", eos_token=token)).render(MESSAGES) == "<end>"


@pytest.mark.parametrize("template", [None, 7, [], [{"name": "tools", "template": "x"}]])
def test_template_is_refused_when_there_is_none(tmp_path: Path, template: object) -> None:
    folder = written(tmp_path, template)
    assert not ChatTemplate.exists(folder)
    with pytest.raises(UsageError, match="no chat template"):
        ChatTemplate(folder)


def test_template_does_not_exist_when_there_is_no_config(tmp_path: Path) -> None:
    assert not ChatTemplate.exists(tmp_path)


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages | nope }}", "{% include"])
def test_template_is_named_broken_when_it_does_not_parse(tmp_path: Path, template: str) -> None:
    with pytest.raises(ArtifactError, match="chat template is broken"):
        ChatTemplate(written(tmp_path, template))


@pytest.mark.parametrize("text", ["{", "[]", "nul"])
def test_config_is_named_broken_when_it_is_no_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ArtifactError, match=CONFIG):
        ChatTemplate(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.clear() }}",
        "{% for i in range(1000000000) %}{% endfor %}",
    ],
)
def test_messages_are_refused_when_the_template_fails_or_leaves_its_sandbox(tmp_path: Path, template: str) -> None:
    with pytest.raises(UsageError, match="the chat template refuses"):
        ChatTemplate(written(tmp_path, template)).render(MESSAGES)
