"""Presets of wafers: every number has a source; a variant is valid or refused by name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.wafer_spec import TINY, WSE2, WSE3, WaferSpec

PRESETS = (WSE2, WSE3, TINY)


def numbers(spec: WaferSpec) -> dict[str, object]:
    """Fields of a spec that are figures."""
    return {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in ("name", "sources")}


@pytest.mark.parametrize("spec", PRESETS, ids=lambda s: s.name)
def test_every_number_has_a_source(spec: WaferSpec) -> None:
    assert set(spec.sources) == set(numbers(spec))
    for name, source in spec.sources.items():
        assert source.strip(), f"{spec.name}: the source of `{name}` is empty"
        if source.startswith("assumed"):
            assert source.partition("assumed: ")[2].strip(), f"{spec.name}: `{name}` is assumed without a reason"


@pytest.mark.parametrize("spec", PRESETS, ids=lambda s: s.name)
def test_unknown_figures_are_absent_rather_than_zero(spec: WaferSpec) -> None:
    assert all(value is None or value > 0 for value in numbers(spec).values())  # type: ignore[operator]


def test_wse3_is_the_published_machine() -> None:
    assert (WSE3.n_rows, WSE3.n_cols, WSE3.usable_rows, WSE3.usable_cols) == (1172, 762, 1170, 755)
    assert WSE3.sram_bytes_per_core == 48 * 1024
    assert WSE3.sram_bytes == 1170 * 755 * 49_152


def test_a_preset_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        WSE3.n_rows = 1  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        WSE3.sources["n_rows"] = "me"  # type: ignore[index]


def test_a_variant_keeps_the_rest() -> None:
    larger = replace(WSE3, sram_bytes_per_core=65_536)
    assert larger.sram_bytes_per_core == 65_536
    assert (larger.n_rows, larger.sources) == (WSE3.n_rows, WSE3.sources)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_rows": 0}, "`n_rows` must be a positive integer, got 0"),
        ({"n_colors": 24.0}, r"`n_colors` must be a positive integer, got 24\.0"),
        ({"n_cols": True}, "`n_cols` must be a positive integer, got True"),
        ({"usable_rows": 1173}, "usable rectangle 1173 x 755 exceeds the fabric 1172 x 762"),
        ({"sram_bytes_per_core": -1}, "`sram_bytes_per_core` must be a positive integer, got -1"),
        ({"base_code_bytes": 49_152}, r"`base_code_bytes` must lie in 0\.\.49151 \(`sram_bytes_per_core`\), got 49152"),
    ],
)
def test_an_invalid_variant_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(WSE3, **change)  # type: ignore[arg-type]
