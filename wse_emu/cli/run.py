"""``wse-emu run``: stream, run, generate, verify, say what moved where."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wse_emu.cli import options, patterns, rules
from wse_emu.cli.describe import JSON_SCHEMA, header, sampling_text, what_and_where
from wse_emu.cli.exits import Exit
from wse_emu.cli.load import Request, load, read_request
from wse_emu.cli.options import Executor, Growth, Keeping, NumberFormat, Placing, StreamExperts, WaferName
from wse_emu.cli.outputs import check_output_file, writing
from wse_emu.cli.patterns import PatternOptions
from wse_emu.cli.rules import RuleOptions, routed
from wse_emu.cli.tokens import TextStream
from wse_emu.foundation.precision import FLOAT32, Precision
from wse_emu.foundation.units import counted
from wse_emu.sampling import Sampler

if TYPE_CHECKING:
    from wse_emu.model import WaferModel
    from wse_emu.reports import Run
    from wse_emu.wafer.sram import SramMap


@dataclass(slots=True)
class Outcome:
    """Everything that a run found out; emulated quantities and host seconds are kept apart."""

    request: Request
    model: WaferModel
    sampler: Sampler
    precision: Precision = FLOAT32
    ids: list[int] = field(default_factory=list)
    """The continuation, without the prompt."""
    text: str | None = None
    """The continuation as text, if there is a tokenizer."""
    totals: list[dict[str, Any]] = field(default_factory=list)
    """Ledger of the generation, by stage and kind; the verification's own run is not in it."""
    sram: SramMap | None = None
    """The fullest core during the generation; the verification's own run needs more."""
    report: Any | None = None
    """Verification report; None with ``--no-verify``."""
    host_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's name: that of its directory."""
        return self.request.path.resolve().name

    @property
    def prompt(self) -> str:
        """The prompt for people: its text, or its ids between blanks."""
        return self.request.text if self.request.text is not None else " ".join(map(str, self.request.ids))

    @property
    def exit_code(self) -> Exit:
        """Whether everything that was verified agreed."""
        return Exit.OK if self.report is None or self.report.passed else Exit.VERIFICATION_FAILED

    def to_dict(self) -> dict[str, Any]:
        """The document of ``--json``."""
        return {
            "schema": JSON_SCHEMA,
            "command": "run",
            **what_and_where(self.request, self.model, self.sram, self.precision),
            "sampling": asdict(self.sampler),
            "generated": {"text": self.text, "ids": self.ids},
            "ledger": {"by": ["stage", "kind"], "totals": self.totals},
            "verification": None if self.report is None else self.report.to_dict(),
            "host_seconds": self.host_seconds,
        }


def run(
    model: options.Model = None,
    prompt: options.Prompt = None,
    ids: options.Ids = None,
    max_new_tokens: options.MaxNewTokens = 32,
    rows: options.Rows = None,
    cols: options.Cols = None,
    wafer: options.Wafer = WaferName.WSE3,
    executor: options.Execution = Executor.BATCHED,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    stream_experts: options.Streamed = StreamExperts.ACTIVATED,
    prefill_chunk: options.PrefillChunk = None,
    routing: rules.Routing = None,
    tie_policy: rules.TiePolicy = None,
    moe_implementation: options.MoeImplementation = None,
    bta_max_tile: options.BtaMaxTile = None,
    dtype: options.Dtype = NumberFormat.FLOAT32,
    kv_dtype: options.KvDtype = None,
    precision_opt_level: options.OptLevel = 0,
    kv_growth: options.KvGrowth = Growth.SHIFT,
    kv: options.Kv = Keeping.STORE,
    skip_zero_weights: options.SkipZeros = False,
    window: patterns.Window = None,
    sinks: patterns.Sinks = 0,
    attention_chunk_size: patterns.ChunkSize = None,
    columns: patterns.Columns = None,
    fixed: patterns.Fixed = None,
    attention: patterns.Attention = None,
    dense_layers: patterns.DenseLayers = None,
    sparse_layers: patterns.SparseLayers = None,
    verify: options.Verify = True,
    as_json: options.Json = False,
    ledger: options.LedgerFile = None,
    trace: options.TraceFile = None,
    report: options.ReportFile = None,
) -> int:
    """Stream, run, generate, verify, report.

    Weights pass through the wafer layer by layer; every layer is held against a dense float64 reference; a table says what moved where.
    """
    sampler = make_sampler(temperature, top_k, top_p, seed)
    for option, file in (("--ledger", ledger), ("--trace", trace), ("--report", report)):
        if file is not None:
            check_output_file(option, file)
    chosen = PatternOptions(window, sinks, attention_chunk_size, columns, fixed, attention, dense_layers, sparse_layers)
    request = chosen.of(read_request(model, prompt, ids))
    precision = options.precision(dtype, kv_dtype, precision_opt_level)
    rule = RuleOptions(routing, tie_policy).rule(request.spec)
    request = request._replace(spec=routed(request.spec, rule))
    placing = Placing(rows, cols, wafer, executor, stream_experts, prefill_chunk, precision, kv_growth, kv, skip_zero_weights)
    placing = placing._replace(routing=rule, moe_implementation=moe_implementation, bta_max_tile=bta_max_tile)
    started = time.perf_counter()
    loaded = load(request, placing, new_tokens=max_new_tokens, verify=verify, quiet=as_json)
    outcome = Outcome(request, loaded, sampler, placing.precision, host_seconds={"load": time.perf_counter() - started})
    if not as_json:
        print(header(request, loaded.wafer, placing.precision, rerouted=rule is not None))
        print(f"prompt    {counted(len(request.ids), 'token')}, then up to {max_new_tokens} new, {sampling_text(sampler)}\n")
        print(outcome.prompt, end="", flush=True)
    generate(outcome, max_new_tokens, echo=not as_json)
    if ledger is not None:
        with writing("--ledger", ledger):
            loaded.wafer.ledger.to_json(ledger)
    if trace is not None:
        write_trace(outcome, trace)
    observed = None if report is None else observe(loaded)
    if not as_json:
        print_ledger(outcome)
    if verify:
        started = time.perf_counter()
        outcome.report = loaded.verify([request.ids + outcome.ids], n_prompt=len(request.ids), sampler=sampler)
        outcome.host_seconds["verify"] = time.perf_counter() - started
    if report is not None and observed is not None:
        write_report(outcome, observed, report)
    if as_json:
        print(json.dumps(outcome.to_dict()))
    else:
        print_end(outcome)
    return outcome.exit_code


