"""What one wafer offers: grid, memory and fabric, every figure with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from wse_emu.foundation.errors import SpecError

BYTES_PER_WAVELET = 4
"""Payload of one fabric message: 32 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WaferSpec:
    """What one wafer offers; per-core numbers are per core, never totals."""

    name: str
    n_rows: int
    """Rows of cores on the fabric."""
    n_cols: int
    """Columns of cores on the fabric."""
    usable_rows: int
    """Rows open to programs (the rest serves the host interface)."""
    usable_cols: int
    """Columns open to programs."""
    sram_bytes_per_core: int
    """Code and data together."""
    base_code_bytes: int
    """Runtime and host-interface code that lies on every core before any kernel."""
    n_colors: int
    """Routable colors (virtual channels) of the fabric."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Field name to publication, or ``"assumed: <why>"``."""

    def __post_init__(self) -> None:
        for name in ("n_rows", "n_cols", "usable_rows", "usable_cols", "sram_bytes_per_core", "n_colors"):
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise SpecError(f"`{name}` must be a positive integer, got {value!r}")
        if self.usable_rows > self.n_rows or self.usable_cols > self.n_cols:
            raise SpecError(f"usable rectangle {self.usable_rows} x {self.usable_cols} exceeds the fabric {self.n_rows} x {self.n_cols}")
        if not 0 <= self.base_code_bytes < self.sram_bytes_per_core:
            raise SpecError(
                f"`base_code_bytes` must lie in 0..{self.sram_bytes_per_core - 1} (`sram_bytes_per_core`), got {self.base_code_bytes}"
            )
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))

    @property
    def sram_bytes(self) -> int:
        """SRAM of the usable rectangle, in bytes."""
        return self.usable_rows * self.usable_cols * self.sram_bytes_per_core


_SDK_FABRIC = "SDK compile logs: fabric w,h = {w},{h}; (rows, cols) = (h, w)"
_SDK_SRAM = "Cerebras SDK white paper and documentation: 48 KiB per processing element"
_SDK_COLORS = "Cerebras SDK documentation: 24 routable colors"
_CODE = "FABRICA performance notes, CS-3: a minimal memcpy kernel takes 4,176 bytes"

WSE2 = WaferSpec(
    name="WSE-2",
    n_rows=996,
    n_cols=757,
    usable_rows=994,
    usable_cols=750,
    sram_bytes_per_core=49_152,
    base_code_bytes=4_176,
    n_colors=24,
    sources={
        "n_rows": _SDK_FABRIC.format(w=757, h=996),
        "n_cols": _SDK_FABRIC.format(w=757, h=996),
        "usable_rows": "SPADA, arXiv 2511.09447: 750 x 994 (width x height) with memcpy",
        "usable_cols": "SPADA, arXiv 2511.09447: 750 x 994 (width x height) with memcpy",
        "sram_bytes_per_core": _SDK_SRAM,
        "base_code_bytes": "assumed: the figure measured on the CS-3 (FABRICA performance notes)",
        "n_colors": _SDK_COLORS,
    },
)
"""Second generation (CS-2)."""

WSE3 = WaferSpec(
    name="WSE-3",
    n_rows=1172,
    n_cols=762,
    usable_rows=1170,
    usable_cols=755,
    sram_bytes_per_core=49_152,
    base_code_bytes=4_176,
    n_colors=24,
    sources={
        "n_rows": "MeshInfra WaferLLM compile scripts: fabric 762 x 1172 (width x height)",
        "n_cols": "MeshInfra WaferLLM compile scripts: fabric 762 x 1172 (width x height)",
        "usable_rows": "SPADA, arXiv 2511.09447: height <= 1172 - 2 with memcpy",
        "usable_cols": "SPADA, arXiv 2511.09447: width <= 762 - 7 with memcpy",
        "sram_bytes_per_core": _SDK_SRAM,
        "base_code_bytes": _CODE,
        "n_colors": _SDK_COLORS,
    },
)
"""Third generation (CS-3)."""

TINY = WaferSpec(
    name="TINY",
    n_rows=4,
    n_cols=4,
    usable_rows=4,
    usable_cols=4,
    sram_bytes_per_core=49_152,
    base_code_bytes=4_176,
    n_colors=24,
    sources={
        "n_rows": "assumed: small enough to print every core",
        "n_cols": "assumed: small enough to print every core",
        "usable_rows": "assumed: no host columns on a grid for tests",
        "usable_cols": "assumed: no host columns on a grid for tests",
        "sram_bytes_per_core": _SDK_SRAM,
        "base_code_bytes": _CODE,
        "n_colors": _SDK_COLORS,
    },
)
"""A 4 x 4 grid for tests and for looking at single cores."""
