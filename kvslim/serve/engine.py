"""One model and many clients: a queue of requests, and the thread that answers them one after another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from queue import SimpleQueue
from threading import Thread
from typing import Self

from kvslim.runtime.completion import Completer, Usage
from kvslim.runtime.generate import Sampling
from kvslim.serve.errors import ApiError

MOST_WAITING = 256


@dataclass(frozen=True)
class Order:
    """What one request asks of the model.

    Attributes:
        prompts: Tokens of each prompt.
        most: Tokens to generate for each at most.
        sampling: How tokens are drawn.
        stops: Strings that end a text.
    """

    prompts: Sequence[Sequence[int]]
    most: int
    sampling: Sampling
    stops: Sequence[str]


class Answer:
    """The texts of an order while they are written; read in the event loop that it was made in.

    Attributes:
        order: What was asked.
        closed: Whether nobody reads it any more.
    """

    def __init__(self, order: Order, on_close: Callable[[], None]) -> None:
        self.order, self.closed = order, False
        self._on_close = on_close
        self._events = asyncio.Queue[tuple[int, str | Usage] | BaseException]()
        self._loop = asyncio.get_running_loop()

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | Usage]]:
        """The place of a prompt with a piece of what follows it, or, at its end, with what it took.

        Raises:
            ApiError: Writing failed.
        """
        left = len(self.order.prompts)
        while left:
            event = await self._events.get()
            if isinstance(event, BaseException):
                raise ApiError.failure(event) from event
            left -= isinstance(event[1], Usage)
            yield event

    def put(self, event: tuple[int, str | Usage] | BaseException) -> None:
        """Gives the reader something to read, from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server was stopped at once
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def close(self) -> None:
        """Says that nobody reads on; what is not written yet never will be."""
        if not self.closed:
            self.closed = True
            self._on_close()


class Engine:
    """Answers orders in the order in which they come. The cache keeps what the next prompt begins with.

    Args:
        completer: The model; used by this engine alone from now on.
        told: Is told what each text took.
        failed: Is told why an answer failed.
        most_waiting: Requests that may wait or be answered at a time.
    """

    def __init__(
        self,
        completer: Completer,
        told: Callable[[Usage], None],
        failed: Callable[[BaseException], None],
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._completer, self._told, self._failed = completer, told, failed
        self._most_waiting, self._waiting, self._stopped = most_waiting, 0, False
        self._answers = SimpleQueue[Answer | None]()
        self._thread = Thread(target=self._work, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread; what somebody still reads ends after the run of the graph that is under way."""
        self._stopped = True
        self._answers.put(None)
        self._thread.join()

    def submit(self, order: Order) -> Answer:
        """Puts an order into the queue. The answer must be closed.

        Raises:
            ApiError: The queue is full.
        """
        if self._waiting >= self._most_waiting:
            message = f"{self._waiting} requests are waiting; try again later"
            raise ApiError(message, status=HTTPStatus.SERVICE_UNAVAILABLE, code="queue_full")
        self._waiting += 1
        answer = Answer(order, self._leave)
        self._answers.put(answer)
        return answer

    def _leave(self) -> None:
        self._waiting -= 1

    def _work(self) -> None:
        while answer := self._answers.get():
            try:
                self._write(answer)
            except BaseException as error:  # even a panic of native code must not end the thread
                self._failed(error)
                answer.put(error)

    def _write(self, answer: Answer) -> None:
        order = answer.order
        for place, ids in enumerate(order.prompts):
            if self._is_unwanted(answer):
                return
            with contextlib.closing(self._completer.stream(ids, order.most, order.sampling, order.stops)) as pieces:
                for piece in pieces:
                    if self._is_unwanted(answer):
                        break
                    if piece:
                        answer.put((place, piece))
            usage = self._completer.usage
            assert usage is not None
            self._told(usage)
            answer.put((place, usage))

    def _is_unwanted(self, answer: Answer) -> bool:
        return answer.closed or self._stopped
