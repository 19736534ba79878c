"""The next token: filters against a plain second writing of their definition, streams, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_emu.foundation.errors import InputError
from wse_emu.sampling import Sampler, _exp

LOGITS = np.random.default_rng(7).normal(scale=3, size=(4, 50)).astype(np.float32)


def naive_probabilities(scores: np.ndarray, temperature: float, top_k: int | None, top_p: float) -> np.ndarray:
    """One row, as the definition reads: divide, keep k, keep the nucleus, renormalise."""
    x = [float(s) / temperature for s in scores]
    keep = set(range(len(x)))
    if top_k is not None:
        kth = sorted(x, reverse=True)[min(top_k, len(x)) - 1]
        keep = {i for i in keep if x[i] >= kth}
    top = max(x)
    weight = {i: math.exp(x[i] - top) for i in keep}
    total = math.fsum(weight.values())
    nucleus, mass = [], 0.0
    for i in sorted(keep, key=lambda i: (-x[i], i)):
        if nucleus and top_p < 1 and mass >= top_p:
            break
        nucleus.append(i)
        mass += weight[i] / total
    out = np.zeros(len(x))
    for i in nucleus:
        out[i] = weight[i] / math.fsum(weight[j] for j in nucleus)
    return out


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 49, 50, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
def test_probabilities_equal_the_definition(temperature: float, top_k: int | None, top_p: float) -> None:
    got = Sampler(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(LOGITS)
    for row, scores in enumerate(LOGITS):
        want = naive_probabilities(scores, temperature, top_k, top_p)
        assert np.array_equal(got[row] > 0, want > 0)
        np.testing.assert_allclose(got[row], want, rtol=1e-14)


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]])).astype(np.float32)
    kept = Sampler(top_p=0.6).probabilities(logits)[0] > 0
    assert kept.tolist() == [True, True, False, False]


def test_top_p_keeps_one_token_even_when_it_is_tiny() -> None:
    assert np.count_nonzero(Sampler(top_p=1e-12).probabilities(LOGITS), axis=1).tolist() == [1, 1, 1, 1]


def test_ties_at_the_kth_place_are_all_kept() -> None:
    logits = np.array([[1.0, 3.0, 1.0, 1.0, -1.0]], dtype=np.float32)
    assert (Sampler(top_k=2).probabilities(logits)[0] > 0).tolist() == [True, True, True, True, False]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([[0.0, 2.0, 2.0, 1.0]], dtype=np.float32)
    sampler = Sampler(greedy=True)
    assert sampler.sample(logits, ()).tolist() == [1]
    assert sampler.probabilities(logits).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_top_k_of_one_is_greedy() -> None:
    sampler = Sampler(top_k=1)
    assert np.array_equal(sampler.sample(LOGITS, sampler.streams(4)), LOGITS.argmax(axis=1))


def test_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(temperature=1.5, top_k=8, top_p=0.9, seed=3)
    p = sampler.probabilities(LOGITS[:1])[0]
    n = 4000
    rows = np.broadcast_to(LOGITS[:1], (n, LOGITS.shape[1]))
    counts = np.bincount(sampler.sample(rows, sampler.streams(n)), minlength=len(p))
    assert counts[p == 0].sum() == 0
    kept = p > 0
    chi2 = float((((counts - n * p) ** 2)[kept] / (n * p[kept])).sum())
    assert chi2 < 30  # 7 degrees of freedom at most: 30 is beyond the 0.9999 quantile


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_a_neighbour_does_not_change_a_draw(extra: int) -> None:
    sampler = Sampler(temperature=2.0, seed=11)
    alone, together = sampler.streams([2]), sampler.streams(3 + extra)
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = rng.normal(size=(3 + extra, 40)).astype(np.float32)
        assert sampler.sample(logits[2:3], alone)[0] == sampler.sample(logits, together)[2]


def test_sequences_and_seeds_have_streams_of_their_own() -> None:
    draws = {(seed, i): s.random() for seed in (0, 1) for i, s in enumerate(Sampler(seed=seed).streams(3))}
    assert len(set(draws.values())) == 6
    assert [s.random() for s in Sampler(seed=1).streams(3)] == [draws[1, i] for i in range(3)]


def test_a_seed_gives_these_tokens_on_every_machine() -> None:
    sampler = Sampler(temperature=1.3, top_k=20, top_p=0.9, seed=5)
    logits = (np.arange(64, dtype=np.float32) * np.float32(0.37) % np.float32(5.0)).reshape(1, -1)
    streams = sampler.streams(1)
    assert [int(sampler.sample(logits, streams)[0]) for _ in range(12)] == [26, 11, 27, 27, 54, 39, 54, 40, 53, 54, 26, 51]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.full((1, 6), -np.inf, dtype=np.float32)
    logits[0, 4] = -30.0
    sampler = Sampler(temperature=5.0)
    assert sampler.sample(logits, sampler.streams(1)).tolist() == [4]
    assert sampler.probabilities(logits)[0].tolist() == [0, 0, 0, 0, 1, 0]


@given(st.lists(st.floats(-800, 0), min_size=1, max_size=40))
def test_exponential_is_within_two_ulp(xs: list[float]) -> None:
    got = _exp(np.array(xs))
    for x, y in zip(xs, got, strict=True):
        want = math.exp(x)
        assert abs(y - want) <= 2 * math.ulp(want)


def test_exponential_underflows_to_zero() -> None:
    assert _exp(np.array([0.0, -1e6, -np.inf])).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be positive and finite, got 0.0; use greedy=True"),
        ({"temperature": float("nan")}, "`temperature` must be positive and finite, got nan"),
        ({"top_k": 0}, "`top_k` must be a positive integer or None, got 0"),
        ({"top_k": 2.0}, "`top_k` must be a positive integer or None, got 2.0"),
        ({"top_p": 0.0}, r"`top_p` must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"`top_p` must lie in \(0, 1\], got 1.5"),
        ({"seed": -1}, r"`seed` must be an integer in 0\.\.2\*\*128 - 1, got -1"),
        ({"greedy": True, "top_k": 4}, "`greedy` takes the largest logit"),
        ({"greedy": True, "temperature": 0.5}, "`greedy` takes the largest logit"),
    ],
)
def test_bad_option_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampler(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.zeros((2, 3)), r"must be a float32 array \(batch, vocab\), got float64 \(2, 3\)"),
        (np.zeros(3, dtype=np.float32), r"got float32 \(3,\)"),
        (np.zeros((1, 0), dtype=np.float32), r"got float32 \(1, 0\)"),
        ([[0.0, 1.0]], "got list"),
        (np.array([[0, 1], [np.nan, 1]], dtype=np.float32), "sequence 1: the largest of its logits is nan"),
        (np.array([[0, np.inf]], dtype=np.float32), "sequence 0: the largest of its logits is inf"),
        (np.full((1, 4), -np.inf, dtype=np.float32), "sequence 0: the largest of its logits is -inf"),
    ],
)
@pytest.mark.parametrize("greedy", [True, False])
def test_bad_logits_are_refused(logits: object, message: str, greedy: bool) -> None:
    sampler = Sampler(greedy=greedy)
    with pytest.raises(InputError, match=message):
        sampler.sample(logits, sampler.streams(1))  # type: ignore[arg-type]


def test_one_stream_per_sequence() -> None:
    sampler = Sampler()
    with pytest.raises(InputError, match="one random stream per sequence, got 2 for 4 rows"):
        sampler.sample(LOGITS, sampler.streams(2))


@pytest.mark.oracle
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 0, 0.9), (1.0, 5, 1.0), (1.7, 12, 0.4)])
def test_probabilities_equal_hugging_face(temperature: float, top_k: int, top_p: float) -> None:
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.from_numpy(LOGITS).double()
    scores = generation.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = generation.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = generation.TopPLogitsWarper(top_p)(None, scores)
    want = torch.softmax(scores, dim=-1).numpy()
    got = Sampler(temperature=temperature, top_k=top_k or None, top_p=top_p).probabilities(LOGITS)
    assert np.array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=1e-12)
