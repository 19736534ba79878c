"""``wse-emu verify``: every stage of a forward pass against the dense float64 reference."""

from __future__ import annotations

import json

from wse_emu.cli import options, patterns, rules
from wse_emu.cli.describe import JSON_SCHEMA, header, what_and_where
from wse_emu.cli.exits import Exit
from wse_emu.cli.load import load, read_request
from wse_emu.cli.options import Executor, NumberFormat, Placing, WaferName
from wse_emu.cli.patterns import PatternOptions
from wse_emu.cli.rules import RuleOptions, routed


def verify(
    model: options.Model = None,
    prompt: options.Prompt = None,
    ids: options.Ids = None,
    rows: options.Rows = None,
    cols: options.Cols = None,
    wafer: options.Wafer = WaferName.WSE3,
    executor: options.Execution = Executor.BATCHED,
    prefill_chunk: options.PrefillChunk = None,
    routing: rules.Routing = None,
    tie_policy: rules.TiePolicy = None,
    moe_implementation: options.MoeImplementation = None,
    bta_max_tile: options.BtaMaxTile = None,
    dtype: options.Dtype = NumberFormat.FLOAT32,
    kv_dtype: options.KvDtype = None,
    precision_opt_level: options.OptLevel = 0,
    skip_zero_weights: options.SkipZeros = False,
    window: patterns.Window = None,
    sinks: patterns.Sinks = 0,
    attention_chunk_size: patterns.ChunkSize = None,
    columns: patterns.Columns = None,
    fixed: patterns.Fixed = None,
    attention: patterns.Attention = None,
    dense_layers: patterns.DenseLayers = None,
    sparse_layers: patterns.SparseLayers = None,
    as_json: options.Json = False,
) -> int:
    """Compare every stage with the dense reference.

    Runs the prompt through the wafer and holds every stage of every layer against a dense float64 forward pass.
    """
    chosen = PatternOptions(window, sinks, attention_chunk_size, columns, fixed, attention, dense_layers, sparse_layers)
    request = chosen.of(read_request(model, prompt, ids))
    precision = options.precision(dtype, kv_dtype, precision_opt_level)
    rule = RuleOptions(routing, tie_policy).rule(request.spec)
    request = request._replace(spec=routed(request.spec, rule))
    placing = Placing(
        rows, cols, wafer, executor, prefill_chunk=prefill_chunk, precision=precision, skip_zero_weights=skip_zero_weights,
        routing=rule, moe_implementation=moe_implementation, bta_max_tile=bta_max_tile,
    )  # fmt: skip
    loaded = load(request, placing, new_tokens=0, verify=True, quiet=as_json)
    if not as_json:
        print(header(request, loaded.wafer, placing.precision, rerouted=rule is not None), flush=True)
    report = loaded.verify([request.ids])
    if as_json:
        where = what_and_where(request, loaded, loaded.wafer.sram.high_water_map, placing.precision)
        print(json.dumps({"schema": JSON_SCHEMA, "command": "verify", **where, "verification": report.to_dict()}))
    else:
        print(f"\n{report}")
    return Exit.OK if report.passed else Exit.VERIFICATION_FAILED
