"""`check_arrays` holds arrays to the axes that a docstring names."""

from __future__ import annotations

import numpy as np
import pytest

from wse_kernels.errors import DTypeError, ShapeError, check_arrays

pytestmark = pytest.mark.nojit


def test_lengths_of_named_axes_are_returned():
    x, w = np.zeros((3, 4), np.float32), np.zeros((4, 5), np.float32)
    assert check_arrays(np.float32, x=(x, "n_tokens hidden"), w=(w, "hidden ffn")) == {"n_tokens": 3, "hidden": 4, "ffn": 5}


def test_axis_that_disagrees_names_both_arrays():
    x, w = np.zeros((3, 4), np.float32), np.zeros((6, 5), np.float32)
    with pytest.raises(ShapeError, match=r"axis `hidden` of `w` is 6, but `x` has hidden = 4 \(shape \(6, 5\)\)"):
        check_arrays(np.float32, x=(x, "n_tokens hidden"), w=(w, "hidden ffn"))


def test_one_name_twice_in_one_array_must_agree():
    with pytest.raises(ShapeError, match="axis `n` of `x` is 4"):
        check_arrays(np.float32, x=(np.zeros((3, 4), np.float32), "n n"))


def test_wrong_number_of_axes_raises():
    with pytest.raises(ShapeError, match=r"`x` must have 2 axes \(n_tokens, hidden\), got shape \(3,\)"):
        check_arrays(np.float32, x=(np.zeros(3, np.float32), "n_tokens hidden"))


def test_fixed_axis_must_match():
    assert check_arrays(np.int64, x=(np.zeros((2, 3), np.int64), "2 n")) == {"n": 3}
    with pytest.raises(ShapeError, match=r"`x` must have axes \(4, n\), got shape \(2, 3\)"):
        check_arrays(np.int64, x=(np.zeros((2, 3), np.int64), "4 n"))


def test_array_without_axes():
    assert check_arrays(np.float32, x=(np.zeros((), np.float32), "")) == {}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.zeros(3), "got float64"),
        (np.zeros(3, ">f4"), "got >f4"),
        ([1.0], "must be an ndarray of float32, got list"),
        (np.float32(1), "must be an ndarray of float32, got float32"),
    ],
)
def test_other_types_are_refused_and_not_converted(value, found):
    with pytest.raises(DTypeError, match=found):
        check_arrays(np.float32, x=(value, "n"))


def test_errors_are_what_one_would_expect():
    assert issubclass(ShapeError, ValueError)
    assert issubclass(DTypeError, TypeError)
