"""Options, fixtures and the table of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.racing import Machine, Race, Row, measure_machine, table

_ROWS = pytest.StashKey[list[Row]]()
_MACHINES = pytest.StashKey[list[Machine]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--smoke``."""
    parser.addoption("--smoke", action="store_true", help="run every benchmark once, at a tiny size, to see that it works")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One table: ours in place of pytest-benchmark's."""
    config.option.benchmark_quiet = True
    config.stash[_ROWS], config.stash[_MACHINES] = [], []


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether this is a run at tiny sizes."""
    return bool(request.config.getoption("--smoke"))


@pytest.fixture(scope="session", autouse=True)
def machine(request: pytest.FixtureRequest, smoke: bool) -> None:
    """Measure the machine's peaks before the first race; they are measured again at the end."""
    request.config.stash[_MACHINES].append(measure_machine(smoke=smoke))


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest, smoke: bool) -> Race:
    """A race under this benchmark's name."""
    file, test = Path(request.node.path).stem.removeprefix("bench_"), request.node.name.removeprefix("test_")
    return Race(benchmark, f"{file}: {test}", request.config.stash[_ROWS], smoke=smoke)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, with the better of the two measurements of every peak."""
    rows = config.stash[_ROWS]
    if not rows:
        return
    machines = [*config.stash[_MACHINES], measure_machine(smoke=bool(config.getoption("--smoke")))]
    best = Machine(max(m.flops for m in machines), max(m.bytes for m in machines))
    terminalreporter.section("benchmarks")
    for line in table(rows, best):
        terminalreporter.write_line(line)
