"""Experts of a few tokens in one driver: the bits of `mesh_matmul`, expert by expert, for any number of threads."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wse_kernels import experts, threads
from wse_kernels.experts import AT_ONCE, mesh_experts
from wse_kernels.matmul import COMBINE, GEGLU, SWIGLU, WEIGHT_TILE_COLS, mesh_matmul
from wse_kernels.threads import limit_threads

from .plain_threads import in_turns

F = np.float32
JIT = hasattr(experts._mesh_experts, "signatures")


def tiled(w: NDArray[F]) -> NDArray[F]:
    flat = np.concatenate([w[:, j : j + WEIGHT_TILE_COLS].ravel() for j in range(0, w.shape[1], WEIGHT_TILE_COLS)])
    flat.flags.writeable = False
    return flat


class Mix:
    """Random experts, tokens and choices; every third expert or so has no token."""

    def __init__(self, seed: int, n_experts: int, n_tokens: int, n_in: int, width: int, n_out: int, n_cols: int, mode: int) -> None:
        rng = np.random.default_rng(seed)
        normal = lambda *shape: rng.standard_normal(shape).astype(F)  # noqa: E731
        split = lambda n: np.concatenate([[0], np.sort(rng.integers(0, n + 1, n_cols - 1)), [n]]).astype(np.int64)  # noqa: E731
        self.n_tokens, self.sizes, self.mode = n_tokens, (n_in, width, n_out), mode
        self.x, self.out = normal(n_tokens * n_in), normal(n_tokens * n_out)
        self.k_starts, self.hidden_starts, self.out_starts = split(n_in), split(width), split(n_out)
        chosen = [np.flatnonzero(rng.random(n_tokens) < 0.7) for _ in range(n_experts)]
        self.starts = np.concatenate([[0], np.cumsum([c.size for c in chosen])]).astype(np.int64)
        self.rows, self.scale = np.concatenate(chosen).astype(np.int64), normal(int(self.starts[-1]))
        self.gate_up = [tiled(normal(n_in, 2 * width)) for _ in chosen]
        self.down = [tiled(normal(width, n_out)) for _ in chosen]

    def together(self) -> NDArray[F]:
        out, (n_in, width, n_out) = self.out.copy(), self.sizes
        mesh_experts(
            self.x, self.n_tokens, self.k_starts, self.starts, self.rows, self.scale, self.gate_up, self.down, n_in, width, self.mode,
            self.hidden_starts, out, self.n_tokens, self.out_starts, n_out,
        )  # fmt: skip
        return out

    def one_by_one(self) -> NDArray[F]:
        out, (n_in, width, n_out) = self.out.copy(), self.sizes
        for (i0, i1), gate_up, down in zip(pairwise(self.starts), self.gate_up, self.down, strict=True):
            m, rows, scale = int(i1 - i0), self.rows[i0:i1], self.scale[i0:i1]
            if m == 0:
                continue
            h, places = np.empty(m * width, F), np.arange(m)
            mesh_matmul(
                self.x, self.n_tokens, self.k_starts, rows, gate_up, 0, n_in, 2 * width, h, m, self.hidden_starts, places, scale, self.mode
            )  # fmt: skip
            mesh_matmul(
                h, m, self.hidden_starts, places, down, 0, width, n_out, out, self.n_tokens, self.out_starts, rows, scale, COMBINE
            )  # fmt: skip
        return out


SIZES = st.tuples(
    st.integers(1, AT_ONCE), st.integers(1, 4), st.integers(1, 30), st.integers(1, 200), st.integers(1, 300), st.integers(1, 12)
)
if not JIT:
    SIZES = st.tuples(*[st.integers(1, 3)] * 6)


@pytest.mark.nojit
@given(st.integers(0, 1 << 32), SIZES, st.sampled_from([SWIGLU, GEGLU]), st.integers(1, 3))
@example(0, (1, 1, 1, 1, 1, 1), SWIGLU, 1)
@settings(deadline=None, max_examples=60 if JIT else 5)
def test_the_bits_are_those_of_one_expert_after_another(seed, sizes, mode, n_threads):
    mix = Mix(seed, *sizes, mode)
    with pytest.MonkeyPatch.context() as patch, limit_threads(n_threads), np.errstate(all="ignore"):
        patch.setattr(threads, "WORTH_NS", 0)
        np.testing.assert_array_equal(mix.together().view(np.int32), mix.one_by_one().view(np.int32))


@pytest.mark.parametrize("n_threads", [2, 7])
def test_threads_share_many_groups(monkeypatch, n_threads):
    """Sizes of a small model, often: a thread that went on before the others had finished their hidden features would read zeros."""
    monkeypatch.setattr(threads, "WORTH_NS", 0)
    mix = Mix(5, 4, 2, 64, 512, 256, 8, SWIGLU)
    want = mix.one_by_one().view(np.int32)
    with limit_threads(n_threads):
        for _ in range(50):
            np.testing.assert_array_equal(mix.together().view(np.int32), want)


@pytest.mark.nojit
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_as_plain_python_it_gives_the_same_bits(monkeypatch, n_threads):
    mix = Mix(1, 3, 2, 3, 2, 4, 2, SWIGLU)
    with np.errstate(all="ignore"):
        want = mix.one_by_one()
        monkeypatch.setattr(experts, "_driver", in_turns(monkeypatch, experts, experts._mesh_experts, n_threads))
        np.testing.assert_array_equal(mix.together().view(np.int32), want.view(np.int32))


@pytest.mark.skipif(not JIT, reason="nothing is compiled")
def test_one_specialisation_serves_any_number_of_experts():
    for n in (1, 3, AT_ONCE):
        Mix(n, n, 2, 4, 4, 4, 2, SWIGLU).together()
    assert len(experts._mesh_experts.signatures) == 1
