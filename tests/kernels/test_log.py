"""Logarithms: their distance from the exact value in units in the last place, their edges, and the same bits in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from wse_kernels._jit import plain
from wse_kernels.log import log_array, softplus_array

F32 = NDArray[np.float32]


def ulps(got: F32, exact: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def applied(kernel, x: F32) -> F32:
    out = np.empty_like(x)
    with np.errstate(all="ignore"):
        kernel(x, out)
    return out


def floats(first: float, last: float, n: int) -> F32:
    """About n floats of one sign, spread evenly over their bits."""
    low, high = (int(np.float32(v).view(np.uint32)) for v in (first, last))
    return np.arange(low, high, max(1, (high - low) // n), dtype=np.uint32).view(np.float32)


def test_log_is_within_one_unit_in_the_last_place() -> None:
    x = np.concatenate([floats(1e-45, 3e38, 2_000_000), floats(0.5, 2.0, 2_000_000)])
    x = x[x != 1]
    assert ulps(applied(log_array, x), np.log(x.astype(np.float64))).max() <= 1


def test_softplus_is_within_two_and_a_half_units() -> None:
    x = np.concatenate([floats(1e-30, 300.0, 1_000_000), -floats(1e-30, 87.0, 1_000_000)])
    assert ulps(applied(softplus_array, x), np.logaddexp(0, x.astype(np.float64))).max() <= 2.5


@pytest.mark.nojit
def test_edges() -> None:
    x = np.array([0.0, -0.0, 1.0, np.inf, -1.0, -np.inf, np.nan], np.float32)
    expected = np.array([-np.inf, -np.inf, 0.0, np.inf, np.nan, np.nan, np.nan], np.float32)
    np.testing.assert_array_equal(applied(log_array, x), expected)
    x = np.array([-np.inf, -200.0, 0.0, 200.0, np.inf, np.nan], np.float32)
    expected = np.array([0.0, 0.0, np.log(2), 200.0, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(applied(softplus_array, x), expected)


@pytest.mark.nojit
@pytest.mark.parametrize("kernel", [log_array, softplus_array])
def test_plain_python_gives_the_same_bits(kernel) -> None:
    x = np.concatenate([np.random.default_rng(0).standard_normal(300).astype(np.float32) ** 3, floats(1e-45, 3e38, 300)])
    np.testing.assert_array_equal(applied(kernel, x).view(np.int32), applied(plain(kernel), x).view(np.int32))
