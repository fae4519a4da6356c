"""`kvslim serve` and OpenAI's own client: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from starlette.requests import Request
from support.paths import ROOT
from support.server import PATIENCE, Server
from support.tiny_chat import completed, write_chat
from support.tiny_tokenizer import byte_tokenizer

from kvslim.cli import app
from kvslim.runtime.generate import Sampling
from kvslim.serve.app import _body
from kvslim.serve.engine import MOST_WAITING
from kvslim.serve.errors import ApiError
from kvslim.serve.requests import ChatRequest, CompletionRequest
from kvslim.serve.server import is_local, listen, url_of

MODEL = "tiny"
LIMIT = 40
MESSAGES: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
RENDERED = "<system>Be kind.\n<user>hello\n<assistant>"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("served") / MODEL)


@pytest.fixture(scope="module")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    errors = tmp_path_factory.mktemp("log") / "stderr"
    with Server(artifact, errors, "--context", "512", "-n", LIMIT) as server:
        yield server


@pytest.fixture
def client(server: Server) -> OpenAI:
    return server.client()


def test_conversation_is_answered(client: OpenAI, artifact: Path) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == completed(artifact, RENDERED, 12)
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", MODEL, "chatcmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(RENDERED), 12)
    assert answer.usage.total_tokens == len(RENDERED) + 12


def test_stream_has_the_same_text_in_pieces(client: OpenAI, artifact: Path) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *chunks, last, usage = stream
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    assert all(pieces)
    assert len(pieces) > 3
    assert "".join(map(str, pieces)) == completed(artifact, RENDERED, 12)
    assert last.choices[0].finish_reason == "length"
    assert {chunk.choices[0].finish_reason for chunk in (first, *chunks)} == {None}
    assert {chunk.id for chunk in (first, *chunks, last, usage)} == {first.id}
    assert usage.choices == []
    assert usage.usage is not None
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (len(RENDERED), 12)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_stop_strings_end_an_answer(client: OpenAI, artifact: Path, streamed: bool, many: bool) -> None:
    whole = completed(artifact, RENDERED, 20)
    stop = whole[5:8]
    options: Any = {"stop": ["nowhere", stop] if many else stop, "temperature": 0, "max_tokens": 20}
    if streamed:
        chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        (choice,) = client.chat.completions.create(model=MODEL, messages=MESSAGES, **options).choices
        text, reason = str(choice.message.content), choice.finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_seed_draws_the_text_and_no_seed_another_each_time(client: OpenAI, artifact: Path) -> None:
    def drawn(**options: Any) -> str:
        return client.completions.create(model=MODEL, prompt="hello", **options).choices[0].text

    by_seed = {seed: drawn(seed=seed) for seed in (1, 2, -1)}
    assert by_seed[1] == drawn(seed=1) == completed(artifact, "hello", 16, Sampling(1.0, seed=1))
    assert by_seed[-1] == completed(artifact, "hello", 16, Sampling(1.0, seed=2**64 - 1))
    assert len({*by_seed.values(), drawn(), drawn()}) == 5
    sampling = Sampling(0.7, top_k=50, top_p=0.9, seed=3, repetition_penalty=1.3)
    expected = completed(artifact, "hello", 16, sampling)
    extra = {"top_k": 50, "repetition_penalty": 1.3}
    assert drawn(temperature=0.7, top_p=0.9, seed=3, extra_body=extra) == expected


IDS = byte_tokenizer().encode("hello").ids
PROMPTS: dict[str, tuple[Any, list[str]]] = {
    "a text": ("hello", ["hello"]),
    "texts": (["hello", "a"], ["hello", "a"]),
    "ids": (IDS, ["hello"]),
    "lists of ids": ([IDS, [*IDS, *IDS]], ["hello", "hellohello"]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_continued(client: OpenAI, artifact: Path, name: str) -> None:
    prompt, texts = PROMPTS[name]
    answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0)
    expected = [completed(artifact, text, 16) for text in texts]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16 * len(texts)
    streamed = [""] * len(texts)
    for chunk in client.completions.create(model=MODEL, prompt=prompt, temperature=0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_answer_has_no_more_tokens_than_the_server_allows(client: OpenAI) -> None:
    for most in (LIMIT + 1, None):
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=most, temperature=0)
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (LIMIT, "length")


def test_next_request_uses_the_prefix_that_the_cache_holds(client: OpenAI, artifact: Path) -> None:
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=9)
    answer = first.choices[0].message.content
    turns = [*MESSAGES, {"role": "assistant", "content": answer}, {"role": "user", "content": "two"}]
    second = client.chat.completions.create(model=MODEL, messages=turns, temperature=0, max_tokens=9)
    assert second.choices[0].message.content == completed(artifact, f"{RENDERED}{answer}\n<user>two\n<assistant>", 9)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= len(RENDERED)


def test_contents_in_parts_and_roles_of_newer_clients_are_read(client: OpenAI, artifact: Path) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=9, user="me", n=1)
    assert answer.choices[0].message.content == completed(artifact, RENDERED, 9)


def test_the_one_model_is_listed(client: OpenAI, server: Server) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, server.name) == (MODEL, "model", MODEL)
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here, only 'tiny'"):
        client.models.retrieve("gpt-4")


CHAT, TEXT = "chat/completions", "completions"
HELLO = {"messages": MESSAGES}
REFUSED: dict[str, tuple[str, Any, int, str | None, str | None, str]] = {
    "not JSON": (TEXT, b"{", 400, "body", None, "not JSON"),
    "not an object": (TEXT, b"[]", 400, "body", None, "send a JSON object"),
    "nested too deeply": (TEXT, b"[" * 100_000, 400, "body", None, "too deeply"),
    "too large": (TEXT, b" " * (16 * 2**20 + 1), 413, None, None, "larger than 16 MiB"),
    "no prompt": (TEXT, {}, 400, "prompt", None, "send a text or token ids"),
    "no prompts": (TEXT, {"prompt": []}, 400, "prompt", None, "there is no prompt"),
    "an empty prompt": (TEXT, {"prompt": ""}, 400, "prompt", None, "there is no prompt"),
    "an empty list of ids": (TEXT, {"prompt": [[]]}, 400, "prompt", None, "no tokens"),
    "a mixed list": (TEXT, {"prompt": ["a", 3]}, 400, "prompt", None, "send a text or token ids"),
    "an unknown id": (TEXT, {"prompt": [257]}, 400, "prompt", None, "tokens 0 to 256"),
    "a negative id": (TEXT, {"prompt": [-1]}, 400, "prompt", None, "send a text or token ids"),
    "a huge id": (TEXT, {"prompt": [10**20]}, 400, "prompt", None, "send a text or token ids"),
    "log probabilities": (
        TEXT,
        {"prompt": "a", "logprobs": 0},
        400,
        "logprobs",
        "unsupported_parameter",
        "not supported",
    ),
    "a long prompt": (TEXT, {"prompt": "a" * 512}, 400, "prompt", "context_length_exceeded", "in a cache of 512"),
    "a long conversation": (
        CHAT,
        {"messages": [{"role": "user", "content": "a" * 512}]},
        400,
        "messages",
        "context_length_exceeded",
        "in a cache of 512",
    ),
    "no messages": (CHAT, {"messages": []}, 400, "messages", None, "send a list of messages"),
    "no role": (CHAT, {"messages": [{"content": "a"}]}, 400, "messages[0].role", None, "no role"),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0]", None, "not a text"),
    "a picture": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        400,
        "messages[0].content[0]",
        None,
        "'image_url', not text",
    ),
    "another model": (CHAT, {**HELLO, "model": "gpt-4"}, 404, "model", "model_not_found", "only 'tiny'"),
    "a misspelt name": (TEXT, {"promt": "a"}, 400, "promt", "unknown_parameter", "did you mean 'prompt'?"),
    "two choices": (CHAT, {**HELLO, "n": 2}, 400, "n", "unsupported_parameter", "not supported"),
    "tools": (CHAT, {**HELLO, "tools": [{}]}, 400, "tools", "unsupported_parameter", "not supported"),
    "JSON alone": (
        CHAT,
        {**HELLO, "response_format": {"type": "json_object"}},
        400,
        "response_format",
        "unsupported_parameter",
        "not supported",
    ),
    "no tokens": (CHAT, {**HELLO, "max_tokens": 0}, 400, "max_tokens", None, "greater than or equal to 1"),
    "too warm": (CHAT, {**HELLO, "temperature": 2.1}, 400, "temperature", None, "less than or equal to 2"),
    "a text for a number": (CHAT, {**HELLO, "temperature": "0"}, 400, "temperature", None, "valid number"),
    "an empty stop": (CHAT, {**HELLO, "stop": ""}, 400, "stop", None, "a stop string is empty"),
    "no endpoint": ("embeddings", {}, 404, None, None, "Not Found: POST /v1/embeddings"),
    "no method": ("models", {}, 405, None, None, "Method Not Allowed: POST /v1/models"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("streamed", [False, True])
def test_refusal_has_the_form_of_openai(server: Server, name: str, streamed: bool) -> None:
    path, body, status, parameter, code, words = REFUSED[name]
    if streamed and isinstance(body, dict):
        body = {**body, "stream": True}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx2.post(f"{server.url}/{path}", content=content)
    (error,) = response.json().values()
    assert (response.status_code, list(response.json())) == (status, ["error"])
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", parameter, code)
    assert words in error["message"]


def test_parameters_that_ask_for_nothing_are_taken(server: Server, artifact: Path) -> None:
    asked = {"logprobs": False, "frequency_penalty": 0.0, "tools": [], "stop": None, "logit_bias": {}, "store": True}
    body = {**HELLO, **asked, "temperature": 0, "max_tokens": 6}
    response = httpx2.post(f"{server.url}/chat/completions", json=body)
    assert response.json()["choices"][0]["message"]["content"] == completed(artifact, RENDERED)


def test_page_with_a_name_of_its_own_for_this_machine_reads_nothing(server: Server) -> None:
    for host, status in (("evil.example", 400), ("[", 400), ("LOCALHOST", 200), ("[::1]:80", 200), ("a.internal", 200)):
        found = httpx2.get(f"{server.url}/models", headers={"host": host})
        assert found.status_code == status
        assert status == 200 or found.json()["error"]["type"] == "invalid_request_error"


def test_what_answers_took_goes_to_stderr(server: Server, client: OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="one two three", temperature=0, max_tokens=3)
    assert server.errors.splitlines()[-1].startswith("13 prompt tokens, 3 new at ")


def test_model_without_a_template_continues_prompts_alone(tmp_path: Path) -> None:
    base = write_chat(tmp_path / "base", template=None)
    with Server(base, tmp_path / "stderr") as server:
        client = server.client()
        assert client.completions.create(model="base", prompt="a", temperature=0).choices[0].text == completed(
            base, "a", 16
        )
        with pytest.raises(openai.BadRequestError, match="send a prompt to /v1/completions"):
            client.chat.completions.create(model="base", messages=MESSAGES)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--context", "513"], 2, "more than the model's 512 positions"),
        (["-n", "0"], 2, "--max-new-tokens"),
        (["--port", "70000"], 2, "--port"),
        (["--host", "192.0.2.1", "--port", "0"], 2, "give another --host"),
        (["--host", "no.such.host.invalid"], 2, "cannot listen"),
        (["--host", "a..b"], 2, "cannot listen"),
    ],
)
def test_serve_refuses_what_it_cannot_do(
    artifact: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert app.run(["serve", str(artifact), *arguments]) == code
    out, err = capsys.readouterr()
    assert (out, words in err) == ("", True), err


def test_broken_chat_template_is_told_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["serve", str(write_chat(tmp_path / "broken", "{% if %}")), "--port", "0"]) == 4
    out, err = capsys.readouterr()
    assert (out, "chat template" in err) == ("", True), err


def test_many_faults_of_a_request_are_not_listed() -> None:
    """Each takes a kilobyte and more in memory."""
    tracemalloc.start()
    for body in ({"prompt": [-1] * 20_000}, {"prompt": [[-1]] * 20_000}, {"prompt": "a", "stop": [1] * 20_000}):
        with pytest.raises(ApiError):
            CompletionRequest.read(json.dumps(body).encode())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_server_is_called_by_the_address_that_it_prints(artifact: Path, tmp_path: Path) -> None:
    with Server(artifact, tmp_path / "stderr", "--host", "127.0.0.2") as server:
        assert "127.0.0.2" in server.url
        assert httpx2.get(f"{server.url}/models").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_server_as_soon_as_the_address_is_told(artifact: Path, tmp_path: Path, number: int) -> None:
    with Server(artifact, tmp_path / "stderr") as server:
        server.process.send_signal(number)
        assert server.process.wait(timeout=PATIENCE) == 0


def test_body_that_does_not_come_is_waited_for_a_while(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvslim.serve.app.BODY_SECONDS", 0.01)

    async def nothing() -> dict[str, Any]:
        await asyncio.sleep(PATIENCE)
        return {}

    with pytest.raises(ApiError, match="did not come") as caught:
        asyncio.run(_body(Request({"type": "http", "headers": []}, nothing)))
    assert caught.value.status == 408


def test_help_names_what_a_user_sets(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["serve", "--help"]) == 0
    out = capsys.readouterr().out
    assert [option for option in ("--host", "--port", "-n", "--context", "--threads") if option not in out] == []


@pytest.mark.parametrize(("host", "url"), [("localhost", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_clients_can_connect_before_the_model_is_there(host: str, url: str) -> None:
    with listen(host, 0) as sock:
        assert url_of(sock).startswith(url)
        assert is_local(sock)
        socket.create_connection((host, sock.getsockname()[1])).close()


def test_other_machines_are_let_in_with_a_hint(artifact: Path, tmp_path: Path) -> None:
    with Server(artifact, tmp_path / "stderr", "--host", "0.0.0.0") as server:
        assert httpx2.get(f"{server.url}/models", headers={"host": "my.machine"}).status_code == 200
        assert server.errors == "hint: other machines can use the model; there is no password\n"


def test_port_that_is_taken_is_refused(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert app.run(["serve", str(artifact), "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"where: 127.0.0.1:{port}" in err
    assert "give another --port" in err


def test_missing_extra_is_named(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "kvslim.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert app.run(["serve", str(artifact)]) == 4
    assert "pip install 'kvslim[serve]'" in capsys.readouterr().err


def test_examples_of_the_docs_are_answered(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`mine` is the artifact of the page, and the server has a port of its own."""
    page = (ROOT / "docs" / "serve.md").read_text()
    (code,), (command,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "sh"))
    mine = shutil.copytree(artifact, tmp_path / "mine")
    with Server(mine, tmp_path / "stderr", "--context", "512") as server:
        exec(code.replace("http://127.0.0.1:8000/v1", server.url), {})
        assert len(capsys.readouterr().out) > 20
        there = command.replace("http://127.0.0.1:8000/v1", server.url)
        done = subprocess.run(there, shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["text"] == completed(artifact, "Once upon a time", 24)


def test_every_parameter_with_an_effect_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "serve.md").read_text()
    names = {*ChatRequest.model_fields, *CompletionRequest.model_fields} - {"messages", "prompt"}
    assert [name for name in names if f"`{name}`" not in page] == []
    assert f"Up to {MOST_WAITING} may wait" in page
