"""The errors of `wse_kernels`, and the check of arrays that raises two of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class ShapeError(ValueError):
    """An array has the wrong number of axes, or an axis disagrees with an earlier argument."""


class DTypeError(TypeError):
    """An argument is not an array of the stated dtype; nothing is converted silently."""


def check_arrays(dtype: DTypeLike, /, **named: tuple[NDArray[Any], str]) -> dict[str, int]:
    """Check arrays against the names of their axes, as the docstring of the caller states them.

    Parameters
    ----------
    dtype : dtype-like
        What every array must be, byte order included.
    **named : (ndarray, str)
        Argument name to the array and its axes: names in order, separated by blanks, for instance ``x=(x, "n_tokens hidden")``.
        An axis may also be a number, which must match; ``""`` is an array without axes.

    Returns
    -------
    dict of str to int
        Length of every named axis.

    Raises
    ------
    DTypeError
        If an argument is not an ndarray of `dtype`.
    ShapeError
        If the number of axes differs, or an axis has another length than in an earlier argument.
    """
    expected = np.dtype(dtype)
    lengths: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, (array, axes) in named.items():
        if not isinstance(array, np.ndarray):
            raise DTypeError(f"`{name}` must be an ndarray of {expected}, got {type(array).__name__}")
        if array.dtype != expected:
            raise DTypeError(f"`{name}` must be {expected}, got {array.dtype}; convert it explicitly with `.astype`")
        labels = axes.split()
        if array.ndim != len(labels):
            raise ShapeError(f"`{name}` must have {len(labels)} axes ({', '.join(labels)}), got shape {array.shape}")
        for label, length in zip(labels, array.shape, strict=True):
            if label.isdecimal():
                if length != int(label):
                    raise ShapeError(f"`{name}` must have axes ({', '.join(labels)}), got shape {array.shape}")
            elif label not in lengths:
                lengths[label] = length
                first[label] = name
            elif length != lengths[label]:
                raise ShapeError(
                    f"axis `{label}` of `{name}` is {length}, but `{first[label]}` has {label} = {lengths[label]} (shape {array.shape})"
                )
    return lengths
