"""The process of ``wse-emu``: Ctrl-C ends it with one line and its exit code, also while the command line itself is still loading."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Entry point of the script and of ``python -m wse_emu``; ends the process."""
    try:
        from wse_emu.cli import app

        code = app.run_process()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said: what is left is the interpreter's end
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("wse-emu: interrupted", file=sys.stderr)
        code = 130  # `Exit.INTERRUPTED`, which may not be loaded yet
    sys.exit(code)
