"""The command line. Each verb has its own module, which parses the options and calls one public function."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, NoReturn

import typer

from kvslim import __version__
from kvslim.cli import console, keyboard
from kvslim.cli.analyze import analyze
from kvslim.cli.bench import bench
from kvslim.cli.bundle import bundle
from kvslim.cli.chat import chat
from kvslim.cli.compare import compare
from kvslim.cli.compress import compress
from kvslim.cli.doctor import doctor
from kvslim.cli.eval import evaluate
from kvslim.cli.failures import READER_GONE, InterruptError, usage_error
from kvslim.cli.generate import generate
from kvslim.cli.inspect import inspect
from kvslim.cli.memory import check_memory
from kvslim.cli.methods import methods
from kvslim.cli.plan import plan
from kvslim.cli.recipes import recipes
from kvslim.cli.schema import schema
from kvslim.cli.serve import serve
from kvslim.cli.sweep import sweep
from kvslim.cli.validate import validate
from kvslim.cli.verify import verify
from kvslim.errors import KvslimError, UsageError
from kvslim.unexpected import explained

app = typer.Typer(
    name="kvslim",
    help="Turns a Hugging Face model into an ONNX folder with a several times smaller KV cache, and measures it.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> NoReturn:
    """The `kvslim` command."""
    if not console.debugging():
        warnings.simplefilter("ignore")
    console.accept_any_text()
    keyboard.hear_every_interrupt()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit code: 0 ok, 1 bug, 2 usage, 3 gate, 4 unsupported, broken or out of memory, 5 not found, 130 Ctrl-C,
        141 when the reader of the output is gone.
    """
    as_json = "--json" in arguments
    try:
        code = app(arguments or ["--help"], prog_name="kvslim", standalone_mode=False)
        if code == InterruptError.exit_code:
            raise KeyboardInterrupt
        console.flush()
        return (code or 0) if arguments else UsageError.exit_code
    except KeyboardInterrupt:
        error: KvslimError = InterruptError(
            "interrupted", where="kvslim", fix="run it again; no half-written files are left"
        )
    except (BrokenPipeError, SystemExit) as ended:
        if isinstance(ended, SystemExit) and not ended.code:  # what installs or shows shell completion ends so
            return 0
        console.abandon_stdout()  # the parser turns a pipe that broke into an exit
        return READER_GONE
    except typer.TyperException as caught:
        error = usage_error(caught)
    except BaseException as caught:  # a bug is reported in one line; a panic in Rust code is a BaseException
        error = explained(caught)
    return _report(error, as_json, on_a_line="chat" in arguments[:1])  # it prints an object per answer


def _report(error: KvslimError, as_json: bool, on_a_line: bool) -> int:
    """Prints an error, only on stderr if stdout is closed, and returns its exit code."""
    try:
        console.print_error(error, as_json, on_a_line)
        console.flush()
    except OSError:
        console.abandon_stdout()
        console.print_error(error)
    return error.exit_code


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    if version:
        console.print_text(f"{__version__}\n")
        raise typer.Exit
    check_memory(context.invoked_subcommand or "")


app.command()(compress)
app.command()(plan)
app.command()(analyze)
app.command()(sweep)
app.command()(validate)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(bench)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(inspect)
app.command()(verify)
app.command()(bundle)
app.command()(methods)
app.command()(recipes)
app.command()(doctor)
app.command()(schema)


if __name__ == "__main__":
    main()
