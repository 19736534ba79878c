"""``wse-emu plan``: does it fit, where, and what would be streamed; from config.json alone."""

from __future__ import annotations

import json

from wse_emu.cli import options
from wse_emu.cli.exits import Exit
from wse_emu.cli.options import WaferName
from wse_emu.cli.run import JSON_SCHEMA


def plan(
    model: options.ModelOrConfig,
    rows: options.Rows = None,
    cols: options.Cols = None,
    prompt_tokens: options.PromptTokens = 512,
    new_tokens: options.NewTokens = 32,
    batch: options.Batch = 1,
    wafer: options.Wafer = WaferName.WSE3,
    prefill_chunk: options.PrefillChunk = None,
    as_json: options.Json = False,
) -> int:
    """Say whether and where a model fits.

    Names what lies on the worst core and how much would be streamed; reads config.json only.
    """
    from wse_emu.checkpoint import read_config
    from wse_emu.cli.tables import bytes_text, console

    _, spec = read_config(model)
    from wse_emu.engine.plan import plan_model

    rows, cols = options.grid(rows, cols)
    made = plan_model(
        spec,
        wafer_spec=wafer.spec,
        rows=rows,
        cols=cols,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        prefill_chunk=prefill_chunk,
    )
    code = Exit.OK if made.fits else Exit.DOES_NOT_FIT
    if as_json:
        print(json.dumps({"schema": JSON_SCHEMA, "command": "plan", "model": str(model), "wafer": wafer.spec.name, "plan": made.to_dict()}))
        return code
    from rich.table import Table

    limit = wafer.spec.sram_bytes_per_core
    print(f"model   {spec.family}, {spec.n_params:,} parameters; {batch} x ({prompt_tokens} + {new_tokens}) tokens")
    print(f"wafer   {made.rows} x {made.cols} cores of {wafer.spec.name}")
    table = Table(title=f"SRAM of the worst core {made.worst_core}", title_justify="left", show_footer=True)
    table.add_column("block", footer="together")
    table.add_column("bytes", footer=f"{made.peak_bytes:,} of {limit:,}", justify="right")
    for name, size in made.blocks:
        table.add_row(name, f"{size:,}")
    console().print(table)
    print(f"weights streamed for the prompt: {bytes_text(made.stream_bytes_prefill)}")
    print(f"weights streamed for each further token, at worst: {bytes_text(made.stream_bytes_token)}")
    print(f"longest sequence on this grid: {made.max_context:,} tokens")
    print(made.message)
    return code
