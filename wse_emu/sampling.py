"""From logits to the next token: greedy, or drawn after temperature, top-k and top-p, as Hugging Face's ``generate`` defines them.

The draw is done on the host, in float64, from sums in a stated order and an exponential made of IEEE operations only: a seed gives
the same tokens on every machine. Each sequence of a batch has a random stream of its own: its neighbours do not change what it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.arguments import MAX_SEED, check_flag, is_real, show
from wse_emu.foundation.errors import InputError

F64 = NDArray[np.float64]

_LN2_HI = 6.93147180369123816490e-01  # its last 32 bits are zero: n * _LN2_HI is exact for |n| < 2**20
_LN2_LO = 1.90821492927058770002e-10
_TAYLOR = tuple(1.0 / f for f in (6227020800, 479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How the next token is chosen; valid from birth.

    The filters apply in the order temperature, top-k, top-p. A sampler holds no state: random streams come from `streams` and are passed to
    `sample`.

    Raises
    ------
    InputError
        If an option lies outside its range, or `greedy` is combined with an option that only sampling reads.
    """

    greedy: bool = False
    """Take the largest logit (ties: the lowest id); no randomness."""
    temperature: float = 1.0
    """Logits are divided by it; > 0."""
    top_k: int | None = None
    """Keep the k largest logits, and whatever equals the k-th; None keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens, most probable first, whose probabilities sum to at least `top_p`; in (0, 1]."""
    seed: int = 0
    """Root of the random streams; from 0 to 2**128 - 1."""

    def __post_init__(self) -> None:
        check_flag("greedy", self.greedy, InputError)
        if not (is_real(self.temperature) and self.temperature > 0):
            way_out = "use greedy=True (on the command line, 0) for no randomness"
            raise InputError(f"`temperature` must be positive and finite, got {show(self.temperature)}; {way_out}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InputError(f"`top_k` must be a positive integer or None, got {show(self.top_k)}")
        if not (is_real(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"`top_p` must lie in (0, 1], got {show(self.top_p)}")
        if type(self.seed) is not int or not 0 <= self.seed < MAX_SEED:
            raise InputError(f"`seed` must be an integer in 0..2**128 - 1, got {show(self.seed)}")
        if self.greedy and (self.temperature != 1.0 or self.top_k is not None or self.top_p != 1.0):
            raise InputError("`greedy` takes the largest logit: `temperature`, `top_k` and `top_p` must keep their defaults")

    def streams(self, sequences: int | Sequence[int]) -> tuple[np.random.Generator, ...]:
        """Random streams, one per sequence, at their beginning.

        Parameters
        ----------
        sequences : int or sequence of int
            How many sequences (numbered from 0), or their numbers: stream ``i`` depends on `seed` and ``i`` alone.
        """
        numbers = range(sequences) if isinstance(sequences, int) else sequences
        return tuple(np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(i,)))) for i in numbers)

    def probabilities(self, logits: NDArray[np.float32]) -> F64:
        """Probability of every token after temperature, top-k and top-p; one-hot if `greedy`.

        Parameters
        ----------
        logits : ndarray, (batch, vocab), float32
            ``-inf`` forbids a token.

        Returns
        -------
        ndarray, (batch, vocab), float64
            Rows sum to 1 up to rounding; exactly 0 where a filter removed the token.

        Raises
        ------
        InputError
            If `logits` is not a two-dimensional float32 array, or a row holds NaN or +inf, or nothing but -inf.
        """
        _check_logits(logits)
        out = np.zeros(logits.shape, dtype=np.float64)
        for row, scores in enumerate(logits):
            if self.greedy:
                out[row, np.argmax(scores)] = 1.0
            else:
                ids, p = self._kept(scores)
                out[row, ids] = p / np.cumsum(p)[-1]
        return out

    def sample(self, logits: NDArray[np.float32], streams: Sequence[np.random.Generator]) -> NDArray[np.int64]:
        """Next token of every sequence; each stream that is read advances by one draw.

        Parameters
        ----------
        logits : ndarray, (batch, vocab), float32
            Of the last token of each sequence; ``-inf`` forbids a token.
        streams : sequence of numpy.random.Generator, (batch,)
            Stream of each sequence, from `streams`; not read if `greedy`.

        Returns
        -------
        ndarray, (batch,), int64

        Raises
        ------
        InputError
            As `probabilities`, and if there is not exactly one stream per row.
        """
        _check_logits(logits)
        if self.greedy:
            return np.asarray(np.argmax(logits, axis=1), dtype=np.int64)
        if len(streams) != len(logits):
            raise InputError(f"`streams` must hold one random stream per sequence, got {len(streams)} for {len(logits)} rows of logits")
        out = np.empty(len(logits), dtype=np.int64)
        for row, (scores, stream) in enumerate(zip(logits, streams, strict=True)):
            ids, p = self._kept(scores)
            below = np.cumsum(p)  # in order, most probable first
            # The smallest slot whose cumulative weight exceeds the draw; weights of zero are never reached.
            out[row] = ids[min(int(np.searchsorted(below, stream.random() * below[-1], side="right")), len(ids) - 1)]
        return out

    def _kept(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], F64]:
        """Tokens that pass the filters, most probable first (ties: lowest id), and their weights relative to the first one's 1."""
        scaled = scores.astype(np.float64) / self.temperature
        ids = np.argsort(-scaled, kind="stable")
        scaled = scaled[ids]
        n = int(np.count_nonzero(scaled > -np.inf))
        if self.top_k is not None and self.top_k < n:
            n = int(np.count_nonzero(scaled >= scaled[self.top_k - 1]))
        p = _exp(scaled[:n] - scaled[0])
        if self.top_p < 1:
            ascending = np.cumsum(p[::-1])
            n -= int(np.count_nonzero(ascending[:-1] / ascending[-1] <= 1.0 - self.top_p))
        return ids[:n], p[:n]


def _check_logits(logits: NDArray[np.float32]) -> None:
    if not isinstance(logits, np.ndarray) or logits.dtype != np.float32 or logits.ndim != 2 or logits.shape[1] == 0:
        got = f"{logits.dtype} {logits.shape}" if isinstance(logits, np.ndarray) else type(logits).__name__
        raise InputError(f"`logits` must be a float32 array (batch, vocab), got {got}")
    largest = logits.max(axis=1)  # NaN wins, so one look finds NaN, +inf and rows of -inf
    if not np.isfinite(largest).all():
        row = int(np.flatnonzero(~np.isfinite(largest))[0])
        raise InputError(f"sequence {row}: the largest of its logits is {largest[row]}; a next token needs finite logits")


def _exp(x: F64) -> F64:
    """Return ``exp(x)`` for ``x <= 0`` within 2 ulp, from IEEE operations alone (``np.exp`` differs between machines)."""
    n = np.rint(np.maximum(x, -800.0) * (1.0 / 0.6931471805599453))
    r = (np.maximum(x, -800.0) - n * _LN2_HI) - n * _LN2_LO
    y = np.full_like(x, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        y = y * r + coefficient
    return np.asarray(np.ldexp(y, n.astype(np.int32)), dtype=np.float64)
