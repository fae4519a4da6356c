"""Many clients of `kvslim serve` at once: a queue, clients that hang up, signals in the middle, failures."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from support.modules import modules_after
from support.paths import ROOT
from support.server import Server
from support.tiny_chat import completed, write_chat
from support.tiny_tokenizer import byte_tokenizer

from kvslim.errors import ArtifactError
from kvslim.runtime.completion import Completer, PromptEncoder, Usage
from kvslim.runtime.generate import GREEDY
from kvslim.serve.engine import Engine, Order
from kvslim.serve.errors import ApiError

MODEL = "tiny"
LONG = 400  # tokens of an answer that takes a while


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("served") / MODEL)


@pytest.fixture
def server(artifact: Path, tmp_path: Path) -> Iterator[Server]:
    with Server(artifact, tmp_path / "stderr", "--context", "512") as server:
        yield server


async def asked(client: AsyncOpenAI, number: int, tokens: int) -> str:
    """The answer to a numbered request, in a stream if the number is odd."""
    options: Any = {"model": MODEL, "prompt": prompt(number), "temperature": 0, "max_tokens": tokens}
    if number % 2 == 0:
        return (await client.completions.create(**options)).choices[0].text
    return "".join([chunk.choices[0].text async for chunk in await client.completions.create(**options, stream=True)])


def prompt(number: int) -> str:
    """Some have a beginning in common."""
    return f"{'To begin with, ' * (number % 3)}request {number}"


async def leave(client: AsyncOpenAI, number: int) -> None:
    """Asks for more than can be written soon and hangs up, while it waits in the queue or while it is written."""
    options: Any = {"model": MODEL, "prompt": [prompt(number)] * 100, "temperature": 0, "max_tokens": LONG}
    if number % 2 == 0:
        asking = asyncio.ensure_future(client.completions.create(**options))
        await asyncio.sleep(0.1 * number)
        assert asking.cancel()
    else:
        stream = await client.completions.create(**options, stream=True)
        async for _ in stream:
            break
        await stream.close()


def waiting(server: Server) -> Callable[[], bool]:
    """Whether the server writes something: the number of its lines grows."""
    lines = len(server.errors.splitlines())
    return lambda: len(server.errors.splitlines()) > lines


def test_fifty_requests_and_clients_that_leave_mix_nothing_up(server: Server, artifact: Path) -> None:
    expected = {number: completed(artifact, prompt(number), 16 + number) for number in range(50)}

    async def crowd() -> dict[int, str]:
        async with server.async_client() as client:
            leaving = [leave(client, number) for number in range(1, 9)]
            answers, *_ = await asyncio.gather(
                asyncio.gather(*(asked(client, number, 16 + number) for number in expected)), *leaving
            )
        return dict(zip(expected, answers, strict=True))

    assert asyncio.run(crowd()) == expected
    before = server.memory
    for _ in range(2):
        assert asyncio.run(crowd()) == expected
    assert server.memory - before < 16 * 2**20
    assert "error" not in server.errors
    assert server.errors.count(", interrupted") > 8


@pytest.mark.parametrize("stream", [True, False])
def test_answer_of_a_client_that_hangs_up_is_not_written_on(server: Server, stream: bool) -> None:
    options: Any = {"model": MODEL, "prompt": ["a"] * 100, "max_tokens": LONG, "temperature": 0, "stream": stream}

    async def hang_up() -> None:
        async with server.async_client() as client:
            has_begun = waiting(server)
            asking = asyncio.ensure_future(client.completions.create(**options))
            while not has_begun():
                await asyncio.sleep(0.01)
            if stream:
                await (await asking).close()
            else:
                assert asking.cancel()

    asyncio.run(hang_up())
    answer = httpx2.post(f"{server.url}/completions", json={"prompt": "z", "max_tokens": 2}, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 2
    assert server.errors.count(", interrupted") <= 1  # none where it left between two texts
    assert len(server.errors.splitlines()) < 100


@pytest.fixture(scope="module")
def long_texts(artifact: Path) -> list[str]:
    return [completed(artifact, prompt(number), LONG) for number in range(20)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_the_middle_loses_no_answer(server: Server, long_texts: list[str], number: signal.Signals) -> None:
    async def stopped_between() -> list[str]:
        async with server.async_client() as client:
            has_begun = waiting(server)
            answers = [asyncio.ensure_future(asked(client, number, LONG)) for number in range(len(long_texts))]
            while not has_begun():
                await asyncio.sleep(0.01)
            assert not all(answer.done() for answer in answers)
            server.stop(number)
            return await asyncio.gather(*answers)

    assert asyncio.run(stopped_between()) == long_texts
    assert server.end() == 0
    assert "error" not in server.errors
    with pytest.raises(openai.APIConnectionError):
        server.client().models.list()


def test_killed_server_leaves_no_answer_that_looks_whole(server: Server, artifact: Path, tmp_path: Path) -> None:
    async def killed_between() -> list[str | BaseException]:
        async with server.async_client() as client:
            has_begun = waiting(server)
            answers = [asyncio.ensure_future(asked(client, number, LONG)) for number in range(20)]
            while not has_begun():
                await asyncio.sleep(0.01)
            server.process.kill()
            return await asyncio.gather(*answers, return_exceptions=True)

    found = asyncio.run(killed_between())
    cut = [answer for answer in found if not isinstance(answer, str)]
    assert cut
    assert {isinstance(error, openai.APIConnectionError | httpx2.RemoteProtocolError) for error in cut} == {True}
    for number, answer in enumerate(found):
        assert not isinstance(answer, str) or answer == completed(artifact, prompt(number), LONG)
    with Server(artifact, tmp_path / "again") as again:
        answer = again.client().completions.create(model=MODEL, prompt="a", temperature=0)
    assert answer.choices[0].text == completed(artifact, "a", 16)


def test_second_interrupt_ends_at_once(server: Server) -> None:
    def body() -> dict[str, Any]:
        return {"prompt": ["a"] * 200, "max_tokens": LONG, "temperature": 0, "stream": True}

    with httpx2.stream("POST", f"{server.url}/completions", json=body()) as response:
        next(lines := response.iter_lines())
        server.stop(signal.SIGINT)
        time.sleep(0.3)
        assert server.process.poll() is None
        server.stop(signal.SIGINT)
        assert server.end() == 0
        del lines
    assert len(server.errors.splitlines()) < 200


def test_client_that_says_nothing_holds_nobody_up(server: Server) -> None:
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as silent:
        assert server.client().models.list().data[0].id == MODEL
        silent.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n")
        assert server.client().models.list().data[0].id == MODEL
    assert server.client().models.list().data[0].id == MODEL
    server.stop()
    assert server.end() == 0
    assert server.errors == ""


def test_server_goes_on_when_nobody_reads_its_errors(artifact: Path) -> None:
    command = [sys.executable, "-m", "kvslim.cli.app", "serve", str(artifact), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().split()[-1]
        process.stderr.close()
        for _ in range(2):
            answer = httpx2.post(f"{url}/completions", json={"prompt": "one", "temperature": 0}).json()
            assert answer["choices"][0]["text"] == completed(artifact, "one", 16)
        process.terminate()
    assert process.returncode == 0


@pytest.fixture
def completer(artifact: Path) -> Completer:
    return Completer(artifact, PromptEncoder(artifact, 257).tokenizer, capacity=64)


def order(text: str, tokens: int = 6) -> Order:
    return Order([byte_tokenizer().encode(text).ids], tokens, GREEDY, ())


async def text_of(engine: Engine, text: str) -> str:
    answer = engine.submit(order(text))
    try:
        return "".join([found async for _, found in answer if isinstance(found, str)])
    finally:
        answer.close()


def test_full_queue_refuses_what_comes_and_takes_more_later(completer: Completer) -> None:
    async def fill() -> None:
        with Engine(completer, lambda _: None, lambda _: None, most_waiting=2) as engine:
            first, second = engine.submit(order("a")), engine.submit(order("b"))
            with pytest.raises(ApiError, match="2 requests are waiting") as error:
                engine.submit(order("c"))
            assert (error.value.status, error.value.body()["error"]["type"]) == (503, "server_error")
            first.close()
            first.close()
            third = engine.submit(order("c"))
            with pytest.raises(ApiError):
                engine.submit(order("d"))
            second.close()
            third.close()

    asyncio.run(fill())


@pytest.mark.parametrize("error", [ArtifactError("broken", where="here", fix="none"), MemoryError("bad alloc")])
def test_failure_ends_one_answer_and_no_other(
    artifact: Path, completer: Completer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    bad_ids = byte_tokenizer().encode("bad").ids
    step, told, failed = completer._session.step, list[Usage](), list[BaseException]()

    def failing(tokens: Any, last: int | None = None) -> Any:
        logits = step(tokens, last)
        if completer._last is not None and completer._last.ids == bad_ids and completer._session.length > 5:
            raise error
        return logits

    async def ask() -> list[str | BaseException]:
        with Engine(completer, told.append, failed.append) as engine:
            texts = ("one", "bad", "badly", "two")
            return await asyncio.gather(*(text_of(engine, text) for text in texts), return_exceptions=True)

    monkeypatch.setattr(completer._session, "step", failing)
    one, bad, badly, two = asyncio.run(ask())
    assert [one, badly, two] == [completed(artifact, text) for text in ("one", "badly", "two")]
    assert isinstance(bad, ApiError)
    assert bad.status == 500
    assert failed == [error]
    assert [usage.cached_tokens for usage in told] == [0, 0, 0]


def test_stream_that_fails_says_so_in_an_event() -> None:
    from kvslim.serve.answers import CompletionForm
    from kvslim.serve.app import _events

    class Failing:
        async def __aiter__(self) -> Any:
            yield 0, "piece"
            raise ApiError.failure(ArtifactError("broken", where="here", fix="none"))

    async def read() -> list[str]:
        return [event async for event in _events(Failing(), CompletionForm("m", "f"), False)]  # type: ignore[arg-type]

    piece, error = asyncio.run(read())
    assert '"piece"' in piece
    assert error == 'data: {"error": {"message": "broken", "type": "server_error", "param": null, "code": null}}\n\n'


def test_server_needs_no_torch() -> None:
    assert modules_after("import kvslim.serve.server, kvslim.cli.serve") & {"torch", "transformers"} == set()
