"""Rounding in place: the definition's bits for every kind of number, and what it says of the largest."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from wse_emu.foundation.errors import NumberOverflowError
from wse_emu.wafer.storage import FORMATS, nearest, round_in_place
from wse_kernels import storage
from wse_kernels.formats import BF16, CB16, F16, FloatFormat, decode, encode

from .test_formats import numbers

pytestmark = pytest.mark.nojit
KERNELS = {BF16: storage.round_bf16, F16: storage.round_f16, CB16: storage.round_cb16}


@pytest.mark.parametrize("fmt", KERNELS, ids=lambda fmt: fmt.name)
def test_rounding_in_place_is_the_definition(fmt: FloatFormat) -> None:
    x = numbers(fmt)
    rounded, largest = x.copy(), np.abs(x[np.isfinite(x)]).max()
    assert np.int32(KERNELS[fmt](rounded)).view(np.float32) == largest
    assert np.array_equal(rounded.view(np.uint32), decode(encode(x, fmt), fmt).view(np.uint32))


@pytest.mark.parametrize(("name", "half"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_ties_go_to_even_as_in_numpy_and_ml_dtypes(name: str, half: type) -> None:
    x = (np.arange(64) / 4 + 64).astype(np.float32) * np.float32(2.0 ** (4 if name == "bfloat16" else 7))
    want = x.astype(half).astype(np.float32)
    assert np.array_equal(nearest(x, name, "x"), want)
    assert round_in_place(x, name) is None
    assert np.array_equal(x, want)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_beyond_the_largest_number_is_told_and_infinities_are_not(name: str) -> None:
    fmt = FORMATS[name]
    top = np.float32(fmt.max_finite)
    half_step = np.float32(2.0 ** (fmt.bias - fmt.mantissa_bits - 1))
    beyond = top + half_step
    below = np.nextafter(beyond, np.float32(0))
    assert nearest(np.array([below, np.inf, -np.inf, np.nan], np.float32), name, "x")[0] == top
    assert round_in_place(np.array([-below, np.inf, np.nan], np.float32), name) is None
    assert round_in_place(np.array([1, -beyond], np.float32), name) == beyond
    with pytest.raises(NumberOverflowError, match=rf"core \(0, 1\): `x`: .* is beyond the largest number of {name}, "):
        nearest(np.array([1, -beyond], np.float32), name, "core (0, 1): `x`")


def test_copy() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    out = np.empty_like(x)
    storage.copy_to(x, out)
    assert np.array_equal(out, x)
