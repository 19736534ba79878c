"""``wse-emu run`` around a stand-in for the model: what is written where, and which code comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wse_emu.cli.app import invoke
from wse_emu.cli.describe import sampling_text
from wse_emu.cli.exits import Exit
from wse_emu.cli.load import Request
from wse_emu.cli.options import Executor, Placing, StreamExperts, WaferName, grid
from wse_emu.cli.run import make_sampler
from wse_emu.cli.tables import channel_bytes, console, ledger_table, sram_table, stage_totals
from wse_emu.foundation.errors import SramOverflowError
from wse_emu.foundation.units import bytes_text
from wse_emu.foundation.wafer_spec import WSE2, WSE3
from wse_emu.sampling import Sampler
from wse_emu.wafer.ledger import KINDS, Event, Ledger
from wse_emu.wafer.sram import SramMap

CONTINUATION = " the list."


@dataclass
class StandInReport:
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed}

    def __str__(self) -> str:
        return f"verification {'passed' if self.passed else 'FAILED'}"


@dataclass
class StandInWafer:
    spec: Any = WSE3
    rows: int = 4
    cols: int = 6
    executor: str = "batched"
    ledger: Ledger = field(default_factory=Ledger)
    sram: Any = field(default_factory=lambda: SimpleNamespace(high_water_map=SramMap(2, 3, 5000, 49_152, (("base code", 5000),))))


class StandInModel:
    """Writes `CONTINUATION` and notes what it was asked."""

    def __init__(self, request: Request, passed: bool) -> None:
        assert request.tokenizer is not None
        self.new = request.tokenizer.encode(CONTINUATION)
        self.wafer = StandInWafer()
        self.passed = passed
        self.checkpoint = SimpleNamespace(ignored=("model.layers.9.eh_proj.weight",))
        self.asked: dict[str, Any] = {}
        self.wafer.ledger.record(Event(None, "earlier", "stream", "w", bytes=1))

    def generate(
        self, ids: Sequence[Sequence[int]], *, max_new_tokens: int, sampler: Sampler, on_token: Callable[[int, Any], None]
    ) -> None:
        self.asked["sampler"] = sampler
        with self.wafer.ledger.scope("attention", 0):
            self.wafer.ledger.record(Event(None, "", "launch", "matmul", count=24, macs=1000))
            self.wafer.ledger.record(Event(None, "", "stream", "w_qkv", bytes=4096, wavelets=1024, max_link_wavelets=300))
            self.wafer.ledger.record(Event(None, "", "chain", "partials", bytes=400, wavelets=100, max_link_wavelets=50))
            self.wafer.ledger.record(Event(None, "", "control", "experts", bytes=32, wavelets=8))
            self.wafer.ledger.record(Event(None, "", "probe", "taps", bytes=999, wavelets=250))
        for step, token in enumerate(self.new[:max_new_tokens]):
            on_token(step, np.array([token]))

    def verify(self, ids: Sequence[Sequence[int]], *, n_prompt: int, sampler: Sampler) -> StandInReport:
        assert sampler is self.asked["sampler"]
        assert n_prompt == len(self.asked["request"].ids)
        self.asked["verified"] = [list(row) for row in ids]
        self.wafer.sram.high_water_map = SramMap(0, 0, 9000, 49_152, (("base code", 9000),))
        return StandInReport(self.passed)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[StandInModel]:
    """Models that `run` made; each passes its verification."""
    return _install(monkeypatch, passed=True)


def _install(monkeypatch: pytest.MonkeyPatch, *, passed: bool) -> list[StandInModel]:
    made: list[StandInModel] = []

    def load(request: Request, placing: Placing, *, new_tokens: int, verify: bool, quiet: bool) -> StandInModel:
        model = StandInModel(request, passed)
        model.asked |= {"request": request, "placing": placing, "new_tokens": new_tokens, "verify": verify, "quiet": quiet}
        made.append(model)
        return model

    monkeypatch.setattr("wse_emu.cli.run.load", load)
    return made


def test_text_is_streamed_and_everything_is_told(stand_in: list[StandInModel], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["run", "--prompt", "Sort"]) == Exit.OK
    out, err = capsys.readouterr()
    assert "\nSort the list.\n" in out
    assert "4 x 6 = 24 cores of WSE-3" in out
    assert f"prompt    {len(stand_in[0].asked['request'].ids)} token" in out
    assert ", then up to 32 new, greedy\n" in out
    assert "verification passed" in out
    assert "core (2, 3): 5000 of 49152 bytes" in out  # of the generation, not of its verification
    assert err == ""
    (model,) = stand_in
    assert model.asked["verified"] == [model.asked["request"].ids + model.new]
    assert model.asked["sampler"] == Sampler(greedy=True)


def test_host_seconds_and_emulated_quantities_share_no_line(stand_in: list[StandInModel], capsys: pytest.CaptureFixture[str]) -> None:
    invoke(["run", "--prompt", "Sort"])
    lines = capsys.readouterr().out.splitlines()
    timed = [line for line in lines if " s," in line or line.endswith(" s")]
    assert timed == [lines[-1]]
    assert lines[-1].startswith("host time (of this emulator, not of a wafer): load ")


def test_failed_verification_is_exit_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _install(monkeypatch, passed=False)
    assert invoke(["run", "--prompt", "Sort"]) == Exit.VERIFICATION_FAILED
    assert "verification FAILED" in capsys.readouterr().out
    assert invoke(["run", "--prompt", "Sort", "--json"]) == Exit.VERIFICATION_FAILED
    assert json.loads(capsys.readouterr().out)["verification"] == {"passed": False}


def test_json_is_one_document_and_nothing_else(stand_in: list[StandInModel], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["run", "--prompt", "Sort", "--json", "--max-new-tokens", "2"]) == Exit.OK
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert out.count("\n") == 1
    assert err == ""
    (model,) = stand_in
    assert document["generated"]["ids"] == model.new[:2]
    assert CONTINUATION.startswith(document["generated"]["text"])
    assert document["prompt"] == {"text": "Sort", "ids": model.asked["request"].ids}
    assert document["ignored"] == ["model.layers.9.eh_proj.weight"]
    assert document["wafer"]["rows"] == 4
    assert document["wafer"]["sram"] == {
        "worst_core": [2, 3],
        "peak_bytes": 5000,
        "capacity_bytes": 49_152,
        "blocks": [["base code", 5000]],
    }
    assert set(document["host_seconds"]) == {"load", "first_token", "generate", "verify"}
    assert [row["stage"] for row in document["ledger"]["totals"]] == ["attention"] * 5
    assert model.asked["quiet"] is True


def test_no_verify_leaves_the_reference_alone(stand_in: list[StandInModel], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["run", "--no-verify", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["verification"] is None
    assert "verified" not in stand_in[0].asked
    assert stand_in[0].asked["verify"] is False


def test_ids_without_text(stand_in: list[StandInModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ids.json"
    file.write_text("[5, 6, 7]")
    assert invoke(["run", "--ids", str(file)]) == Exit.OK
    assert stand_in[0].asked["request"].ids == [5, 6, 7]
    assert stand_in[0].asked["request"].text is None


def test_an_id_outside_the_vocabulary_is_refused(stand_in: list[StandInModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ids"
    file.write_text("5 999999")
    assert invoke(["run", "--ids", str(file)]) == Exit.USAGE
    assert "token id 999999 lies outside the model's vocabulary of" in capsys.readouterr().err
    assert stand_in == []


def test_options_reach_the_model(stand_in: list[StandInModel]) -> None:
    words = "run --rows 3 --cols 5 --wafer wse2 --executor isolated --stream-experts all --prefill-chunk 16 --max-new-tokens 7"
    words += " --temperature 0.5 --top-k 9 --top-p 0.25 --seed 3 --json"
    assert invoke(words.split()) == Exit.OK
    asked = stand_in[0].asked
    assert asked["placing"] == Placing(3, 5, WaferName.WSE2, Executor.ISOLATED, StreamExperts.ALL, 16)
    assert asked["new_tokens"] == 7
    assert asked["verify"] is True
    assert asked["sampler"] == Sampler(temperature=0.5, top_k=9, top_p=0.25, seed=3)


def test_what_does_not_fit_is_exit_three(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load(*_: object, **__: object) -> None:
        raise SramOverflowError("core (3, 7): `w_up` needs 57344 bytes, 12288 of 49152 are free; use more columns")

    monkeypatch.setattr("wse_emu.cli.run.load", load)
    assert invoke(["run"]) == Exit.DOES_NOT_FIT
    assert capsys.readouterr().err == "wse-emu: core (3, 7): `w_up` needs 57344 bytes, 12288 of 49152 are free; use more columns\n"


def test_interruption_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wse_emu.cli.run.load", load)
    assert invoke(["run"]) == Exit.INTERRUPTED
    assert capsys.readouterr().err == "wse-emu: interrupted\n"


def test_the_ledger_is_written_before_verification(stand_in: list[StandInModel], tmp_path: Path) -> None:
    file = tmp_path / "ledger.json"
    assert invoke(["run", "--json", "--ledger", str(file)]) == Exit.OK
    assert json.loads(file.read_text())["schema"] >= 1


def test_a_ledger_that_cannot_be_written_is_exit_four(
    stand_in: list[StandInModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["run", "--json", "--ledger", str(tmp_path / "no" / "ledger.json")]) == Exit.CHECKPOINT
    out, err = capsys.readouterr()
    assert out == ""
    assert f"ledger.json: cannot be written (there is no directory {tmp_path / 'no'})" in err
    assert invoke(["run", "--json", "--ledger", str(tmp_path)]) == Exit.CHECKPOINT
    assert "cannot be written (Is a directory)" in capsys.readouterr().err
    assert stand_in == []  # refused before anything ran


def test_a_ledger_that_fails_in_the_end_is_exit_four(
    stand_in: list[StandInModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def to_json(self: Ledger, path: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "to_json", to_json)
    assert invoke(["run", "--json", "--ledger", str(tmp_path / "ledger.json")]) == Exit.CHECKPOINT
    assert "ledger.json: cannot be written (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ((None, None, None), Sampler(greedy=True, seed=4)),
        ((0.0, None, None), Sampler(greedy=True, seed=4)),
        ((0.0, 5, 0.5), Sampler(greedy=True, seed=4)),
        ((0.7, None, None), Sampler(temperature=0.7, seed=4)),
        ((None, 5, None), Sampler(top_k=5, seed=4)),
        ((None, None, 0.5), Sampler(top_p=0.5, seed=4)),
    ],
)
def test_sampling_options(options: tuple[float | None, int | None, float | None], sampler: Sampler) -> None:
    assert make_sampler(*options, 4) == sampler


@pytest.mark.parametrize(("asked", "given"), [((None, None), (None, None)), ((8, None), (8, 8)), ((None, 6), (6, 6)), ((3, 4), (3, 4))])
def test_one_side_of_the_grid_asks_for_a_square(asked: tuple[int | None, int | None], given: tuple[int | None, int | None]) -> None:
    assert grid(*asked) == given


def test_wafers_by_name() -> None:
    assert {name.value: name.spec for name in WaferName} == {"wse2": WSE2, "wse3": WSE3}


def test_stages_sum_what_belongs_together() -> None:
    ledger = Ledger()
    for kind in KINDS:
        with ledger.scope("attention", 1):
            ledger.record(Event(None, "", kind, "x", macs=10 if kind == "launch" else 0, bytes=8, wavelets=2, max_link_wavelets=1))
    with ledger.scope("head"):
        ledger.record(Event(None, "", "drain", "logits", bytes=100, wavelets=25, max_link_wavelets=25))
    rows = ledger.totals(by=("stage", "kind"))
    attention, head = stage_totals(rows)
    n_fabric = len(KINDS) - len({"launch", "inject", "drain", "stream", "control", "probe"})
    assert attention == ("attention", 10, 8, 16, 2 * n_fabric, 1)
    assert head == ("head", 0, 0, 100, 0, 25)
    assert channel_bytes(rows, "control") == 8
    table = ledger_table(rows, "title")
    assert [column.footer for column in table.columns] == ["all", "10", "8", "116", str(2 * n_fabric), "25"]


@pytest.mark.parametrize(
    ("sampler", "text"),
    [
        (Sampler(greedy=True), "greedy"),
        (Sampler(temperature=0.5, seed=3), "sampled, temperature 0.5, seed 3"),
        (Sampler(top_k=9, top_p=0.25), "sampled, temperature 1, top-k 9, top-p 0.25, seed 0"),
    ],
)
def test_sampling_for_people(sampler: Sampler, text: str) -> None:
    assert sampling_text(sampler) == text


@pytest.mark.parametrize(("scale", "width"), [(1, 80), (10**6, 200)])
def test_tables_fit_eighty_columns_and_cut_no_number(
    scale: int, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # what a terminal says of itself
    ledger = Ledger()
    for stage in ("attention_norm", "attention_out"):
        with ledger.scope(stage, 0):
            ledger.record(Event(None, "", "launch", "w", macs=10_000_000 * scale))
            ledger.record(Event(None, "", "stream", "w", bytes=40_000_000 * scale, max_link_wavelets=100_000 * scale))
            ledger.record(Event(None, "", "chain", "w", wavelets=1_000_000 * scale))
            ledger.record(Event(None, "", "drain", "w", bytes=1_000_000 * scale))
    console().print(ledger_table(ledger.totals(by=("stage", "kind")), "title"))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    numbers = [f"{n * scale:,}" for n in (10_000_000, 40_000_000, 1_000_000, 1_000_000, 100_000)]
    assert [line.split() for line in lines if "attention" in line] == [["attention_norm", *numbers], ["attention_out", *numbers]]
    assert lines[-1].split() == ["all", *(f"{n * scale:,}" for n in (20_000_000, 80_000_000, 2_000_000, 2_000_000, 100_000))]


def test_layers_alike_share_a_line_of_the_sram_table(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [("base code", 8), *((f"keys and values of layer {i}", 3072) for i in range(12)), ("logits", 4)]
    console().print(sram_table("title", blocks, 36_876, 49_152))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[3:6]] == ["base code", "keys and values of layer 0..11 (12 x 3072)", "logits"]
    assert lines[4].endswith("36,864")
    assert lines[-1].endswith("36,876 of 49,152")


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (49_152, "48.0 KiB"), (3 * 2**29, "1.5 GiB"), (2**54, "16384.0 TiB")],
)
def test_bytes_for_people(n: int, text: str) -> None:
    assert bytes_text(n) == text