def make_sampler(temperature: float | None, top_k: int | None, top_p: float | None, seed: int) -> Sampler:
    """Sampler that the options ask for: greedy at temperature 0, or if none of temperature, top-k and top-p is given."""
    if temperature == 0 or (temperature, top_k, top_p) == (None, None, None):
        return Sampler(greedy=True, seed=seed)
    return Sampler(
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=1.0 if top_p is None else top_p,
        seed=seed,
    )


def generate(outcome: Outcome, max_new_tokens: int, *, echo: bool) -> None:
    """Generate, writing the text to stdout as it settles if `echo`; fills in ids, text, ledger totals, SRAM and host seconds."""
    request, model = outcome.request, outcome.model
    tokenizer = request.tokenizer
    stream = None if tokenizer is None else TextStream(tokenizer.decode, request.ids)
    pieces: list[str] = []
    before = len(model.wafer.ledger)
    started = time.perf_counter()

    def on_token(step: int, ids: Any) -> None:
        if step == 0:
            outcome.host_seconds["first_token"] = time.perf_counter() - started
        token = int(ids[0])
        outcome.ids.append(token)
        piece = f" {token}" if stream is None else stream.push(token)
        pieces.append(piece)
        if echo:
            print(piece, end="", flush=True)

    model.generate([request.ids], max_new_tokens=max_new_tokens, sampler=outcome.sampler, on_token=on_token)
    outcome.host_seconds["generate"] = time.perf_counter() - started
    pieces.append("" if stream is None else stream.finish())
    if echo:
        print(pieces[-1])
    outcome.text = None if stream is None else "".join(pieces)
    outcome.totals = model.wafer.ledger.totals(by=("stage", "kind"), start=before)
    outcome.sram = model.wafer.sram.high_water_map


def write_trace(outcome: Outcome, file: Path) -> None:
    """Write the generation as a trace file."""
    from wse_emu import reports

    wafer = outcome.model.wafer
    about = {"model": outcome.name, "wafer": wafer.spec.name, "rows": wafer.rows, "cols": wafer.cols, "executor": wafer.executor}
    with writing("--trace", file):
        reports.write_trace(wafer.ledger, file, about=about)


def observe(model: WaferModel) -> Run:
    """Look at the generation before the verification's own run."""
    from wse_emu import reports

    return reports.Run.of(model)


def write_report(outcome: Outcome, run: Run, file: Path) -> None:
    """Write the page about the run."""
    from wse_emu import reports

    generated = outcome.text if outcome.text is not None else "".join(f" {i}" for i in outcome.ids)
    passage = reports.Passage(outcome.prompt, generated)
    with writing("--report", file):
        reports.write_report(
            file, run, title=outcome.name, passages=[passage], verification=outcome.report, host_seconds=outcome.host_seconds
        )


def print_ledger(outcome: Outcome) -> None:
    """Tell what the wafer did: emulated quantities only."""
    from wse_emu.cli.tables import channel_bytes, console, ledger_table

    prompt = counted(len(outcome.request.ids), "prompt token")
    print()
    console().print(ledger_table(outcome.totals, f"Emulated work and traffic: {prompt}, {len(outcome.ids)} generated"))
    print()
    if outcome.request.spec.is_moe:
        print(f"control channel (chosen experts to MemoryX): {channel_bytes(outcome.totals, 'control'):,} bytes")
    print(outcome.sram)
    print()
    sys.stdout.flush()


def print_end(outcome: Outcome) -> None:
    """Tell the verification's result, then what the host needed, which says nothing about a wafer."""
    if outcome.report is not None:
        print(outcome.report)
        print()
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in outcome.host_seconds.items())
    print(f"host time (of this emulator, not of a wafer): {parts}")
