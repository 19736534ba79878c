"""Memory tokens: tokens that follow every chunk of a text and may gather what it says (ModelZoo's ``memory_tokens``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.errors import InputError, SpecError

Ints = NDArray[np.int64]

MAX_CHUNK = 1 << 20
"""Most tokens of a chunk, and most chunks of a context."""
MAX_PER_CHUNK = 1 << 12
"""Most memory tokens behind one chunk: they go through the model together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryTokens:
    """Memory tokens of a model, under ModelZoo's names.

    After every `attn_memory_chunk_size` tokens of a text, if another one follows, come `num_memory_tokens_per_chunk` memory tokens. Whether
    a token is one is decided by its position in the sequence alone, as ModelZoo's mask does: a token of the text may have the same id.
    They take positions, keys and values as any token, and nothing is predicted from them: the token after them is predicted by the last
    one of the chunk before (ModelZoo leaves them out of the loss).

    Raises
    ------
    SpecError
        If a size is below 1 or beyond `MAX_CHUNK` and `MAX_PER_CHUNK`, the id is below 0, or a switch is no boolean.

    References
    ----------
    Cerebras ModelZoo 2.10, ``MemoryTokensConfig`` and ``add_memory_tokens``; Zhang et al., "Long context compression with Activation
    Beacon", 2024.
    """

    attn_memory_chunk_size: int
    num_memory_tokens_per_chunk: int
    add_qkv_memory_weights: bool = False
    """Whether queries, keys, values and the output projection of memory tokens have weights, and biases, of their own."""
    add_extra_embedding: bool = False
    """Whether memory tokens have an embedding of their own; without it they have that of `memory_token_id`."""
    add_chunked_attn_mask: bool = False
    """Whether every layer has the pattern of `AttentionPattern.memory`; without it layers have the patterns that they have."""
    memory_token_id: int = 0

    def __post_init__(self) -> None:
        for name, least in (("attn_memory_chunk_size", 1), ("num_memory_tokens_per_chunk", 1), ("memory_token_id", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise SpecError(f"memory tokens: `{name}` must be an integer >= {least}, got {value!r}")
        for name, most in (("attn_memory_chunk_size", MAX_CHUNK), ("num_memory_tokens_per_chunk", MAX_PER_CHUNK)):
            if getattr(self, name) > most:
                raise SpecError(f"memory tokens: `{name}` must be at most {most}, got {getattr(self, name)}")
        for name in ("add_qkv_memory_weights", "add_extra_embedding", "add_chunked_attn_mask"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"memory tokens: `{name}` must be True or False, got {getattr(self, name)!r}")

    @property
    def pattern(self) -> AttentionPattern:
        """Keys that queries admit with `add_chunked_attn_mask`."""
        return AttentionPattern.memory(
            attn_memory_chunk_size=self.attn_memory_chunk_size, num_memory_tokens_per_chunk=self.num_memory_tokens_per_chunk
        )

    def insert(self, tokens: Ints) -> Ints:
        """A text's tokens, (n,), with the memory tokens between them: (`length` of n,)."""
        chunk, per = self.attn_memory_chunk_size, self.num_memory_tokens_per_chunk
        return insert_memory_tokens(tokens, chunk_size=chunk, per_chunk=per, token_id=self.memory_token_id)

    def length(self, n: int) -> int:
        """Tokens of a sequence with `n` of the text."""
        return n + self.num_memory_tokens_per_chunk * (max(n - 1, 0) // self.attn_memory_chunk_size)

    def are_at(self, positions: Ints) -> NDArray[np.bool_]:
        """Whether the tokens at these positions of their sequences are memory tokens."""
        size = self.attn_memory_chunk_size + self.num_memory_tokens_per_chunk
        memory: NDArray[np.bool_] = positions % size >= self.attn_memory_chunk_size
        return memory


def insert_memory_tokens(input_ids: ArrayLike, *, chunk_size: int, per_chunk: int, token_id: int) -> Ints:
    """Put `per_chunk` memory tokens after every whole chunk of a prompt that another token follows.

    Parameters
    ----------
    input_ids : integers, (tokens,) or (batch, tokens)
    chunk_size, per_chunk : int
    token_id : int

    Returns
    -------
    ndarray of int64
        With as many axes; ``tokens + per_chunk * ((tokens - 1) // chunk_size)`` long.

    Raises
    ------
    InputError
        If they are no integers, or a number is below 1.
    """
    ids = np.asarray(input_ids)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise InputError(f"`input_ids` must be integers (tokens,) or (batch, tokens), got {ids.dtype} of shape {ids.shape}")
    _check(chunk_size, per_chunk)
    at = np.repeat(np.arange(chunk_size, ids.shape[-1], chunk_size), per_chunk)
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
