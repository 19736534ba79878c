"""JSON from untrusted files: no duplicate keys, no NaN, an object at the top; errors by name."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from wse_emu.checkpoint.files import Named
from wse_emu.foundation.errors import WseError


def parse_json(data: bytes, *, where: str, error: type[WseError]) -> Any:
    """JSON from UTF-8 bytes; duplicate keys, NaN and infinities are refused."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            twice = Counter(k for k, _ in pairs).most_common(1)[0][0]
            raise error(f"{where}: key {twice[:80]!r} stands there twice")
        return out

    def no_constant(text: str) -> Any:
        raise error(f"{where}: {text} is not a JSON number")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except WseError:
        raise
    except (ValueError, RecursionError) as e:
        raise error(f"{where}: not valid JSON: {e}") from e


def parse_object(data: bytes, *, where: str, error: Named) -> dict[str, Any]:
    """JSON object as `parse_json` reads it; any other top-level value is refused."""
    value = parse_json(data, where=where, error=error)
    if not isinstance(value, dict):
        raise error(f"{where}: must hold a JSON object, holds {type(value).__name__}")
    return value
