"""Every error the project raises by name; each also derives from the builtin one would expect.

Messages say where, which rule, which value, and the way out if it is known.
"""

from __future__ import annotations

from typing import Any


class WseError(Exception):
    """Root of all errors that the project raises on purpose."""


class SpecError(WseError, ValueError):
    """A wafer, model or option specification breaks a stated rule."""


class ConfigError(SpecError):
    """A checkpoint's config.json is missing, malformed or asks for what is not supported."""


class CheckpointError(WseError, ValueError):
    """A checkpoint's tensors are missing, truncated, corrupt or disagree with config.json."""


class SaveError(WseError, OSError):
    """A checkpoint cannot be written where it was asked for."""


class StoreError(WseError, OSError):
    """A MemoryX layout file or its cache directory cannot be made, read or trusted."""


class InputError(WseError, ValueError):
    """Token ids, masks or sampling options given by the caller break a stated rule."""


class PlacementError(WseError, ValueError):
    """A tensor cannot be laid on the wafer as asked, or two placements do not agree."""


class SramOverflowError(WseError, MemoryError):
    """A core would need more SRAM than it has; `core_map` says what lies on it (None where only an arena overflowed)."""

    def __init__(self, message: str, *, core_map: Any = None) -> None:
        super().__init__(message)
        self.core_map = core_map


class SramStateError(WseError, RuntimeError):
    """A block is freed twice, used after it was freed, or left on the wafer at the end of a run."""


class BusyError(WseError, RuntimeError):
    """A run was started on a wafer by a callback of a run that is not finished."""


class ForkError(WseError, RuntimeError):
    """A forked child asked for what a thread of its parent was in the middle of."""


class UninitializedReadError(WseError, RuntimeError):
    """A core read SRAM that neither a kernel nor the fabric has written."""


class RouteError(WseError, RuntimeError):
    """A fabric move breaks a rule of the fabric (off the grid, too many colors, no message)."""


class KernelError(WseError, TypeError):
    """A kernel is declared or launched in a way that breaks its contract."""


class TraceError(WseError, ValueError):
    """A recorded routing trace does not belong to the program that replays it."""


class TieError(WseError, ArithmeticError):
    """Equal scores leave a token's experts open, and the routing rule rejects ties."""


class NumberOverflowError(WseError, OverflowError):
    """A stage gives a number that is too large for the format in which it is stored."""
