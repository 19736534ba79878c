"""The entry point: commands, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, ParamSpec

import typer

from wse_emu import __version__
from wse_emu.cli.cache import cache
from wse_emu.cli.exits import EXIT_HELP, Exit, report
from wse_emu.cli.plan import plan
from wse_emu.cli.run import run
from wse_emu.cli.sparsify import sparsify
from wse_emu.cli.verify import verify

P = ParamSpec("P")
_LONGEST_WORD = 200

app = typer.Typer(
    name="wse-emu",
    help="Functional emulator of a wafer-scale AI computer: streams a transformer's weights through a grid of cores, verifies every layer.",
    epilog=EXIT_HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _guarded(command: Callable[P, int]) -> Callable[P, int]:
    """Turn what a command raises into one line on stderr and an exit code."""

    @wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            code = command(*args, **kwargs)
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as e:
            return report(e)
        return code

    return guarded


for _command in (run, verify, plan, sparsify, cache):
    app.command(epilog=EXIT_HELP)(_guarded(_command))


def _print_version(asked: bool) -> None:
    if asked:
        print(f"wse-emu {__version__}", flush=True)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    pass


def _usage(error: Exception) -> int:
    """Exit code of an error that was raised before a command began: nearly always an option that does not parse."""
    # The base class of usage errors lives in click or in typer, by version; all of them know how to say what is wrong.
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return int(report(error))
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "wse-emu"
    said = " ".join(format_message().split()).replace("Value error, ", "").rstrip(".")
    said = " ".join(map(_cut, said.split()))
    print(f"wse-emu: {said}{'' if said.endswith('?') else ';'} see {command} --help", file=sys.stderr)
    return int(Exit.USAGE)


def invoke(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: those of the process; none at all shows the help) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = app(args=words or ["--help"], prog_name="wse-emu", standalone_mode=False)
    except typer.Abort:
        return int(report(KeyboardInterrupt()))
    except SystemExit as e:  # typer's answer to a reader that left while help was written
        if not isinstance(e.__context__, BrokenPipeError):
            raise
        return int(report(e.__context__))
    except Exception as e:
        return _usage(e)
    if result == Exit.INTERRUPTED and not isinstance(result, Exit):  # typer's own code: interrupted before a command began
        return int(report(KeyboardInterrupt()))
    return int(result) if isinstance(result, int) else int(Exit.OK)


def _cut(word: str) -> str:
    """A word of a message, shortened where it is longer than what people can read."""
    return word if len(word) <= _LONGEST_WORD else f"{word[: _LONGEST_WORD // 2]} ({len(word)} characters)"


def run_process() -> int:
    """Run the process's command line and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model may write what the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    return invoke()
