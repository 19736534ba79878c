"""``wse-emu sparsify``: how well each layer bears sparse attention, and which to keep dense."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wse_emu.cli import options, patterns
from wse_emu.cli.describe import JSON_SCHEMA, header, model_entry
from wse_emu.cli.exits import Exit
from wse_emu.cli.load import load, read_request
from wse_emu.cli.options import Executor, NumberFormat, Placing, WaferName
from wse_emu.cli.outputs import check_output_file, writing
from wse_emu.cli.patterns import PatternOptions, layers_text
from wse_emu.foundation.errors import InputError

if TYPE_CHECKING:
    from wse_emu.cli.load import Request
    from wse_emu.doctor.sparsify import SparsifyReport

MAX_DEFAULT_SINKS = 4
"""The pattern that is taken where none is given has a window of an eighth of the text, and as many sinks, but no more than these."""

KeepDense = Annotated[int, typer.Option("--keep-dense", metavar="N", min=0, help="Layers that stay as they are in the proposal.")]
Text = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="Text to measure, in a file; '-' is stdin. Default: some 256 tokens of documentation."),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window", metavar="N", min=1,
        help=f"Keys that a sparse layer's queries see. Default: an eighth of the text, with up to {MAX_DEFAULT_SINKS} sinks.",
    ),
]  # fmt: skip
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw the steps (SVG).")]


def sparsify(
    model: options.Model = None,
    keep_dense: KeepDense = 1,
    window: Window = None,
    sinks: patterns.Sinks = 0,
    attention_chunk_size: patterns.ChunkSize = None,
    columns: patterns.Columns = None,
    fixed: patterns.Fixed = None,
    attention: patterns.Attention = None,
    prompt: options.Prompt = None,
    ids: options.Ids = None,
    text: Text = None,
    rows: options.Rows = None,
    cols: options.Cols = None,
    wafer: options.Wafer = WaferName.WSE3,
    prefill_chunk: options.PrefillChunk = None,
    dtype: options.Dtype = NumberFormat.FLOAT32,
    kv_dtype: options.KvDtype = None,
    precision_opt_level: options.OptLevel = 0,
    plot: Plot = None,
    as_json: options.Json = False,
) -> int:
    """Propose which layers keep dense attention.

    Measures the loss of a text with every layer sparse alone, then with ever more of them, the least sensitive first: loss, and what keys
    and values take, of each step.
    """
    if plot is not None:
        check_output_file("--plot", plot)
    request = read_request(model, prompt, ids, text, options.held_out_text)
    chosen = PatternOptions(window, sinks, attention_chunk_size, columns, fixed, attention)
    if chosen == PatternOptions():
        narrow = max(1, len(request.ids) // 8)
        chosen = PatternOptions(window=narrow, sinks=min(narrow, MAX_DEFAULT_SINKS))
    pattern = chosen.patterns(request.spec)
    if pattern is None or isinstance(pattern, list):
        raise InputError("--attention: sparsify tries one pattern in every layer; give an object, not a list")
    from wse_emu.doctor.sparsify import check_sparsify
    from wse_emu.doctor.sparsify import sparsify as measured

    check_sparsify(request.spec, pattern, len(request.ids), keep_dense)
    precision = options.precision(dtype, kv_dtype, precision_opt_level)
    placing = Placing(rows, cols, wafer, Executor.BATCHED, prefill_chunk=prefill_chunk, precision=precision)
    loaded = load(request, placing, new_tokens=0, verify=False, quiet=as_json)
    if not as_json:
        print(header(request, loaded.wafer, placing.precision), flush=True)
    report = measured(loaded, request.ids, pattern, keep_dense=keep_dense)
    options_of_proposal = [*chosen.words, "--sparse-layers", layers_text(report.proposed.sparse_layers)]
    if plot is not None:
        _draw(report, plot)
    if as_json:
        asked = {name: value for name, value in chosen._asdict().items() if not name.endswith("_layers")}
        document = {"schema": JSON_SCHEMA, "command": "sparsify", "model": model_entry(request.path, request.spec)}
        document |= {"ignored": list(loaded.checkpoint.ignored), "keep_dense": keep_dense, **asked, "n_tokens": len(request.ids)}
        print(json.dumps({**document, "sparsify": report.to_dict(), "options": options_of_proposal}))
    else:
        print(f"\n{report}")
        print(f"\n{_how_to_run(request, model, options_of_proposal, report)}")
    return Exit.OK


def _draw(report: SparsifyReport, file: Path) -> None:
    from wse_emu.doctor.sparsify_plot import plot

    with writing("--plot", file):
        file.write_text(plot(report), encoding="utf-8")


def _how_to_run(request: Request, model: Path | None, words: list[str], report: SparsifyReport) -> str:
    """The command that verifies the proposal."""
    if not report.proposed.sparse_layers:
        return "the proposal is the model as it is"
    return f"to verify it: {shlex.join(['wse-emu', 'verify', *([] if model is None else [str(request.path)]), *words])}"
