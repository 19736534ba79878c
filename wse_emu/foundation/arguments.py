"""What callers hand over: checks of one argument each, and values as messages show them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from wse_emu.foundation.errors import SpecError, WseError

MAX_SEED = 1 << 128
"""Seeds lie below this; as large as the entropy that NumPy draws."""
MAX_FLOAT32 = float(np.finfo(np.float32).max)
MIN_FLOAT32 = float(np.finfo(np.float32).tiny)
"""Smallest positive normal number."""
_SHOWN = 80
_LONGEST_PATH = 4096


def show(value: object) -> str:
    """``repr`` cut to a length that fits a message; never fails, and never converts a huge integer to decimal."""
    if type(value) is int and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a huge integer inside
        return f"something of type {type(value).__name__} that is too large to show"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def check_flag(name: str, value: object, error: type[WseError] = SpecError) -> bool:
    """`value`, if it is true or false and not merely taken for one; else `error`."""
    if not isinstance(value, (bool, np.bool_)):
        raise error(f"`{name}` must be True or False, got {show(value)}")
    return bool(value)


def check_callable(name: str, value: Any, error: type[WseError] = SpecError) -> None:
    """Raise `error` unless `value` can be called or is None."""
    if value is not None and not callable(value):
        raise error(f"`{name}` must be a function or None, got {show(value)}")


def check_path(name: str, value: Any, error: type[WseError] = SpecError) -> Path:
    """`value` as a path, if the file system can have one of that name; else `error`."""
    try:
        text = os.fspath(value)
        usable = isinstance(text, str) and text != "" and b"\0" not in os.fsencode(text) and len(text) < _LONGEST_PATH
    except (TypeError, UnicodeEncodeError):
        usable = False
    if not usable:
        raise error(f"`{name}` must be a path (text or pathlib.Path, not empty, shorter than {_LONGEST_PATH}), got {show(value)}")
    return Path(text)


def is_real(value: object) -> bool:
    """Whether `value` is a finite number; true and false are none."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
