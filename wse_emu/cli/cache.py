"""``wse-emu cache``: what the project keeps on disk, and how to be rid of it."""

from __future__ import annotations

import json
from typing import Any

from wse_emu.cli import options
from wse_emu.cli.describe import JSON_SCHEMA
from wse_emu.cli.exits import Exit


def cache(clear: options.Clear = False, as_json: options.Json = False) -> int:
    """List or clear what is kept on disk.

    Kept between runs are weights in wafer layout and compiled kernels.
    """
    from wse_emu.foundation.units import bytes_text
    from wse_emu.memoryx import build
    from wse_kernels import _cache as kernels

    entries: list[dict[str, Any]] = [
        *({"kind": "weights", "path": str(entry.path), "size_bytes": entry.nbytes, "of": entry.source} for entry in build.cache_entries()),
        *(
            {"kind": "kernels", "path": str(entry.path), "size_bytes": entry.size_bytes, "of": entry.stamp}
            for entry in kernels.cache_entries()
        ),
    ]
    if clear:
        build.clear_cache()
        kernels.clear_cache()
    if as_json:
        print(json.dumps({"schema": JSON_SCHEMA, "command": "cache", "cleared": clear, "entries": entries}))
        return Exit.OK
    for entry in entries:
        print(f"{entry['kind']:8} {bytes_text(entry['size_bytes']):>12}  {entry['path']}")
    total = bytes_text(sum(entry["size_bytes"] for entry in entries))
    print(f"{len(entries)} entries, {total}{', all removed' if clear else ''}")
    print(f"cache folder: {kernels.cache_base()} (set {kernels.ENV_CACHE_DIR} to move it)")
    return Exit.OK
