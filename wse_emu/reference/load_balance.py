"""How evenly experts are used: the auxiliary loss of a mixture, as ModelZoo takes it, and the usual one over a whole batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import InputError
from wse_emu.reference.formulas import Floats, Ints


def load_balancing_loss(probabilities: Floats, topk_ids: Ints, attention_mask: NDArray[np.bool_] | None = None) -> float:
    """``E**2 * mean over sequences and experts of f * P``, each sequence by itself.

    f is the fraction of a sequence's tokens that visit an expert, P the mean of its probability there, both averaged over layers first.
    Even use gives `top_k`, all tokens for one expert E. The mean over equal shards of a batch is the loss of the batch.

    Parameters
    ----------
    probabilities : ndarray, (layers, batch, tokens, experts), floating
        Of the router, over all experts.
    topk_ids : ndarray, (layers, batch, tokens, top_k), int64
        Chosen experts; -1 is none.
    attention_mask : ndarray, (batch, tokens), bool, optional
        Tokens that count; all by default, and at least one of each sequence.

    Returns
    -------
    float

    Raises
    ------
    InputError
        If shapes do not fit, or a sequence has no token that counts.

    References
    ----------
    Cerebras ModelZoo, release 2.10; Fedus et al., "Switch Transformers", 2022, section 2.2.
    """
    used, share = _by_sequence(probabilities, topk_ids, attention_mask)
    f, p = used.mean(axis=0), share.mean(axis=0)
    return float(f.shape[1] ** 2 * (f * p).mean())


def batch_load_balancing_loss(probabilities: Floats, topk_ids: Ints, attention_mask: NDArray[np.bool_] | None = None) -> float:
    """``sum over layers of E * sum over experts of f * P``, with f and P over the whole batch and f summing to 1.

    Even use gives 1 for each layer. It is *not* additive: the mean over shards of a batch is another number than the loss of the batch, so
    on several wafers it needs the counts of all of them first.

    Parameters
    ----------
    probabilities, topk_ids, attention_mask
        As for `load_balancing_loss`; all sequences must have as many tokens that count.

    Returns
    -------
    float
    """
    used, share = _by_sequence(probabilities, topk_ids, attention_mask)
    f, p = used.mean(axis=1), share.mean(axis=1)
    f = f / f.sum(axis=1, keepdims=True)
    return float(f.shape[1] * (f * p).sum())


def _by_sequence(probabilities: Floats, topk_ids: Ints, mask: NDArray[np.bool_] | None) -> tuple[Floats, Floats]:
    """(layers, batch, experts) fraction of tokens that visit, and mean probability."""
    if probabilities.ndim != 4 or topk_ids.ndim != 4 or probabilities.shape[:3] != topk_ids.shape[:3]:
        raise InputError(
            "`probabilities` and `topk_ids` must be (layers, batch, tokens, experts) and (layers, batch, tokens, top_k), got "
            f"{probabilities.shape} and {topk_ids.shape}"
        )
    counts = np.ones(probabilities.shape[1:3], np.bool_) if mask is None else np.asarray(mask, np.bool_)
    if counts.shape != probabilities.shape[1:3] or not counts.any(axis=1).all():
        raise InputError(f"`attention_mask` must be {probabilities.shape[1:3]} with a token in every sequence, got {counts.shape}")
    weight = counts / counts.sum(axis=1, keepdims=True)
    visits = (topk_ids[..., None] == np.arange(probabilities.shape[3])).any(axis=3)
    used: Floats = np.einsum("lbse,bs->lbe", visits, weight)
    share: Floats = np.einsum("lbse,bs->lbe", probabilities.astype(np.float64), weight)
    return used, share
