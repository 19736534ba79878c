"""What a command's exit code means, and how an error becomes one line and a code."""

from __future__ import annotations

import os
import sys
import traceback
from enum import IntEnum

from wse_emu.foundation.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    NumberOverflowError,
    PlacementError,
    SaveError,
    SpecError,
    SramOverflowError,
    StoreError,
    TieError,
    TraceError,
    WseError,
)

DEBUG_VARIABLE = "WSE_EMU_DEBUG"
"""Environment variable; ``1`` shows the traceback of an error."""


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    VERIFICATION_FAILED = 1
    USAGE = 2
    DOES_NOT_FIT = 3
    CHECKPOINT = 4
    INTERNAL = 70
    INTERRUPTED = 130
    BROKEN_PIPE = 141


EXIT_HELP = f"""\b
Exit codes:
  0    done
  1    verification failed
  2    bad usage or input
  3    the model does not fit on the wafer
  4    checkpoint or storage problem
  70   an error of wse-emu itself
  130  interrupted
  141  the reader of the output went away
{DEBUG_VARIABLE}=1 shows the traceback of an error.
"""

_CODES: tuple[tuple[type[BaseException], Exit], ...] = (
    (ConfigError, Exit.CHECKPOINT),  # before SpecError, its base
    (CheckpointError, Exit.CHECKPOINT),
    (StoreError, Exit.CHECKPOINT),
    (SaveError, Exit.CHECKPOINT),
    (SramOverflowError, Exit.DOES_NOT_FIT),
    (PlacementError, Exit.DOES_NOT_FIT),
    (SpecError, Exit.USAGE),
    (InputError, Exit.USAGE),
    (TraceError, Exit.USAGE),
    (NumberOverflowError, Exit.USAGE),  # of a format that was asked for
    (TieError, Exit.USAGE),  # by a rule that was asked for
    (KeyboardInterrupt, Exit.INTERRUPTED),
    (BrokenPipeError, Exit.BROKEN_PIPE),
    (WseError, Exit.INTERNAL),
    (OSError, Exit.CHECKPOINT),  # a disk that is full, a folder that may not be read
)


def exit_code(error: BaseException) -> Exit:
    """Exit code that stands for `error`."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Exit.INTERNAL)


def message(error: BaseException) -> str:
    """One line for people: what went wrong, without the traceback."""
    code = exit_code(error)
    if code is Exit.INTERRUPTED:
        return "interrupted"
    text = " ".join(str(error).split())
    if code is Exit.INTERNAL:
        hint = f"an error of wse-emu itself; run again with {DEBUG_VARIABLE}=1 and report the traceback"
        return f"{type(error).__name__}: {text} ({hint})"
    return text or type(error).__name__


def report(error: BaseException) -> Exit:
    """Write `error` to stderr as one line (with `DEBUG_VARIABLE`, its traceback before it) and return its exit code."""
    code = exit_code(error)
    if code is Exit.BROKEN_PIPE:
        # Nobody reads any more; a second failure while the interpreter flushes stdout would only add noise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error)
    print(f"wse-emu: {message(error)}", file=sys.stderr)
    return code
