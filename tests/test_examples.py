"""Every example has a `main` and runs, small."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

SMALL: dict[str, dict[str, Any]] = {
    "custom_kernel": {"n_tokens": 3, "hidden": 5, "n_experts": 2},
    "moves": {"m": 5, "k": 7, "rows": 2, "cols": 3},
    "quickstart": {"rows": 2, "cols": 3, "n_tokens": 4, "max_new_tokens": 2},
    "routing_research": {"rows": 2, "cols": 3, "n_tokens": 4, "max_new_tokens": 3},
    "sliding_window": {"rows": 4, "cols": 2, "n_tokens": 20, "window": 5},
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    load(name).main(**SMALL[name])
    assert capsys.readouterr().out


def test_custom_kernel_agrees_in_all_executors(capsys: pytest.CaptureFixture[str]) -> None:
    load("custom_kernel").main(n_tokens=4, hidden=7, n_experts=5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "the three agree bit for bit: True"
    assert ["140 multiply-adds" in line for line in lines[:-1]] == [True] * 3


def test_moves_agree_in_all_executors(capsys: pytest.CaptureFixture[str]) -> None:
    load("moves").main(**SMALL["moves"])
    error, same, *rows = capsys.readouterr().out.splitlines()
    assert float(error.split()[-1]) < 1e-5
    assert same == "the three agree bit for bit: True"
    assert {row.split()[0]: int(row.split()[3]) for row in rows} == {"inject": 196, "launch": 0, "chain": 40, "deliver": 20, "gather": 12}


def test_quickstart_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    load("quickstart").main(**SMALL["quickstart"])
    assert "verified         True\n" in capsys.readouterr().out


def bytes_of(lines: list[str]) -> dict[str, list[int]]:
    """Name of each line of a table to its numbers."""
    cells = (re.match(r"(.+?) {2,}([\d, ]+) bytes$", line) for line in lines)
    return {cell[1]: [int(n.replace(",", "")) for n in cell[2].split()] for cell in cells if cell}


def test_replayed_routing_streams_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    load("routing_research").main(**SMALL["routing_research"])
    lines = capsys.readouterr().out.splitlines()
    times = [[int(n) for n in re.findall(r"\d+", line.partition("[")[2].partition("]")[0])] for line in lines if line.startswith("layer")]
    assert [sum(of_layer) for of_layer in times] == [2 * (4 + 2)] * 3  # two experts for each of four prompt tokens and two that followed
    streamed = {name: numbers[0] for name, numbers in bytes_of(lines).items()}
    assert len(streamed) == 4
    measured = streamed["measured, 2 x 3 cores"]
    assert streamed["replayed on the whole wafer"] == measured
    assert measured <= streamed["worst case of the routing"] <= streamed["the same, every expert streamed"]


def test_a_window_visits_fewer_keys_and_keeps_fewer(capsys: pytest.CaptureFixture[str]) -> None:
    load("sliding_window").main(**SMALL["sliding_window"])
    full, windowed, same = capsys.readouterr().out.splitlines()
    of_full, of_windowed = (
        tuple(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:multiply|bytes)", line)) for line in (full, windowed)
    )
    assert all(few < many for few, many in zip(of_windowed, of_full, strict=True))
    assert full.endswith("20 tokens kept, verified True")
    assert windowed.endswith(" 5 tokens kept, verified True")
    assert same.endswith("True")


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_docs_tell_of_every_example(name: str) -> None:
    text = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    assert f"examples/{name}.py" in text
