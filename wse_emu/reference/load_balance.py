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


def load_balancing_gradient(topk_ids: Ints, num_experts: int, attention_mask: NDArray[np.bool_] | None = None) -> Floats:
    """Gradient of `load_balancing_loss` by the probabilities: how often experts were visited is no function of them.

    Parameters
    ----------
    topk_ids, attention_mask
        As for `load_balancing_loss`.
    num_experts : int

    Returns
    -------
    ndarray, (layers, batch, tokens, num_experts), float64
        0 for tokens that do not count; otherwise the same for all tokens of a sequence in all layers.
    """
    used, weight = _visits(topk_ids, num_experts, attention_mask)
    n_layers, n_batch = topk_ids.shape[:2]
    f = used.mean(axis=0)
    each = num_experts / (n_batch * n_layers) * f[None, :, None, :] * weight[None, :, :, None]
    out: Floats = np.broadcast_to(each, (n_layers, *each.shape[1:])).copy()
    return out


def batch_load_balancing_gradient(topk_ids: Ints, num_experts: int, attention_mask: NDArray[np.bool_] | None = None) -> Floats:
    """Gradient of `batch_load_balancing_loss` by the probabilities; parameters and result as for `load_balancing_gradient`.

    It is another one in every layer, and needs the counts of the whole batch.
    """
    used, weight = _visits(topk_ids, num_experts, attention_mask)
    f = used.mean(axis=1)
    f = f / f.sum(axis=1, keepdims=True)
    out: Floats = num_experts / topk_ids.shape[1] * f[:, None, None, :] * weight[None, :, :, None]
    return out


def _visits(topk_ids: Ints, num_experts: int, mask: NDArray[np.bool_] | None) -> tuple[Floats, Floats]:
    """(layers, batch, experts) fraction of tokens that visit, and (batch, tokens) each token's share of its sequence."""
    if topk_ids.ndim != 4:
        raise InputError(f"`topk_ids` must be (layers, batch, tokens, top_k), got {topk_ids.shape}")
    counts = np.ones(topk_ids.shape[1:3], np.bool_) if mask is None else np.asarray(mask, np.bool_)
    if counts.shape != topk_ids.shape[1:3] or not counts.any(axis=1).all():
        raise InputError(f"`attention_mask` must be {topk_ids.shape[1:3]} with a token in every sequence, got {counts.shape}")
    weight: Floats = counts / counts.sum(axis=1, keepdims=True)
    visits = (topk_ids[..., None] == np.arange(num_experts)).any(axis=3)
    used: Floats = np.einsum("lbse,bs->lbe", visits, weight)
    return used, weight


def _by_sequence(probabilities: Floats, topk_ids: Ints, mask: NDArray[np.bool_] | None) -> tuple[Floats, Floats]:
    """(layers, batch, experts) fraction of tokens that visit, and mean probability."""
    if probabilities.ndim != 4 or topk_ids.ndim != 4 or probabilities.shape[:3] != topk_ids.shape[:3]:
        raise InputError(
            "`probabilities` and `topk_ids` must be (layers, batch, tokens, experts) and (layers, batch, tokens, top_k), got "
            f"{probabilities.shape} and {topk_ids.shape}"
        )
    used, weight = _visits(topk_ids, probabilities.shape[3], mask)
    share: Floats = np.einsum("lbse,bs->lbe", probabilities.astype(np.float64), weight)
    return used, share
