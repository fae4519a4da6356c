"""The endpoints: chat completions, completions and models."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvslim.runtime.completion import Usage
from kvslim.serve.answers import ChatForm, CompletionForm, Form
from kvslim.serve.engine import Answer, Engine, Order
from kvslim.serve.errors import ApiError, respond
from kvslim.serve.model import ServedModel
from kvslim.serve.names import OwnNames
from kvslim.serve.requests import ChatRequest, CompletionRequest, TextRequest

LARGEST_BODY = 16 * 2**20
BODY_SECONDS = 30  # a client that sends no more of it would keep the server from ending
Asked = TypeVar("Asked", bound=TextRequest)


def create_app(model: ServedModel, engine: Engine, hosts: Sequence[str]) -> Starlette:
    """The ASGI application.

    Args:
        model: The artifact.
        engine: Answers what is asked of it.
        hosts: Names by which clients may call this server, as patterns.
    """

    async def chat(request: Request) -> Response:
        return await _answered(request, ChatRequest, model.chat_order, ChatForm)

    async def complete(request: Request) -> Response:
        return await _answered(request, CompletionRequest, model.completion_order, CompletionForm)

    async def _answered(
        request: Request, kind: type[Asked], order_of: Callable[[Asked], Order], form_of: type[Form]
    ) -> Response:
        asked = await run_in_threadpool(kind.read, await _body(request))
        model.check_name(asked.model)
        form = form_of(model.name, model.fingerprint)
        answer = engine.submit(await run_in_threadpool(order_of, asked))
        if asked.stream:
            return _Stream(answer, _events(answer, form, asked.stream_options.include_usage))
        return await _whole(request, answer, form)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def named_model(request: Request) -> Response:
        model.check_name(request.path_params["name"])
        return JSONResponse(card)

    card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "kvslim"}
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", named_model),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(OwnNames, names=hosts)],
        exception_handlers={
            ApiError: respond,
            HTTPException: respond,
            Exception: respond,
            ClientDisconnect: lambda *_: Response(),  # nobody reads it
        },
    )


class _Stream(StreamingResponse):
    """Events for a client that reads along; the answer is closed when all are sent or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers={"cache-control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self._answer):
            await super().__call__(scope, receive, send)


async def _events(answer: Answer, form: Form, include_usage: bool) -> AsyncIterator[str]:
    usages = []
    for chunk in form.begin():
        yield _event(chunk)
    try:
        async for place, found in answer:
            if isinstance(found, Usage):
                usages.append(found)
                yield _event(form.end(place, found))
            else:
                yield _event(form.chunk(place, found))
    except ApiError as error:  # the status is sent already
        yield _event(error.body())
        return
    if include_usage:
        yield _event(form.usage_chunk(usages))
    yield "data: [DONE]\n\n"


async def _whole(request: Request, answer: Answer, form: Form) -> Response:
    """The answer in one piece, or nothing at all once the client has gone."""
    with contextlib.closing(answer):
        reading = asyncio.ensure_future(_read(answer))
        leaving = asyncio.ensure_future(_has_left(request))
        try:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not reading.done():
                reading.cancel()
        return JSONResponse(form.whole(*await reading)) if reading.done() else Response()


async def _read(answer: Answer) -> tuple[list[str], list[Usage]]:
    texts, usages = [""] * len(answer.order.prompts), []
    async for place, found in answer:
        if isinstance(found, Usage):
            usages.append(found)
        else:
            texts[place] += found
    return texts, usages


async def _has_left(request: Request) -> None:
    """Returns when the client hangs up; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        ApiError: It is larger than any prompt, or does not come.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise ApiError("the body is larger than 16 MiB", status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    except TimeoutError as error:
        message = f"the body did not come within {BODY_SECONDS} seconds"
        raise ApiError(message, status=HTTPStatus.REQUEST_TIMEOUT) from error
    return bytes(body)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
