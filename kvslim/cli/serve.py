"""`kvslim serve`: an artifact behind OpenAI-compatible endpoints."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Artifact, Threads
from kvslim.cli.writing import Context, Speculative
from kvslim.errors import UnsupportedError

if TYPE_CHECKING:
    from kvslim.runtime.completion import Usage


def serve(
    artifact: Artifact,
    host: Annotated[str, typer.Option(help="where to listen; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free")] = 8000,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", min=1, help="tokens of an answer at most, whatever a client asks for"),
    ] = None,
    context: Context = None,
    threads: Threads = None,
    speculative: Speculative = "auto",
) -> int:
    """Serve an artifact to clients of OpenAI's API.

    For trying it with the tools you have, on this machine: it answers one request after another. Ctrl-C answers every
    request that has come, and stops.
    """
    try:
        from kvslim.serve.server import is_local, listen, url_of
        from kvslim.serve.server import serve as run
    except ModuleNotFoundError as error:
        fix = "pip install 'kvslim[serve]'"
        raise UnsupportedError(f"serving needs the package {error.name}", where="kvslim serve", fix=fix) from error
    from kvslim.cli.lengths import read_length
    from kvslim.serve.model import ServedModel

    with listen(host, port) as sock:
        room = None if context is None else read_length(context, "--context")
        model = ServedModel(artifact, room, max_new_tokens, threads, speculative)

        def ready() -> None:
            console.print_text(f"serving {model.name} at {url_of(sock)}\n")
            if not is_local(sock):
                console.hint("hint: other machines can use the model; there is no password")

        run(model, sock, _tell, _tell_failure, ready)
    return 0


def _tell(usage: Usage) -> None:
    from kvslim.cli.completions import usage_line

    with contextlib.suppress(OSError):  # nobody reads stderr any more, which is no reason to stop
        console.hint(usage_line(usage))


def _tell_failure(error: BaseException) -> None:
    from kvslim.unexpected import explained

    with contextlib.suppress(OSError):
        console.print_error(explained(error))
