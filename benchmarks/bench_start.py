"""Cold and warm start of ``wse-emu run`` on the shipped model, each in a fresh process, from the shell to its end, verification included.

    pytest benchmarks/bench_start.py --benchmark-only

Cold: no compiled kernel and no layout file in the caches. Warm: both are there. Beside the warm start stands a process that imports NumPy
and Numba and ends: no program that uses them starts faster. The system's file cache holds all files that are read, in both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import python
from benchmarks.racing import Race, Work

COLD_ROUNDS, WARM_ROUNDS = 2, 7
NEW_TOKENS = 24


ONLY_WEIGHTS_THERE = """
import sys
from pathlib import Path
from wse_emu.memoryx import build
folder = Path(sys.argv.pop(1))
build.cache_directory = lambda cache_dir=None: folder
from wse_emu.cli.entry import main
main()
"""
"""The command with its layout file in a folder and the kernels of the user's cache: a smoke run has no time to compile them."""


def start(caches: Path, n_new: int, *, smoke: bool = False) -> dict[str, Any]:
    """Run the command with its caches (in a smoke run, that of weights) in a folder; the document that it prints, checked."""
    words = ["run", "--json", "--max-new-tokens", str(n_new)]
    if smoke:
        text = python(["-c", ONLY_WEIGHTS_THERE, str(caches), *words])
    else:
        text = python(["-m", "wse_emu", *words], WSE_EMU_CACHE_DIR=str(caches))
    document: dict[str, Any] = json.loads(text)
    assert document["verification"]["passed"]
    assert len(document["generated"]["ids"]) == n_new
    return document


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def test_start(benchmark: Any, race: Race, smoke: bool, tmp_path: Path) -> None:
    """In a smoke run only a start with the kernels that the user's cache has."""
    if smoke:
        took = [benchmark.pedantic(seconds, args=(lambda: start(tmp_path / "smoke", 2, smoke=True),), rounds=1)]
        race.note(took[0], {}, Work(tokens=2), ", smoke")
        return
    cold, warm, bare, ids = [], [], [], []

    def cold_start() -> None:
        folder = tmp_path / f"cold {len(cold)}"
        assert not folder.exists()
        cold.append(seconds(lambda: ids.append(start(folder, NEW_TOKENS)["generated"]["ids"])))

    benchmark.pedantic(cold_start, rounds=COLD_ROUNDS)
    for _ in range(WARM_ROUNDS):
        warm.append(seconds(lambda: ids.append(start(tmp_path / "cold 0", NEW_TOKENS)["generated"]["ids"])))
        bare.append(seconds(lambda: python(["-c", "import numpy, numba"])))
    assert all(chosen == ids[0] for chosen in ids), "a cold and a warm start generate different tokens"
    race.note(min(cold), {"warm start": min(warm)}, Work(tokens=NEW_TOKENS), ", cold")
    race.note(min(warm), {"import numpy, numba": min(bare)}, Work(tokens=NEW_TOKENS), ", warm")


@pytest.fixture(autouse=True)
def _no_stray_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes compile with what a user's shell would give them."""
    monkeypatch.delenv("NUMBA_DISABLE_JIT", raising=False)
