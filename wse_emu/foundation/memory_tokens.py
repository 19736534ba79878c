"""Memory tokens: tokens that follow every chunk of a prompt and may gather what it says (ModelZoo's ``memory_tokens``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wse_emu.foundation.errors import InputError

Ints = NDArray[np.int64]


def insert_memory_tokens(input_ids: ArrayLike, *, chunk_size: int, per_chunk: int, token_id: int) -> Ints:
    """Put `per_chunk` memory tokens after every whole chunk of a prompt.

    Parameters
    ----------
    input_ids : integers, (tokens,) or (batch, tokens)
    chunk_size, per_chunk : int
    token_id : int

    Returns
    -------
    ndarray of int64
        With as many axes; ``tokens + per_chunk * (tokens // chunk_size)`` long.

    Raises
    ------
    InputError
        If they are no integers, or a number is below 1.
    """
    ids = np.asarray(input_ids)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise InputError(f"`input_ids` must be integers (tokens,) or (batch, tokens), got {ids.dtype} of shape {ids.shape}")
    _check(chunk_size, per_chunk)
    at = np.repeat(np.arange(chunk_size, ids.shape[-1] + 1, chunk_size), per_chunk)
    return np.insert(ids.astype(np.int64), at, token_id, axis=-1)


def is_memory(n_tokens: int, *, chunk_size: int, per_chunk: int) -> NDArray[np.bool_]:
    """Which of so many tokens, memory tokens included, are memory tokens: (n_tokens,).

    Raises
    ------
    InputError
        If a number is below 1.
    """
    _check(chunk_size, per_chunk)
    memory: NDArray[np.bool_] = np.arange(n_tokens) % (chunk_size + per_chunk) >= chunk_size
    return memory


def positions_with_memory(max_position_embeddings: int, *, chunk_size: int, per_chunk: int) -> int:
    """Positions that a model needs so that prompts of its length still fit, as ModelZoo counts them: ``m + n (c + m) // c``."""
    _check(chunk_size, per_chunk)
    return max_position_embeddings + per_chunk * (chunk_size + max_position_embeddings) // chunk_size


def _check(chunk_size: int, per_chunk: int) -> None:
    for name, value in (("chunk_size", chunk_size), ("per_chunk", per_chunk)):
        if type(value) is not int or value < 1:
            raise InputError(f"memory tokens: `{name}` must be an integer >= 1, got {value!r}")
