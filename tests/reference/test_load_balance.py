"""The loss for even use of experts: its two ends, and what shards of a batch may do with it."""

from __future__ import annotations

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.reference.load_balance import batch_load_balancing_loss, load_balancing_loss


def routed(seed: int, batch: int, top_k: int = 2, n_experts: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((3, batch, 10, n_experts)) + rng.standard_normal((3, batch, 1, n_experts))
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return p, np.argsort(-p, axis=-1)[..., :top_k]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_even_use_gives_top_k(top_k: int) -> None:
    ids = (np.arange(12)[:, None] + np.arange(top_k)) % 6
    p = np.full((2, 4, 12, 6), 1 / 6)
    ids = np.broadcast_to(ids, (2, 4, 12, top_k))
    assert load_balancing_loss(p, ids) == pytest.approx(top_k)
    assert batch_load_balancing_loss(p, ids) == pytest.approx(2)  # one for each layer


def test_all_tokens_for_one_expert_give_the_number_of_experts() -> None:
    p = np.zeros((1, 2, 5, 7))
    p[..., 3] = 1
    assert load_balancing_loss(p, np.full((1, 2, 5, 1), 3)) == pytest.approx(7)


def test_equal_shards_average_to_the_batch_and_the_other_loss_does_not() -> None:
    p, ids = routed(0, 8)
    shards = [slice(i, i + 2) for i in range(0, 8, 2)]
    mean = np.mean([load_balancing_loss(p[:, s], ids[:, s]) for s in shards])
    assert mean == pytest.approx(load_balancing_loss(p, ids), rel=1e-12)
    other = np.mean([batch_load_balancing_loss(p[:, s], ids[:, s]) for s in shards])
    assert abs(other - batch_load_balancing_loss(p, ids)) > 0.01


def test_layers_are_averaged_before_the_product_and_padding_does_not_count() -> None:
    p, ids = routed(1, 2)
    expected = 0.0
    for b in range(2):
        visits = np.stack([[(ids[layer, b] == e).any(axis=1).mean() for e in range(6)] for layer in range(3)]).mean(axis=0)
        expected += 36 * (visits * p[:, b].mean(axis=(0, 1))).mean() / 2
    assert load_balancing_loss(p, ids) == pytest.approx(expected)
    mask = np.ones((2, 13), bool)
    mask[:, :3] = False
    padded = np.concatenate([np.ones((3, 2, 3, 6)), p], axis=2), np.concatenate([np.zeros((3, 2, 3, 2), np.int64), ids], axis=2)
    assert load_balancing_loss(*padded, mask) == pytest.approx(load_balancing_loss(p, ids))


def test_shapes_that_do_not_fit_are_refused() -> None:
    p, ids = routed(2, 2)
    with pytest.raises(wse.InputError, match=r"got \(3, 2, 10, 6\) and \(3, 2, 9, 2\)"):
        load_balancing_loss(p, ids[:, :, :9])
    with pytest.raises(wse.InputError, match="with a token in every sequence"):
        load_balancing_loss(p, ids, np.zeros((2, 10), bool))
