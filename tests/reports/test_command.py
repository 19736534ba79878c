"""``wse-emu run --trace --report`` with the shipped model, nothing replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wse_emu.cli.app import invoke

from .pages import Page, integer, read
from .test_trace import NUMBERS, slices, validate


@pytest.fixture(autouse=True)
def _own_weights(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the command stores out of the user's cache, without compiling the kernels again."""
    from wse_emu.memoryx import build

    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(build, "cache_directory", lambda cache_dir=None: folder / "weights")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = invoke(["run", "--max-new-tokens", "3", *words, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, json.loads(out)


def test_files_tell_what_the_document_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / name for name in ("ledger", "trace", "report")}
    code, document = run(capsys, *(word for name, file in files.items() for word in (f"--{name}", str(file))))
    assert code == 0
    totals = document["ledger"]["totals"]

    trace = json.loads(files["trace"].read_text(encoding="utf-8"))
    validate(trace)
    leaves = [e["args"] for e in slices(trace)]
    assert {n: sum(a[n] for a in leaves) for n in NUMBERS} == {n: sum(row[n] for row in totals) for n in NUMBERS}
    assert not any(a["kind"] == "probe" for a in leaves)  # the verification's own run is not in it
    assert [e["args"]["phase"] for e in slices(trace, "pass")] == ["prompt", "decode", "decode"]
    other = trace["otherData"]
    assert (other["model"], other["wafer"], other["rows"]) == ("pydoc-moe-8x2", "WSE-3", document["wafer"]["rows"])
    assert json.loads(files["ledger"].read_text(encoding="utf-8"))["passes"][0]["phase"] == "prompt"

    page = read(files["report"].read_text(encoding="utf-8"))
    stages = {row[0]: row[1:] for row in page.tables["by-stage"][1:-1]}
    for stage, cells in stages.items():
        assert integer(cells[0]) == sum(row["macs"] for row in totals if row["stage"] == stage)
        assert integer(cells[1]) == sum(row["bytes"] for row in totals if (row["stage"], row["kind"]) == (stage, "stream"))
    assert set(stages) == {row["stage"] for row in totals}
    assert document["prompt"]["text"] + document["generated"]["text"] in page.sections["text"]
    assert "verified against the float64 reference" in page.sections[""]
    assert "probe channel" not in "".join(page.tables["by-layer"][0])
    for part, seconds in document["host_seconds"].items():
        assert [part.replace("_", " "), f"{seconds:.2f}"] in page.tables["host-seconds"]


def test_a_prompt_of_markup_is_text_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.html"
    code, _ = run(capsys, "--no-verify", "--prompt", "<script>alert('x')</script>", "--report", str(file))
    assert code == 0
    page: Page = read(file.read_text(encoding="utf-8"))
    assert "<script>alert('x')</script>" in page.sections["text"]
    assert "not verified in this run" in page.sections[""]


@pytest.mark.parametrize("option", ["--trace", "--report"])
def test_a_file_that_cannot_be_written_is_exit_four(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = invoke(["run", "--json", "--no-verify", "--max-new-tokens", "1", option, str(tmp_path / "no" / "file")])
    out, err = capsys.readouterr()
    assert (code, out) == (4, "")
    assert f"{option} {tmp_path / 'no' / 'file'}: cannot be written (there is no directory" in err
