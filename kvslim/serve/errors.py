"""Errors as OpenAI's API gives them: a status, and an object `error` with message, type, parameter and code."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvslim.errors import KvslimError


class ApiError(Exception):
    """A request that gets no answer.

    Args:
        message: What is wrong, and what to do about it.
        status: The HTTP status.
        parameter: The parameter of the request that is wrong.
        code: A word for clients that tell errors apart.
    """

    def __init__(
        self,
        message: str,
        *,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        parameter: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.parameter, self.code = message, status, parameter, code

    @classmethod
    def refusal(cls, error: KvslimError, parameter: str, code: str | None = None) -> ApiError:
        """A request that is refused for what it asks."""
        return cls(f"{error.message}; {error.fix}", parameter=parameter, code=code)

    @classmethod
    def failure(cls, error: BaseException) -> ApiError:
        """A request that was right, and whose answer failed."""
        message = error.message if isinstance(error, KvslimError) else f"{type(error).__name__}: {error}"
        return cls(message, status=HTTPStatus.INTERNAL_SERVER_ERROR)

    def body(self) -> dict[str, Any]:
        """The JSON of the response, or of an event in a stream."""
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}


async def respond(request: Request, error: Exception) -> Response:
    """The response to a request that failed with an `ApiError`, in routing, or by a bug."""
    if isinstance(error, HTTPException):
        error = ApiError(f"{error.detail}: {request.method} {request.url.path}", status=HTTPStatus(error.status_code))
    elif not isinstance(error, ApiError):
        error = ApiError.failure(error)
    headers = {"retry-after": "1"} if error.status is HTTPStatus.SERVICE_UNAVAILABLE else None
    return JSONResponse(error.body(), error.status, headers)
