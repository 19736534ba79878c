"""Options, fixtures and the table of the benchmarks."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peaks import Machine, measure_machine
from benchmarks.racing import Race, Row, table

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


@pytest.fixture(scope="module", autouse=True)
def machine(request: pytest.FixtureRequest, smoke: bool) -> None:
    """Measure the machine's peaks before each file's first race, and again at the end; of a smoke run only once."""
    machines = request.config.stash[_MACHINES]
    if not (smoke and machines):
        machines.append(measure_machine(smoke=smoke))


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest, smoke: bool) -> Race:
    """A race under this benchmark's name."""
    file, test = Path(request.node.path).stem.removeprefix("bench_"), request.node.name.removeprefix("test_")
    name = request.node.callspec.id if hasattr(request.node, "callspec") else test.replace("_", " ")
    return Race(benchmark, f"{file}: {name}", request.config.stash[_ROWS], smoke=smoke)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, with the best measurement of every peak."""
    rows, machines = config.stash[_ROWS], config.stash[_MACHINES]
    if not rows:
        return
    terminalreporter.section("benchmarks")
    if config.getoption("--smoke"):
        for row in rows:
            terminalreporter.write_line(f"{row.name} beside {', '.join(row.peers) or 'nothing'}")
        terminalreporter.write_line("Smoke run: tiny sizes, every side ran once, its result was checked. It says nothing about time.")
        return
    for line in table(rows, reduce(Machine.better, machines, measure_machine(smoke=False))):
        terminalreporter.write_line(line)
