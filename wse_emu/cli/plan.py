"""``wse-emu plan``: does it fit, where, and what would be streamed; from config.json alone."""

from __future__ import annotations

import json
import sys

from wse_emu.cli import options, patterns, rules
from wse_emu.cli.describe import JSON_SCHEMA, attention_lines, model_entry, rule_text
from wse_emu.cli.exits import Exit
from wse_emu.cli.options import Growth, Keeping, NumberFormat, Placing, WaferName
from wse_emu.cli.patterns import PatternOptions
from wse_emu.cli.rules import RuleOptions, routed

DEFAULT_PROMPT_TOKENS = 512
"""Tokens of a prompt where none are given; fewer where the model has not so many positions."""


def plan(
    model: options.ModelOrConfig,
    rows: options.Rows = None,
    cols: options.Cols = None,
    prompt_tokens: options.PromptTokens = None,
    new_tokens: options.NewTokens = 32,
    batch: options.Batch = 1,
    wafer: options.Wafer = WaferName.WSE3,
    prefill_chunk: options.PrefillChunk = None,
    routing: rules.Routing = None,
    moe_implementation: options.MoeImplementation = None,
    bta_max_tile: options.BtaMaxTile = None,
    dtype: options.Dtype = NumberFormat.FLOAT32,
    kv_dtype: options.KvDtype = None,
    precision_opt_level: options.OptLevel = 0,
    kv_growth: options.KvGrowth = Growth.SHIFT,
    kv: options.Kv = Keeping.STORE,
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
    """Say whether and where a model fits.

    Names what lies on the worst core, how much would be streamed, what keys and values take and how long a sequence may be. Reads
    config.json only.
    """
    from wse_emu.checkpoint import read_config, unread_fields
    from wse_emu.cli.load import left_out
    from wse_emu.cli.tables import console, sram_table
    from wse_emu.foundation.units import bytes_text, decimal_bytes_text

    config, spec = read_config(model)
    unread = unread_fields(config)
    if unread and not as_json:
        print(left_out(unread), file=sys.stderr)
    chosen = PatternOptions(window, sinks, attention_chunk_size, columns, fixed, attention, dense_layers, sparse_layers)
    spec = chosen.applied(spec)
    rule = RuleOptions(routing).rule(spec)
    spec = routed(spec, rule)
    from wse_emu.engine.plan import plan_model

    precision = options.precision(dtype, kv_dtype, precision_opt_level)
    placing = Placing(
        precision=precision, kv_growth=kv_growth, kv=kv, routing=rule, moe_implementation=moe_implementation, bta_max_tile=bta_max_tile
    )
    rows, cols = options.grid(rows, cols)
    if prompt_tokens is None:
        prompt_tokens = max(1, min(DEFAULT_PROMPT_TOKENS, spec.max_position_embeddings - new_tokens))
    made = plan_model(
        spec,
        wafer_spec=wafer.spec,
        rows=rows,
        cols=cols,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        prefill_chunk=prefill_chunk,
        options=placing.engine,
        config=config,
    )
    code = Exit.OK if made.fits else Exit.DOES_NOT_FIT
    if as_json:
        asked = {
            "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "prefill_chunk": prefill_chunk,
            **chosen._asdict(), "dtype": dtype, "kv_dtype": kv_dtype or dtype,
            "precision_opt_level": precision_opt_level, "kv_growth": kv_growth, "kv": kv,
            "moe_implementation": placing.engine.moe_implementation, "bta_max_tile": bta_max_tile,
        }  # fmt: skip
        document = {"schema": JSON_SCHEMA, "command": "plan", "model": model_entry(model, spec), "ignored": unread}
        print(json.dumps({**document, "wafer": wafer.spec.name, **asked, "plan": made.to_dict()}))
        return code
    print(f"model   {spec.family}, {spec.n_params:,} parameters; {batch} x ({prompt_tokens} + {new_tokens}) tokens")
    for line in attention_lines(spec):
        print(f"attention {line}")
    if rule is not None:
        print(f"routing {rule_text(spec.routing)}")
    print(f"wafer   {made.rows} x {made.cols} cores of {wafer.spec.name}")
    title = f"SRAM of the worst core {made.worst_core}"
    console().print(sram_table(title, made.blocks, made.peak_bytes, wafer.spec.sram_bytes_per_core))
    print()
    print(f"weights streamed for the prompt: {bytes_text(made.stream_bytes_prefill)}")
    print(f"weights streamed for each further token, at worst: {bytes_text(made.stream_bytes_token)}")
    print(f"keys and values at the end: {made.kv_bytes:,} bytes ({decimal_bytes_text(made.kv_bytes)}, {bytes_text(made.kv_bytes)})")
    print(f"longest sequence on this grid: {made.max_context:,} tokens")
    print(made.message)
    return code
