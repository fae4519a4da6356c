"""The server process: its socket, and how it starts and stops."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from kvslim.errors import UsageError
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
    except OSError as error:
        fix = "give another --port; 0 takes any that is free" if port else "give another --host"
        raise UsageError(f"cannot listen: {error.strerror}", where=f"{host}:{port}", fix=fix) from error


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
) -> None:
    """Serves a model until SIGINT or SIGTERM.

    Every request that has come by then is answered first. A second SIGINT ends all at once.

    Args:
        model: The artifact.
        sock: Where to listen.
        told: Is told what each text took.
        failed: Is told why an answer failed.
    """
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that hangs up
    hosts = LOCAL_NAMES if is_local(sock) else ("*",)
    with Engine(model.completer, told, failed) as engine, _signals_end_here():
        app = create_app(model, engine, hosts)
        config = uvicorn.Config(app, log_config=None, log_level="error", access_log=False, lifespan="off", ws="none")
        uvicorn.Server(config).run(sockets=[sock])


@contextmanager
def _signals_end_here() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more at its end, where stopping is all that was wanted."""
    before = {number: signal.signal(number, lambda *_: None) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
