"""``wse-emu cache`` on a cache folder of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from wse_emu.cli.app import invoke
from wse_emu.cli.load import tell_of_a_cold_start
from wse_kernels import _cache


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that the process believes in."""
    monkeypatch.setenv(_cache.ENV_CACHE_DIR, str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill() -> Path:
    path = _cache.kernels_root() / _cache.kernels_stamp() / _cache.entry_name("wse_kernels.exp.exp32", "key")
    assert _cache.write_entry(path, b"machine code")
    return path


def test_an_empty_cache_is_said_to_be_empty(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["cache"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0 entries, 0 bytes",
        f"cache folder: {base} (set {_cache.ENV_CACHE_DIR} to move it)",
    ]
    assert not base.exists()


def test_entries_are_listed_then_cleared(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fill()
    assert invoke(["cache", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert (entry["kind"], entry["path"], entry["size_bytes"]) == ("kernels", str(path.parent), path.stat().st_size)
    assert invoke(["cache", "--clear"]) == 0
    assert "all removed" in capsys.readouterr().out
    assert not path.exists()
    assert invoke(["cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == []


def test_a_cold_start_is_told_where_somebody_looks(base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**options: bool) -> str:
        tell_of_a_cold_start(**options)
        return capsys.readouterr().err

    assert told(quiet=False) == ""  # stderr is no terminal here
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert told(quiet=True) == ""
    assert told(quiet=False) == f"first run: the kernels are compiled now and kept in {base / 'kernels'}\n"
    fill()
    assert told(quiet=False) == ""
