"""The page about a run: self-contained, escaped, and with the numbers of the run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.equivalence.report import Failure, NearTie, StageCheck, VerifyReport
from wse_emu.foundation.errors import InputError
from wse_emu.reports import Passage, Run, report_html, write_report
from wse_emu.wafer.ledger import EDGE_KINDS, FABRIC_KINDS

from .pages import Page, integer, read
from .runs import make_model, prompts


@pytest.fixture(scope="module")
def model() -> wse.WaferModel:
    """A batch of two in prompt chunks, then a verification on the same wafer."""
    model = make_model(rows=3, cols=2, prefill_chunk=4)
    model.generate(prompts(2, 6), max_new_tokens=3)
    return model


@pytest.fixture(scope="module")
def run(model: wse.WaferModel) -> Run:
    return Run.of(model)


@pytest.fixture(scope="module")
def verification(model: wse.WaferModel, run: Run) -> VerifyReport:
    """Of another run on the same wafer, after `run` was taken."""
    return model.verify(prompts(1, 5))


@pytest.fixture(scope="module")
def page(run: Run, verification: VerifyReport) -> Page:
    return read(report_html(run, title="m", passages=[Passage("a", "b")], verification=verification, host_seconds={"load": 1.5}))


def body(page: Page, table: str) -> list[list[str]]:
    """Rows of a table without its head."""
    return page.tables[table][1:]


@pytest.mark.parametrize(("table", "key"), [("by-layer", "layer"), ("by-stage", "stage")])
def test_traffic_tables_have_the_totals_of_the_ledger(page: Page, run: Run, model: wse.WaferModel, table: str, key: str) -> None:
    passes = model.wafer.ledger.passes()[:4]
    rows = model.wafer.ledger.totals(by=(key, "kind"), start=0, stop=passes[-1].stop)
    names = {None: "outside", 0: "layer 0", 1: "layer 1", 2: "layer 2"} if key == "layer" else {row[key]: row[key] for row in rows}

    def expected(mine: list[dict[str, Any]]) -> list[int]:
        parts = ({"stream"}, set(FABRIC_KINDS), set(EDGE_KINDS), {"control"})
        return [sum(row["macs"] for row in mine), *(sum(row["bytes"] for row in mine if row["kind"] in kinds) for kinds in parts)]

    shown = {row[0]: [integer(cell) for cell in row[1:]] for row in body(page, table)}
    assert set(shown) == {*names.values(), "all"}
    for value, name in names.items():
        assert shown[name] == expected([row for row in rows if row[key] == value])
    assert shown["all"] == expected(rows)


def test_kind_table_has_every_field_of_the_ledger(page: Page, run: Run, model: wse.WaferModel) -> None:
    fields = ("count", "bytes", "wavelets", "wavelet_hops", "max_link_wavelets", "max_hops", "colors")
    rows = model.wafer.ledger.totals(by=("kind",), stop=model.wafer.ledger.passes()[3].stop)
    shown = {row[0]: [integer(cell) for cell in row[1:]] for row in body(page, "by-kind")}
    assert shown == {row["kind"]: [row[f] for f in fields] for row in rows if row["kind"] != "launch"}


def test_tiles_and_passes_count_the_run_alone(page: Page, run: Run) -> None:
    text = page.sections[""]
    assert f"{run.total('macs'):,}" in text
    assert "Tokens through the wafer16" in text
    assert "2 sequences, 4 forward passes" in text
    assert "4 forward passes: 2 prompt with 12 tokens, 2 decode with 4 tokens" in page.sections["passes"]
    streamed = [t for t in page.titles["passes"] if t.startswith("pass ")][:4]
    assert [integer(t.rpartition(" ")[2]) for t in streamed] == [p.streamed_bytes for p in run.passes]
    assert sum(p.streamed_bytes for p in run.passes) == run.total("bytes", "stream")
    assert sum(p.fabric_bytes for p in run.passes) == run.total("bytes", *FABRIC_KINDS)


def test_sram_map_and_blocks_are_those_of_the_fullest_moment(page: Page, run: Run) -> None:
    assert [integer(cell) for cell in page.cells["sram"]] == run.sram.ravel().tolist()
    assert run.worst is not None
    *blocks, (_, together) = body(page, "worst-core")
    assert [(name, integer(size)) for name, size in blocks] == list(run.worst.blocks)
    assert integer(together) == run.worst.used_bytes == run.sram.max()
    assert f"of 49,152 bytes the fullest core held {run.sram.max():,}" in page.sections["sram"].lower()
    assert "Each square" not in page.sections["sram"]


def test_expert_maps_add_up_to_the_recorded_choices(page: Page, run: Run) -> None:
    for load in run.experts:
        assert load.by_expert.sum() == 2 * 16
        np.testing.assert_allclose(load.by_row.sum(axis=1), load.by_expert, rtol=1e-14)
    told = [float(cell.replace(",", "")) for cell in page.cells["experts"]]
    np.testing.assert_allclose(told, np.concatenate([load.by_row.ravel() for load in run.experts]), atol=0.0051)
    assert "96 choices among 5 experts, 2 per token and layer" in page.sections["experts"]


def test_keys_and_values_lie_as_recorded(page: Page, run: Run) -> None:
    assert [integer(cell) for cell in page.cells["keys-and-values"]] == run.kv[0].sum(axis=0).tolist()
    assert "All layers hold the same." in page.sections["keys-and-values"]
    assert [[integer(c) for c in row] for row in body(page, "kv")] == [[0, 8, 2, 3], [1, 8, 2, 3]]


def test_layers_that_hold_different_tokens_have_lines_of_their_own(run: Run) -> None:
    kv = run.kv.copy()
    kv[2] = [[1, 0, 0], [0, 1, 0]]
    page = read(report_html(replace(run, kv=kv), title="m"))
    expected = [*kv[0].sum(axis=0), *kv[2].sum(axis=0)]
    assert [integer(cell) for cell in page.cells["keys-and-values"]] == expected
    assert "share a line" in page.sections["keys-and-values"]
    assert any(t.startswith("layer 0\N{EN DASH}1, row 0") for t in page.titles["keys-and-values"])


def test_equivalence_table_is_that_of_the_verification(page: Page, verification: VerifyReport) -> None:
    rows = body(page, "stage-checks")
    assert [row[0] for row in rows] == [row.stage for row in verification.rows()]
    for row, told in zip(verification.rows(), rows, strict=True):
        assert row.local is not None
        assert told[1:4] == [f"{row.local.error:.2e}", f"{row.local.bound:.2e}", f"{row.local.ratio:.3f}"]
        if row.end_to_end is not None:
            assert told[7:9] == [f"{row.end_to_end.error:.2e}", f"{row.end_to_end.bound:.2e}"]
    assert body(page, "routing")[0][:2] == ["decisions", str(verification.routing.n_decisions)]
    assert "verified against the float64 reference" in page.sections[""]


def test_a_failure_is_named_and_marked(run: Run, verification: VerifyReport) -> None:
    checks = list(verification.stages)
    bad = next(i for i, c in enumerate(checks) if c.stage == "attn_out" and c.kind == "local")
    checks[bad] = replace(checks[bad], status="failed", error=0.5, bound=1e-6, ratio=5e5, n_failed=3)
    skipped = next(i for i, c in enumerate(checks) if c.stage == "ffn_norm" and c.kind == "local")
    checks[skipped] = StageCheck(layer=0, stage="ffn_norm", kind="local", status="skipped", message="needs <x>")
    ties = tuple(NearTie(layer=1, token=(0, t), chosen=(3,), ideal=(2,), gap=1e-8, tolerance=1e-7) for t in range(23))
    failing = replace(
        verification, stages=tuple(checks), first_failure=Failure(check=checks[bad], row=2, col=1), notes=("the end <b>",),
        routing=replace(verification.routing, near_ties=ties),
    )  # fmt: skip
    html = report_html(run, title="m", verification=failing)
    page = read(html)
    assert "verification FAILED" in page.sections[""]
    text = page.sections["equivalence"]
    assert f"First failure: {failing.first_failure}" in text
    assert "Not checked: 1 stage without usable inputs; first ffn_norm of layer 0, which needs <x>" in text
    assert "Not checked: the end <b>" in text
    assert len(body(page, "near-ties")) == 20
    assert "and 3 further near-ties" in text
    assert re.findall(r'<tr class="failed"><th scope="row">(\w+)', html) == ["attn_out"]


def test_a_run_without_verification_says_so(run: Run) -> None:
    page = read(report_html(run, title="m"))
    assert "not verified in this run" in page.sections[""]
    assert "equivalence" not in page.ids


def test_figures_of_the_wafer_come_with_their_sources(run: Run) -> None:
    sources = {**run.wafer.sources, "n_colors": "assumed: <a guess>"}
    del sources["n_cols"]
    page = read(report_html(replace(run, wafer=replace(run.wafer, sources=sources)), title="m"))
    told = {row[0]: row[1:] for row in body(page, "wafer-figures")}
    assert told["sram_bytes_per_core"] == ["49,152", wse.WSE3.sources["sram_bytes_per_core"]]
    assert told["n_colors"] == ["24", "assumed <a guess>"]
    assert told["n_cols"] == ["762", "no source stated"]
    assert set(told) == {"n_rows", "n_cols", "usable_rows", "usable_cols", "sram_bytes_per_core", "base_code_bytes", "n_colors"}


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>&amp;\"'</pre><style>*{display:none}</style>\u202e\x00"


def test_text_of_tokens_is_escaped_whatever_it_holds(run: Run) -> None:
    html = report_html(run, title=EVIL, passages=[Passage(EVIL, EVIL), Passage("", "x")])
    page = read(html)
    assert "<script" not in html
    assert html.count("<style") == 1
    assert page.sections["text"].count("<script>alert(1)</script>") == 2
    assert "&amp;\"'" in page.sections["text"]
    assert html.count("<bdi>") == 3  # the title and each passage: their writing direction stays theirs


def test_text_that_is_no_unicode_does_not_lose_the_report(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_report(file, run, title="m", passages=[Passage("ä \ud800", "日本")])
    text = file.read_bytes().decode("utf-8")
    read(text)
    assert "ä &#55296;" in text
    assert "日本" in text


def test_host_seconds_stand_apart(page: Page, run: Run) -> None:
    assert body(page, "host-seconds") == [["load", "1.50"]]
    assert [name for name, text in page.sections.items() if "second" in text and name] == ["host"]
    assert "say nothing about a wafer" in page.sections["host"]
    without = read(report_html(run, title="m"))
    assert [name for name, text in without.sections.items() if "second" in text] == []


def test_a_report_is_taken_of_one_call(model: wse.WaferModel, run: Run, verification: VerifyReport) -> None:
    again = Run.of(model)  # now of the verification
    assert len(again.passes) == 2
    assert any(row["kind"] == "probe" for row in again.totals)
    assert not any(row["kind"] == "probe" for row in run.totals)
    assert "probe channel, bytes" in read(report_html(again, title="m")).tables["by-layer"][0]


def test_a_dense_model_has_no_experts() -> None:
    model = make_model("llama", rows=2, cols=3)
    model(prompts(1, 4))
    run = Run.of(model)
    page = read(report_html(run, title="dense"))
    assert run.experts == ()
    assert "experts" not in page.ids
    assert "Chosen experts" not in page.sections[""]
    assert "control channel, bytes" not in page.tables["by-layer"][0]
    (streamed,) = (row["bytes"] for row in model.wafer.ledger.totals(by=("kind",)) if row["kind"] == "stream")
    assert integer(body(page, "by-layer")[-1][2]) == streamed


@pytest.mark.slow
def test_all_executors_give_the_same_page() -> None:
    pages = []
    for executor in ("batched", "isolated"):
        model = make_model(rows=2, cols=2, executor=executor)
        model.generate(prompts(1, 3), max_new_tokens=2)
        pages.append(report_html(Run.of(model), title="m").replace(f"executor {executor}", "executor"))
    assert pages[0] == pages[1]


def test_a_large_grid_is_binned_and_says_so() -> None:
    model = make_model(rows=300, cols=200, executor="dry")
    model(prompts(1, 20))
    html = report_html(Run.of(model), title="large")
    page = read(html)
    assert "Each square shows the largest of up to 4 rows x 3 columns." in page.sections["sram"]
    assert "Each square shows the largest of up to 1 experts x 7 rows." in page.sections["experts"]
    assert "Each square shows the largest of up to 4 rows." in page.sections["keys-and-values"]
    assert page.cells["sram"] == []
    assert len(html) < 200_000


def test_many_passes_are_binned_and_say_so(run: Run) -> None:
    many = tuple(replace(run.passes[0], macs=i) for i in range(401))
    page = read(report_html(replace(run, passes=many), title="long"))
    assert "Each bar is the largest of up to 3 passes" in page.sections["passes"]
    macs = [integer(t.rpartition(" ")[2]) for t in page.titles["passes"] if t.startswith("pass ")][2 * 160 :]
    assert len(macs) == 160
    assert macs == sorted(macs)
    assert macs[-1] == 400


def test_the_example_of_the_documentation_runs(model: wse.WaferModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, "reports.md", "exec"), {"model": model, "prompt": prompts(1, 3)})
    read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert (tmp_path / "trace.json").stat().st_size > 0


def test_what_was_not_called_cannot_be_reported() -> None:
    with pytest.raises(InputError, match="the model was not called"):
        Run.of(make_model())


def test_a_cleared_ledger_cannot_be_reported() -> None:
    model = make_model("mixtral", rows=2, cols=2)
    model(prompts(1, 3))
    model.wafer.ledger.clear()
    with pytest.raises(InputError, match="does not hold the model's last call any more"):
        Run.of(model)


def test_models_that_share_a_wafer_are_told_apart() -> None:
    first = make_model(rows=2, cols=2)
    second = wse.from_config(first.spec, seed=9, wafer=first.wafer)
    first(prompts(1, 3))
    alone = Run.of(first)
    second(prompts(1, 5))
    assert [p.n_tokens for p in Run.of(second).passes] == [5]
    assert Run.of(first).passes == alone.passes
    assert Run.of(first).totals == alone.totals
