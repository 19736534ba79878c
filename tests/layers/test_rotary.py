"""Rotary tables of the emulator against those of the reference, which shares no code with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.engine.plan import sequences_of
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.rope_scaling import ROPE_KINDS, RopeScaling
from wse_emu.layers.heads import HeadLayout
from wse_emu.layers.kv_cache import Sequences
from wse_emu.layers.rotary import ROTATE_QK, attention_factor, frequencies, place_rotary, rotary_tables
from wse_emu.reference.rotary import rotary_angles
from wse_emu.wafer.placement import TokenBands

from .definitions import normal
from .programs import agree, look, tokens

F32 = NDArray[np.float32]
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


def spec_of(half: int, theta: float, scaling: RopeScaling | None, n_kv: int = 1) -> ModelSpec:
    return ModelSpec(
        family="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2 * n_kv,
        num_kv_heads=n_kv, head_dim=2 * half, rms_norm_eps=1e-5, rope_theta=theta, rope_scaling=scaling,
        max_position_embeddings=4096,
    )  # fmt: skip


def at(positions: list[int]) -> Sequences:
    """One new token at each of these positions, each of a sequence of its own."""
    return sequences_of(list(range(len(positions))), [1] * len(positions), positions)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    half = draw(st.integers(2, 64))
    kind = draw(st.sampled_from([None, *ROPE_KINDS]))
    if kind is None:
        return spec_of(half, draw(st.floats(2, 1e7)), None)
    values: dict[str, Any] = {}
    if kind == "llama3":
        values["low_freq_factor"] = draw(st.floats(0.5, 4))
        values["high_freq_factor"] = values["low_freq_factor"] + draw(st.floats(0.5, 8))
    elif kind == "longrope":
        factors = st.lists(st.floats(0.5, 60), min_size=half, max_size=half).map(tuple)
        values |= {"short_factor": draw(factors), "long_factor": draw(factors)}
    elif kind == "yarn":
        values["beta_slow"] = draw(st.floats(0.5, 4))
        values["beta_fast"] = values["beta_slow"] + draw(st.floats(0, 40))
        values["truncate"] = draw(st.booleans())
        values |= {name: draw(st.none() | st.floats(0.1, 2)) for name in ("mscale", "mscale_all_dim")}
    if kind in ("yarn", "longrope"):
        values["attention_factor"] = draw(st.none() | st.floats(0.5, 2))
    if kind == "longrope" and draw(st.booleans()):
        values |= {"attention_factor": None, "short_mscale": draw(st.floats(0.5, 2)), "long_mscale": draw(st.floats(0.5, 2))}
    scaling = RopeScaling(
        kind=kind, factor=draw(st.floats(1, 64)), original_max_position_embeddings=draw(st.integers(2, 40)), **values
    )  # fmt: skip
    return spec_of(half, draw(st.floats(2, 1e7)), scaling)


@given(specs(), st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=3))
def test_tables_are_those_of_the_reference(spec: ModelSpec, lengths: list[tuple[int, int]]) -> None:
    """Sequences with some tokens in the cache."""
    start, n = [s for s, _ in lengths], [m for _, m in lengths]
    cos, sin = rotary_tables(spec, sequences_of(list(range(len(n))), n, start))
    seq = np.repeat(np.arange(len(n)), np.add(start, n))
    pos = np.concatenate([np.arange(s + m) for s, m in lengths])
    angles, factor = rotary_angles(spec, seq, pos)
    new = np.concatenate([np.arange(s + m) >= s for s, m in lengths])
    for got, of in ((cos, np.cos), (sin, np.sin)):
        expected = (factor * of(angles))[new]
        # One rounding, and what sixteen roundings of float64 move an angle of up to 60 by.
        np.testing.assert_allclose(got, expected, rtol=2.0**-24, atol=float(factor.max()) * 60 * 16 * 2.0**-53)


def test_frequencies_follow_the_length_only_where_the_kind_says_so() -> None:
    dynamic = spec_of(8, 1e4, RopeScaling(kind="dynamic", factor=2.0, original_max_position_embeddings=32))
    short = np.array_equal(frequencies(dynamic, 5), frequencies(spec_of(8, 1e4, None), 5))
    assert short
    assert not np.array_equal(frequencies(dynamic, 33), frequencies(dynamic, 40))
    factors = {"short_factor": (1.0,) * 8, "long_factor": (2.0,) * 8}
    longrope = spec_of(8, 1e4, RopeScaling(kind="longrope", factor=2.0, original_max_position_embeddings=32, **factors))
    np.testing.assert_array_equal(frequencies(longrope, 32), 2 * frequencies(longrope, 33))
    yarn = spec_of(8, 1e4, RopeScaling(kind="yarn", factor=2.0, original_max_position_embeddings=32))
    np.testing.assert_array_equal(frequencies(yarn, 3), frequencies(yarn, 60))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "linear"}, 1.0),
        ({"kind": "yarn"}, 0.1 * np.log(4) + 1),  # Peng et al., "YaRN", equation 22
        ({"kind": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"kind": "yarn", "attention_factor": 0.7}, 0.7),
        ({"kind": "longrope", "short_factor": (1.0,), "long_factor": (1.0,)}, np.sqrt(1 + np.log(4) / np.log(64))),
    ],
)
def test_attention_factor(values: dict[str, Any], expected: float) -> None:
    assert attention_factor(RopeScaling(factor=4.0, original_max_position_embeddings=64, **values), 5) == pytest.approx(expected, rel=1e-15)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 130_000), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 40), st.sampled_from([1e4, 5e5, 1e6]))
def test_rotary_tables_are_the_formula_rounded_once(positions, n_kv, half, theta) -> None:
    """``position * theta**(-2 u / d)`` in float64; two ways to take a power differ by units of 2**-53, which the angle multiplies."""
    cos, sin = rotary_tables(spec_of(half, theta, None, n_kv), at(positions))
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (len(positions), n_kv * half)
    for t, position in enumerate(positions):
        for unit in range(half):
            angle = position / theta ** (2 * unit / (2 * half))
            error = 2.0**-25 + 8 * 2.0**-53 * (1 + angle)
            for head in range(n_kv):
                assert abs(float(cos[t, head * half + unit]) - np.cos(angle)) <= error
                assert abs(float(sin[t, head * half + unit]) - np.sin(angle)) <= error


def test_position_zero_is_not_rotated() -> None:
    cos, sin = rotary_tables(spec_of(3, 1e4, None, 2), at([0, 0]))
    assert (cos == 1).all()
    assert (sin == 0).all()


@settings(max_examples=40)
@given(st.integers(0, 1 << 32), GRIDS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
@example(0, (1, 1), 1, 1, 1, 1)
@example(1, (6, 5), 2, 1, 2, 3)
def test_queries_and_keys_turn_and_values_do_not(seed, grid, m, n_kv, q, half) -> None:
    heads, bands = HeadLayout(n_kv, q, 2 * half, grid[1]), TokenBands(m, grid[0])
    positions = np.random.default_rng(seed).integers(0, 500, m)
    values = normal(seed, m, heads.qkv.total)

    def program(wafer: wse.Wafer) -> list[F32]:
        cos, sin = place_rotary(wafer, spec_of(half, 1e4, None, n_kv), at(positions.tolist()), heads, bands)
        with cos, sin, tokens(wafer, values, bands, heads.qkv) as qkv:
            wafer.launch(ROTATE_QK, qkv=qkv, cos=cos, sin=sin, q_slots=q)
            return [look(qkv)]

    (turned,), _ = agree(program, *grid)
    before, after = (a.astype(np.float64).reshape(m, n_kv, half, q + 2, 2) for a in (values, turned))
    np.testing.assert_array_equal(after[..., q + 1, :], before[..., q + 1, :])
    angle = positions[:, None, None, None] / 1e4 ** (np.arange(half) / half)[None, None, :, None]
    a, b = np.moveaxis(before[..., : q + 1, :], -1, 0)
    exact = np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)
    size = np.abs(a) + np.abs(b)
    # Cosine or sine, product and sum are rounded once each; the angles of this test and of the tables differ by units of 2**-53.
    bound = (3 * 2.0**-24 * size + 8 * 2.0**-53 * (1 + np.abs(angle)) * size)[..., None]
    assert (np.abs(after[..., : q + 1, :] - exact) <= bound).all()
