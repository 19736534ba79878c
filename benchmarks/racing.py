"""Races: the emulator and its peers in turns within one run, beside what this machine can do at best."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_TRANSFORMERS = HAS_TORCH and importlib.util.find_spec("transformers") is not None

Call = Callable[[], object]

_ROUND_SECONDS = 0.01
_BUDGET_SECONDS = 2.0
_MIN_ROUNDS, _MAX_ROUNDS = 3, 9
_MAX_CALLS = 10_000
_PAUSE_SECONDS = 0.1
"""Before each side of a race of parallel code: idle threads of either library spin for a while, which slows the other side down."""


class Work(NamedTuple):
    """What one call does."""

    macs: int = 0
    """Multiply-adds."""
    bytes: int = 0
    """Bytes read and written, each once."""
    tokens: int = 0


class Machine(NamedTuple):
    """Best that was measured on this machine, with all its threads."""

    flops: float
    """Operations per second of ``numpy.matmul`` in float32; a multiply-add is two."""
    bytes: float
    """Bytes per second of NumPy's product of a large matrix with a vector, which reads every element once."""

    def fraction(self, work: Work, seconds: float) -> float | None:
        """Fraction of the peak that bounds this work; None for work that is neither arithmetic nor reading."""
        bounds = [2 * work.macs / self.flops, work.bytes / self.bytes]
        return max(bounds) / seconds if any(bounds) else None


def measure_machine(*, smoke: bool) -> Machine:
    """Measure both peaks, the shortest of several calls."""
    n, repeats = (128, 1) if smoke else (2048, 5)
    rng = np.random.default_rng(0)
    a, b, product = rng.random((n, n), np.float32), rng.random((n, n), np.float32), np.empty((n, n), np.float32)
    matrix, vector = np.ones((4 * n, 4 * n), np.float32), np.ones(4 * n, np.float32)  # 256 MB: more than any cache holds
    of_matmul = min(timed(lambda: np.matmul(a, b, out=product), 1) for _ in range(repeats))
    of_reading = min(timed(lambda: matrix @ vector, 1) for _ in range(repeats))
    return Machine(2 * n**3 / of_matmul, matrix.nbytes / of_reading)


def timed(call: Call, n_calls: int) -> float:
    """Seconds of one call, averaged over `n_calls`."""
    start = time.perf_counter()
    for _ in range(n_calls):
        call()
    return (time.perf_counter() - start) / n_calls


@dataclass(frozen=True)
class Row:
    """Result of one race."""

    name: str
    seconds: float
    """Of the emulator's call: its shortest round."""
    work: Work
    peers: Mapping[str, float] = field(default_factory=dict)
    """Seconds of every peer's call, likewise."""

    def ratio(self, peer: str) -> float:
        """How many times the emulator is as fast as a peer."""
        return self.peers[peer] / self.seconds


class Race:
    """Times one call beside its peers, and keeps the row for the table; the fixture `race` makes one for each benchmark.

    Parameters
    ----------
    benchmark : BenchmarkFixture
        Of pytest-benchmark.
    name : str
    rows : list of Row
        The result is appended.
    smoke : bool
        Every side once, to see that it runs.
    """

    def __init__(self, benchmark: Any, name: str, rows: list[Row], *, smoke: bool) -> None:
        self._benchmark, self._name, self._rows, self._smoke = benchmark, name, rows, smoke

    def __call__(self, ours: Call, peers: Mapping[str, Call], work: Work, *, parallel: bool = False) -> Row:
        """Warm all sides up, then let them run in turns; the shortest round of each counts.

        Parameters
        ----------
        ours : callable
            Under pytest-benchmark's clock too.
        peers : mapping
            Name to callable.
        work : Work
            What one call does.
        parallel : bool
            Whether a side uses more than one thread.
        """
        sides = {"": ours, **peers}
        for call in sides.values():
            call()
        once = {name: timed(call, 1) for name, call in sides.items()}
        n_calls = {name: 1 if self._smoke else min(_MAX_CALLS, math.ceil(_ROUND_SECONDS / s)) for name, s in once.items()}
        pause = 0.0 if self._smoke or not parallel else _PAUSE_SECONDS
        of_round = sum(max(_ROUND_SECONDS, s) + pause for s in once.values())
        rounds = 1 if self._smoke else min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(_BUDGET_SECONDS / of_round)))
        best = dict.fromkeys(sides, math.inf)

        def turn(name: str) -> None:
            best[name] = min(best[name], timed(sides[name], n_calls[name]))

        def others() -> None:
            for name in peers:
                time.sleep(pause)
                turn(name)
            time.sleep(pause)

        self._benchmark.extra_info["calls_per_round"] = n_calls[""]
        self._benchmark.pedantic(turn, args=("",), setup=others, rounds=rounds)
        return self.note(best[""], {name: best[name] for name in peers}, work)

    def note(self, seconds: float, peers: Mapping[str, float], work: Work, name: str = "") -> Row:
        """Keep a result; `name` is added to the benchmark's own."""
        row = Row(f"{self._name}{name}", seconds, work, dict(peers))
        self._rows.append(row)
        numbers = {k: v for k, v in work._asdict().items() if v}
        self._benchmark.extra_info |= {f"{k}{name}": v for k, v in {**numbers, "seconds_per_call": seconds}.items()}
        self._benchmark.extra_info |= {f"ratio_to_{peer}{name}": row.ratio(peer) for peer in peers}
        return row


def _time_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def table(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Lines of the one table: times, rates, the fraction of the machine's peak, and how many times as fast as every peer."""
    columns = ("numpy", "torch")
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}} {'a call':>9} {'GFLOP/s':>8} {'GB/s':>6} {'of peak':>8} {'numpy':>6} {'torch':>6}  other peers"]
    for row in rows:
        rates = [f"{rate:.3g}" if rate else "" for rate in (2e-9 * row.work.macs / row.seconds, 1e-9 * row.work.bytes / row.seconds)]
        fraction = machine.fraction(row.work, row.seconds)
        ratios = [f"{row.ratio(peer):.2f}" if peer in row.peers else "" for peer in columns]
        others = [f"{peer} {row.ratio(peer):.2f}" for peer in row.peers if peer not in columns]
        others += [f"{row.work.tokens / row.seconds:.4g} tokens/s"] if row.work.tokens else []
        cells = f"{rates[0]:>8} {rates[1]:>6} {'' if fraction is None else f'{fraction:.0%}':>8} {ratios[0]:>6} {ratios[1]:>6}"
        lines.append(f"{row.name:{width}} {_time_text(row.seconds):>9} {cells}  {', '.join(others)}".rstrip())
    lines += [
        "",
        f"Peak, measured in this run: {machine.flops / 1e9:.0f} GFLOP/s (numpy.matmul, float32), "
        f"{machine.bytes / 1e9:.1f} GB/s (matrix times vector).",
        "Under a peer's name: how many times as fast the emulator is (its shortest round beside the peer's, taken in turns).",
        "Host seconds: they say what this emulator costs, nothing about a wafer.",
    ]  # fmt: skip
    return lines
