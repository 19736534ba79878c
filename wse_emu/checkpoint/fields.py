"""Typed access to a JSON object that nobody vouches for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import ConfigError

MAX_DIM = 1 << 31
"""Larger sizes are taken for a damaged config.json."""
ABSENT: Any = object()
"""Default of a field that must be there."""


class Fields:
    """One JSON object; a wrong type or value raises `ConfigError` that names the field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, name: str, rule: str) -> ConfigError:
        """Error for a field that breaks `rule`."""
        return ConfigError(f"{self.where}: `{name}` {rule}, got {show(self.values.get(name))}")

    def get(self, name: str, default: Any = ABSENT) -> Any:
        """Value as it stands, or the default; without a default the field must be there."""
        value = self.values.get(name, default)
        if value is ABSENT:
            raise ConfigError(f"{self.where}: `{name}` is missing; it has no default")
        return value

    def given(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: Any = ABSENT, *, low: int = 1, high: int = MAX_DIM) -> int:
        """Integer in ``low..high``; true and false are none."""
        value = self.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(name, f"must be an integer in {low}..{high}")
        return int(value)

    def same_for_all(self, name: str, default: Any, length: int, *, high: int = MAX_DIM) -> int:
        """Integer in ``1..high``, or a list of `length` that are alike."""
        value = self.get(name, default)
        if not isinstance(value, list):
            return self.integer(name, default, high=high)
        if len(value) != length or not all(type(v) is int and 1 <= v <= high and v == value[0] for v in value):
            raise self.fail(name, f"must be an integer in 1..{high}, or a list of {length} that are alike")
        return int(value[0])

    def number(self, name: str, default: Any = ABSENT) -> float:
        """Finite number."""
        value = self.get(name, default)
        if not _is_number(value):
            raise self.fail(name, "must be a finite number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Finite number, or None where the field is absent or null."""
        return self.number(name) if self.given(name) else None

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.fail(name, "must be true or false")
        return value

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """List of `length` finite numbers."""
        value = self.get(name)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length or not all(map(_is_number, value)):
            raise self.fail(name, f"must be a list of {length} finite numbers")
        return tuple(float(v) for v in value)

    def layers(self, name: str, num_layers: int) -> tuple[int, ...]:
        """List of layer indices, ascending and without repetition; () where the field is absent or null."""
        value = self.get(name, None)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(i) is int and 0 <= i < num_layers for i in value):
            raise self.fail(name, f"must be a list of layers in 0..{num_layers - 1}")
        return tuple(sorted(set(value)))

    def object(self, name: str) -> Fields | None:
        """Object of its own, or None where the field is absent or null."""
        value = self.get(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(name, "must be an object or null")
        return Fields(value, f"{self.where}: `{name}`")


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) < 1 << 53
    return type(value) is float and value == value and value not in (float("inf"), float("-inf"))
