"""``wse-emu sparsify``: how well each layer bears sparse attention, and which to keep dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from wse_emu.cli import options
from wse_emu.cli.describe import JSON_SCHEMA, header, model_entry
from wse_emu.cli.exits import Exit
from wse_emu.cli.load import load, read_request
from wse_emu.cli.options import Executor, NumberFormat, Placing, WaferName

if TYPE_CHECKING:
    from wse_emu.model import WaferModel

KeepDense = Annotated[int, typer.Option("--keep-dense", metavar="N", min=0, help="Layers that stay as they are in the proposal.")]
Window = Annotated[int, typer.Option("--window", metavar="N", min=1, help="Keys that a sparse layer's queries see, their own included.")]
Sinks = Annotated[int, typer.Option("--sinks", metavar="N", min=0, help="And the first so many keys.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw the steps (SVG).")]


def sparsify(
    model: options.Model = None,
    keep_dense: KeepDense = 1,
    window: Window = 16,
    sinks: Sinks = 4,
    prompt: options.Prompt = None,
    ids: options.Ids = None,
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
    from wse_emu.doctor.sparsify import plot as draw
    from wse_emu.doctor.sparsify import sparsify as measured

    request = read_request(model, prompt, ids)
    precision = options.precision(dtype, kv_dtype, precision_opt_level)
    placing = Placing(rows, cols, wafer, Executor.BATCHED, prefill_chunk=prefill_chunk, precision=precision)
    loaded = load(request, placing, new_tokens=0, verify=False, quiet=as_json)
    report = measured(request.spec.num_layers, keep_dense, lambda sparse: _measure(loaded, request.ids, sparse, window, sinks))
    if plot is not None:
        plot.write_text(draw(report), encoding="utf-8")
    if as_json:
        asked = {"keep_dense": keep_dense, "window": window, "sinks": sinks, "n_tokens": len(request.ids)}
        document = {"schema": JSON_SCHEMA, "command": "sparsify", "model": model_entry(request.path, request.spec), **asked}
        print(json.dumps({**document, "sparsify": report.to_dict()}))
    else:
        print(header(request, loaded.wafer, placing.precision))
        print(f"\n{report}")
    return Exit.OK


def _measure(model: WaferModel, ids: list[int], sparse: tuple[int, ...], window: int, sinks: int) -> tuple[float, int]:
    """Loss, and bytes of keys and values, with those layers sparse."""
    from wse_emu.doctor.sparsify import next_token_loss
    from wse_emu.engine.plan import kv_bytes
    from wse_emu.foundation.attention_pattern import AttentionPattern
    from wse_emu.model import WaferModel

    spec = model.checkpoint.spec
    pattern = AttentionPattern(window=window, sinks=sinks)
    spec = spec.with_attention([pattern if layer in sparse else spec.pattern(layer) for layer in range(spec.num_layers)])
    tried = WaferModel(model.checkpoint, model.store, model.wafer, None, model.prefill_chunk, model.options, spec)
    tokens = np.array(ids, np.int64)
    loss = next_token_loss(tried(tokens).logits[0], tokens)
    return loss, kv_bytes(spec, model.wafer.spec, model.wafer.rows, model.wafer.cols, [len(ids)], model.options)
