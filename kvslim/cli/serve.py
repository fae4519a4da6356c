"""`kvslim serve`: an artifact behind OpenAI-compatible endpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from kvslim.cli.options import Artifact, Threads
from kvslim.errors import UnsupportedError


def serve(
    artifact: Artifact,
    host: Annotated[str, typer.Option(help="where to listen; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free")] = 8000,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", min=1, help="tokens of an answer at most, whatever a client asks for"),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="capacity of the cache, such as 16k; default: what the artifact is for"),
    ] = None,
    threads: Threads = None,
) -> int:
    """Serve an artifact to clients of OpenAI's API, one request after another.

    For trying it with the tools you have, on this machine. Ctrl-C answers every request that has come, and stops.
    """
    try:
        from kvslim.serve.server import is_local, listen, url_of
        from kvslim.serve.server import serve as run
    except ModuleNotFoundError as error:
        fix = "pip install 'kvslim[serve]'"
        raise UnsupportedError(f"serving needs the package {error.name}", where="kvslim serve", fix=fix) from error
    from kvslim.cli import console
    from kvslim.cli.completions import usage_line
    from kvslim.cli.failures import explained
    from kvslim.cli.inputs import read_length
    from kvslim.serve.model import ServedModel

    with listen(host, port) as sock:
        room = None if context is None else read_length(context, "--context")
        model = ServedModel(artifact, room, max_new_tokens, threads)
        console.print_text(f"serving {model.name} at {url_of(sock)}\n")
        if not is_local(sock):
            console.hint("hint: other machines can use the model; there is no password")
        run(
            model,
            sock,
            told=lambda usage: console.hint(usage_line(usage)),
            failed=lambda error: console.print_error(explained(error)),
        )
    return 0
