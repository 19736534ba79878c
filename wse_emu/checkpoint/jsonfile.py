"""JSON from untrusted files: bounded size, no duplicate keys, no NaN, an object at the top; errors by name."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from wse_emu.foundation.errors import CheckpointError, ConfigError

_Named = type[ConfigError] | type[CheckpointError]


def read_bytes(path: Path, *, limit: int, error: _Named) -> bytes | None:
    """Content of a regular file of at most ``limit`` bytes, None if there is none of that name; anything else raises ``error``."""
    try:
        info = path.stat()  # before opening: a FIFO would block
        if not stat.S_ISREG(info.st_mode):
            raise error(f"{path}: not a regular file")
        if info.st_size > limit:
            raise error(f"{path}: {info.st_size} bytes, at most {limit} are allowed for this file")
        with open(path, "rb") as f:
            data = f.read(info.st_size + 1)  # a read of `limit` would ask for that much memory
    except FileNotFoundError:
        return None
    except OSError as e:
        raise error(f"{path}: cannot be read: {os.strerror(e.errno) if e.errno else e}") from e
    if len(data) != info.st_size:
        raise error(f"{path}: changed while it was read; try again")
    return data


def parse_object(data: bytes, *, where: str, error: _Named) -> dict[str, Any]:
    """JSON object from UTF-8 bytes; duplicate keys, NaN and infinities are refused, as is any other top-level value."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            twice = Counter(k for k, _ in pairs).most_common(1)[0][0]
            raise error(f"{where}: key {twice[:80]!r} stands there twice")
        return out

    def no_constant(text: str) -> Any:
        raise error(f"{where}: {text} is not a JSON number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ConfigError, CheckpointError):
        raise
    except (ValueError, RecursionError) as e:
        raise error(f"{where}: not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise error(f"{where}: must hold a JSON object, holds {type(value).__name__}")
    return value
