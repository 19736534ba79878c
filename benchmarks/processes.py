"""Python in a process of its own, and the anonymous memory of a process (Linux)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(**changes: str) -> dict[str, str]:
    """Of a process that imports this checkout, with changes."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), **changes}


def python(arguments: Sequence[str], **changes: str) -> str:
    """Standard output of this interpreter, run on this checkout with `arguments`; raises with its errors if it fails."""
    done = subprocess.run([sys.executable, *arguments], env=environment(**changes), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed with exit code {done.returncode}:\n{done.stderr}")
    return done.stdout


def anonymous_mb() -> float:
    """Anonymous resident memory of this process, in MB (2**20 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux")


class AnonymousPeak:
    """Largest anonymous memory inside a ``with`` block, sampled every 2 ms by a thread; `mb` holds it afterwards."""

    def __init__(self) -> None:
        self.mb = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.mb = max(self.mb, anonymous_mb())
            if self._ended.is_set():
                return
            time.sleep(0.002)
