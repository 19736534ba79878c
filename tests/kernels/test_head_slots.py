"""Heads side by side on a core: taken out, put among the others, rotated; against NumPy's own indexing."""

from __future__ import annotations

import numpy as np
import pytest

from wse_kernels.head_slots import put_slots, rotate_slots, take_slot
from wse_kernels.rope import rotate_qk

pytestmark = pytest.mark.nojit

F = np.float32


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


@pytest.mark.parametrize(("units", "slots"), [(1, 1), (3, 4), (2, 5)])
def test_a_slot_is_taken_and_put_back(units: int, slots: int) -> None:
    x = numbers(3, units * slots * 2)
    split, out = x.reshape(3, units, slots, 2), np.full((3, units * 2), np.nan, F)
    for slot in range(slots):
        take_slot(x, slot, out)
        np.testing.assert_array_equal(out.reshape(3, units, 2), split[:, :, slot])
    wider = np.full((3, (units + 2) * (slots + 1) * 2), np.nan, F)
    for slot in range(slots):
        take_slot(x, slot, out)
        put_slots(out, 1, slot, slots + 1, 0, wider)
    found = wider.reshape(3, units + 2, slots + 1, 2)
    np.testing.assert_array_equal(found[:, :units, :slots], split)
    assert np.isnan(found[:, units:]).all()
    assert np.isnan(found[:, :, slots]).all()


def test_several_slots_go_to_the_last_units() -> None:
    x, out = numbers(2, 2 * 3 * 2), np.zeros((2, 5 * 4 * 2), F)
    put_slots(x, 3, 1, 4, 1, out)
    found = out.reshape(2, 5, 4, 2)
    np.testing.assert_array_equal(found[:, 3:, 1:], x.reshape(2, 2, 3, 2))
    assert not found[:, :3].any()
    assert not found[:, :, 0].any()


def test_an_empty_block_is_left_alone() -> None:
    take_slot(np.empty((2, 0), F), 0, np.empty((2, 0), F))
    put_slots(np.empty((2, 0), F), 1, 0, 3, 1, np.empty((2, 0), F))


def test_every_slot_turns_as_queries_do() -> None:
    x, angle = numbers(4, 3 * 5 * 2), np.random.default_rng(1).uniform(0, 6, (4, 3))
    cos, sin = np.cos(angle).astype(F), np.sin(angle).astype(F)
    usual = np.concatenate([x.reshape(4, 3, 10), np.ones((4, 3, 2), F)], axis=2).reshape(4, -1)
    rotate_qk(usual, cos, sin, 4)
    rotate_slots(x, cos, sin)
    np.testing.assert_array_equal(x.reshape(4, 3, 10), usual.reshape(4, 3, 12)[:, :, :10])
    assert not np.array_equal(x, numbers(4, 3 * 5 * 2))
