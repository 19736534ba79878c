"""Races: the emulator and its peers in turns within one run, and the one table of all races."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peaks import Machine
from wse_kernels.threads import n_threads

HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_TRANSFORMERS = HAS_TORCH and importlib.util.find_spec("transformers") is not None

Call = Callable[[], object]

_ROUND_SECONDS = 0.01
_BUDGET_SECONDS = 3.0
_MIN_ROUNDS, _MAX_ROUNDS = 3, 15
_MAX_CALLS = 10_000
_PAUSE_SECONDS = 0.15
"""Before each side of a race of parallel code: OpenBLAS's threads spin for about 0.1 s after a call and halve the other side's speed."""


class Work(NamedTuple):
    """What one call does."""

    macs: int = 0
    """Multiply-adds."""
    bytes: int = 0
    """Bytes read and written, each once."""
    tokens: int = 0


@dataclass(frozen=True)
class Row:
    """Result of one race."""

    name: str
    seconds: float
    """Of the emulator's call: its shortest round."""
    work: Work
    peers: Mapping[str, float] = field(default_factory=dict)
    """Seconds of every peer's call, likewise."""
    parallel: bool = True
    """Whether the emulator's call may use all threads."""

    def ratio(self, peer: str) -> float:
        """How many times the emulator is as fast as a peer."""
        return self.peers[peer] / self.seconds


@dataclass(frozen=True)
class Case:
    """Two or more ways to one result."""

    ours: Call
    """The emulator's; returns an array or a tuple of arrays, or what `look` makes them from."""
    peers: Mapping[str, Call]
    """Name to callable; each returns the same."""
    expected: tuple[Any, ...]
    """The right result, by another route: float64 or integers."""
    bounds: tuple[Any, ...]
    """Largest error of each array: one number or an array; 0 where bits are compared."""
    work: Work
    parallel: bool = True
    look: Callable[[Any], Any] = field(default=lambda found: found)
    """Reads the emulator's result, outside the clock."""

    def check(self) -> None:
        """Raise unless every side gives the expected result."""
        for name, call in {"wse-emu": self.ours, **self.peers}.items():
            found: Any = call() if name != "wse-emu" else self.look(call())
            found = found if isinstance(found, tuple) else (found,)
            assert len(found) == len(self.expected) == len(self.bounds), f"{name}: {len(found)} results, {len(self.expected)} expected"
            for i, (value, wanted, bound) in enumerate(zip(found, self.expected, self.bounds, strict=True)):
                array, right = np.asarray(value), np.asarray(wanted)
                assert array.shape == right.shape, f"{name}: result {i} has shape {array.shape}, expected {right.shape}"
                error = np.abs(array.astype(np.float64) - right.astype(np.float64))
                assert np.all(error <= bound), f"{name}: result {i} is off by {error.max():.2g}, allowed are {np.max(bound):.2g}"


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

    def case(self, case: Case) -> Row:
        """Check all sides of a case, then race them."""
        case.check()
        return self(case.ours, case.peers, case.work, parallel=case.parallel)

    def __call__(
        self, ours: Call, peers: Mapping[str, Call], work: Work, *, parallel: bool = True, before: Call | None = None,
        rounds: int | None = None,
    ) -> Row:  # fmt: skip
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
            Whether the emulator's side may use all threads; torch is then given as many, otherwise one.
        before : callable, optional
            Called before every call of every side, outside the clock.
        rounds : int, optional
            Turns of each side; by default as many as three seconds allow, between 3 and 15.
        """
        if HAS_TORCH:
            import torch

            torch.set_num_threads(n_threads() if parallel else 1)
        sides = {"": ours, **peers}
        n_calls = dict.fromkeys(sides, 1)
        pause = 0.0 if self._smoke or not parallel else _PAUSE_SECONDS
        if before is None:
            for call in sides.values():
                call()
        if before is None and not self._smoke:
            once = {name: timed(call, 1) for name, call in sides.items()}
            n_calls = {name: min(_MAX_CALLS, math.ceil(_ROUND_SECONDS / s)) for name, s in once.items()}
            of_round = sum(max(_ROUND_SECONDS, s) + pause for s in once.values())
            rounds = rounds or min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(_BUDGET_SECONDS / of_round)))
        rounds = 1 if self._smoke else rounds or _MIN_ROUNDS
        best = dict.fromkeys(sides, math.inf)

        def ready() -> None:
            time.sleep(pause)
            if before is not None:
                before()

        def turn(name: str) -> None:
            best[name] = min(best[name], timed(sides[name], n_calls[name]))

        def others() -> None:
            for name in peers:
                ready()
                turn(name)
            ready()

        self._benchmark.extra_info["calls_per_round"] = n_calls[""]
        self._benchmark.pedantic(turn, args=("",), setup=others, rounds=rounds)
        return self.note(best[""], {name: best[name] for name in peers}, work, parallel=parallel)

    def note(self, seconds: float, peers: Mapping[str, float], work: Work, name: str = "", *, parallel: bool = True) -> Row:
        """Keep a result; `name` is added to the benchmark's own."""
        row = Row(f"{self._name}{name}", seconds, work, dict(peers), parallel)
        self._rows.append(row)
        numbers = {k: v for k, v in work._asdict().items() if v}
        self._benchmark.extra_info |= {f"{k}{name}": v for k, v in {**numbers, "seconds_per_call": seconds}.items()}
        self._benchmark.extra_info |= {f"ratio_to_{peer}{name}": row.ratio(peer) for peer in peers}
        return row


def timed(call: Call, n_calls: int) -> float:
    """Seconds of one call, averaged over `n_calls`."""
    start = time.perf_counter()
    for _ in range(n_calls):
        call()
    return (time.perf_counter() - start) / n_calls


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def table(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Lines of the one table: a line for each peer of each race."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'benchmark':{width}} {'ours':>8} {'peer':>8} {'ratio':>6}  {'against':20} of peak"]
    for row in rows:
        peak = machine.whole if row.parallel else machine.core
        least, bound = peak.least_seconds(row.work.macs, row.work.bytes)
        fraction = f"{least / row.seconds:7.1%} {bound}" if bound else ""
        sides = [(time_text(s), f"{row.ratio(peer):.2f}", peer) for peer, s in row.peers.items()] or [("", "", "")]
        for i, (seconds, ratio, peer) in enumerate(sides):
            name, ours, of_peak = (row.name, time_text(row.seconds), fraction) if i == 0 else ("", "", "")
            lines.append(f"{name:{width}} {ours:>8} {seconds:>8} {ratio:>6}  {peer:20} {of_peak}".rstrip())
    whole, core = machine.whole, machine.core
    return [
        *lines,
        "",
        "ours, peer: seconds of one call, the shortest round of each side; the sides took turns in this run.",
        "ratio: the peer's seconds divided by ours; above 1 the emulator is faster. against: which peer.",
        "of peak: the least time for the call's multiply-adds (flops) or for its bytes, each read or written once (bytes), whichever is",
        "  longer, divided by its time. Bytes that stay in a cache come faster than memory's peak: more than 100% is then no error.",
        f"peaks, measured in this run: all threads {whole.flops / 1e9:.0f} GFLOP/s (the better of numpy.matmul and multiply-adds in",
        f"  registers) and {whole.bytes / 1e9:.1f} GB/s (reading memory); for a kernel of one core, which has one thread and a block in",
        f"  its cache, {core.flops / 1e9:.0f} GFLOP/s and {core.bytes / 1e9:.0f} GB/s (reading 16 KiB again and again).",
        "Host seconds: they say what this emulator costs, nothing about a wafer.",
    ]  # fmt: skip
