"""The server process: its socket, and how it starts and stops."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from kvslim.errors import UsageError, first_line
from kvslim.runtime.completion import Usage
from kvslim.serve.app import create_app
from kvslim.serve.engine import Engine
from kvslim.serve.model import ServedModel

# Names that only this machine and its containers resolve.
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "*.localhost", "*.internal")
STOPS = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; until the model is there they wait.

    Args:
        host: Name or address of this machine's interface.
        port: TCP port; 0 for any that is free.

    Raises:
        UsageError: The address is no address of this machine, or the port is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:  # a name that is none, such as a..b
        fix = "give another --port; 0 takes any that is free" if port else "give another --host"
        what = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UsageError(f"cannot listen: {what}", where=f"{host}:{port}", fix=fix) from error


def is_local(sock: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def url_of(sock: socket.socket) -> str:
    """What clients call the base URL."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if sock.family == socket.AF_INET6 else f"http://{host}:{port}/v1"


def serve(
    model: ServedModel,
    sock: socket.socket,
    told: Callable[[Usage], None],
    failed: Callable[[BaseException], None],
    ready: Callable[[], None],
) -> None:
    """Serves a model until SIGINT or SIGTERM.

    Every request that has come by then is answered first. A second SIGINT ends all at once.

    Args:
        model: The artifact.
        sock: Where to listen.
        told: Is told what each text took.
        failed: Is told why an answer failed.
        ready: Is called once signals are heard, before the first request is read.
    """
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that hangs up
    hosts = (*LOCAL_NAMES, sock.getsockname()[0]) if is_local(sock) else ("*",)
    with Engine(model.completer, told, failed) as engine:
        app = create_app(model, engine, hosts)
        config = uvicorn.Config(app, log_config=None, log_level="error", access_log=False, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        with _stopping(server):
            ready()
            server.run(sockets=[sock])


@contextmanager
def _stopping(server: uvicorn.Server) -> Iterator[None]:
    """Ends a server by signals that come before it hears them itself, or that it raises once more at its end."""

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
