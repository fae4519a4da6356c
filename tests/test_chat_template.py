"""Chat templates give the text that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_tokenizer import byte_tokenizer

from kvslim.errors import ArtifactError, UsageError
from kvslim.loading.tokenizer import folder_tokenizer
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


def test_templates_are_found_by_name_when_they_are_a_mapping(tmp_path: Path) -> None:
    folder = written(tmp_path, {"rag": "rag", "default": "{{ messages[0].role }}", "tool_use": "tools"})
    assert ChatTemplate.exists(folder)
    assert ChatTemplate(folder).render(MESSAGES) == "system"


@pytest.mark.parametrize(
    "templates",
    [{"rag": "x", "tool_use": "y"}, [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]],
)
def test_template_is_refused_when_no_name_says_which(tmp_path: Path, templates: object) -> None:
    with pytest.raises(UsageError, match="called 'default', only rag, tool_use"):
        ChatTemplate(written(tmp_path, templates))


@pytest.mark.parametrize("form", ["text", "mapping"])
def test_templates_of_a_model_are_those_of_its_artifact(tmp_path: Path, form: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(written(tmp_path, None))
    tokenizer.chat_template = PLAIN if form == "text" else {"default": PLAIN, "tool_use": "tools"}
    tokenizer.save_pretrained(tmp_path / "model")  # in files beside the config
    saved = folder_tokenizer(tmp_path / "model")
    saved.save_pretrained(tmp_path / "artifact", save_jinja_files=False)  # as artifacts are written
    expected = saved.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(tmp_path / "artifact").render(MESSAGES) == expected


PARTS = {
    "one text": ([{"type": "text", "text": "Whose lamp?"}], "Whose lamp?"),
    "two texts": ([{"type": "text", "text": "Whose"}, {"type": "text", "text": "lamp?"}], "Whose\nlamp?"),
    "texts of a newer interface": ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "a\nb"),
    "texts without a type": ([{"text": "a"}, "b"], "a\nb"),
    "no parts": ([], ""),
    "quotes and braces": ([{"type": "text", "text": "{'a': \"b\"} 👩"}], "{'a': \"b\"} 👩"),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("template", ["plain", "json", "blocks"])
def test_parts_of_a_content_become_one_text(tmp_path: Path, name: str, template: str) -> None:
    parts, text = PARTS[name]
    rendered = ChatTemplate(written(tmp_path, TEMPLATES[template])).render([{"role": "user", "content": parts}])
    assert rendered == ChatTemplate(tmp_path).render([{"role": "user", "content": text}])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "a"}}], "'image_url', not text"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio", "data": ""}], "'input_audio', not text"),
        ([{"type": "text"}], "'text', not text"),
        ([7], "'int', not text"),
        ([None], "'NoneType', not text"),
        ({"text": "a"}, "the content is not a text"),
        (7, "the content is not a text"),
        (None, "the content is not a text"),
    ],
)
def test_content_that_is_no_text_is_refused(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        ChatTemplate(written(tmp_path, PLAIN)).render([*MESSAGES[:1], {"role": "user", "content": content}])
    assert error.value.where.startswith("messages[1]")


def test_content_may_be_nothing_where_tools_are_called(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].name }}{% endif %}{% endfor %}"
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "lamp"}]}
    assert ChatTemplate(written(tmp_path, template)).render([message]) == "lamp"


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
