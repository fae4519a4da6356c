"""The names by which clients may call the server."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from kvslim.serve.errors import ApiError, respond


class OwnNames:
    """Answers requests under some names alone.

    A page of the web can have its own name resolve to this machine, and would then read what the server says.

    Args:
        app: What answers.
        names: Patterns of a shell for names in small letters.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self._app, self._names = app, tuple(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it as the API refuses all else."""
        if scope["type"] != "http" or self._is_known(Headers(scope=scope).get("host", "")):
            await self._app(scope, receive, send)
            return
        error = ApiError("the header Host is no name of this server; call it localhost, or serve with --host 0.0.0.0")
        await (await respond(Request(scope), error))(scope, receive, send)

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # a bracket that is not closed
            return False
        return any(fnmatch(name, pattern) for pattern in self._names)
