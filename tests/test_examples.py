"""Every example has a `main` and runs, small."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

SMALL: dict[str, dict[str, Any]] = {
    "custom_kernel": {"n_tokens": 3, "hidden": 5, "n_experts": 2},
    "quickstart": {"rows": 2, "cols": 3, "n_tokens": 4, "max_new_tokens": 2},
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


def test_quickstart_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    load("quickstart").main(**SMALL["quickstart"])
    assert "verified         True\n" in capsys.readouterr().out
