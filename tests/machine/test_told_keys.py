"""What an indexer chose comes to the cores of attention by its message, and they work on what they were told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.layers.kept_keys import KeptKeys
from wse_emu.wafer.cores import Cores
from wse_emu.wafer.placement import Split

from .models import RULES, make_model

IDS = np.random.default_rng(5).integers(0, RULES["deepseek_v32"]["vocab_size"], (2, 6))


def logits_of(family: str, executor: str, **options) -> np.ndarray:
    return make_model(family, 3, 5, executor, rules=True, **options)(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_a_message_that_lies_changes_what_attention_sees(family: str, monkeypatch) -> None:
    """Cores are told of other keys, as many as were chosen; the row that chose, and the plan, know better and are not asked."""
    expected = logits_of(family, "batched")
    assert np.array_equal(logits_of(family, "isolated"), expected)
    deliver, lies = Cores.deliver, 0

    def told_otherwise(self, payload, targets, to):
        nonlocal lies
        targets = list(targets)
        if targets and targets[0].name == "taken keys":
            lies += not np.array_equal(payload, payload[::-1])
            payload = payload[::-1].copy()
        deliver(self, payload, targets, to)

    monkeypatch.setattr(Cores, "deliver", told_otherwise)
    found = logits_of(family, "isolated")
    assert lies
    assert not np.array_equal(found, expected)


@pytest.mark.slow
def test_a_message_that_does_not_come_is_missed(monkeypatch) -> None:
    deliver = Cores.deliver

    def lost(self, payload, targets, to):
        deliver(self, payload, [target for target in targets if target.name != "taken keys"], to)

    monkeypatch.setattr(Cores, "deliver", lost)
    with pytest.raises(wse.UninitializedReadError, match="taken keys"):
        logits_of("deepseek_v32", "isolated")


@settings(max_examples=10)
@given(st.data(), st.integers(1, 5), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=3))
def test_cores_keep_what_they_are_told(data, rows: int, sequences: list[tuple[int, int]]) -> None:
    """A bit for each key of the row and each new token, tile by tile in any order; counted as it lies."""
    wafer = wse.Wafer(rows=rows, cols=2, executor="isolated")
    splits = [Split.balanced(n_keys, rows) for n_keys, _ in sequences]
    n_new = [n for _, n in sequences]
    kept = KeptKeys(wafer, Split.single(2, 1, 2), splits, n_new)
    truth = [np.array(data.draw(st.lists(st.booleans(), min_size=k * n, max_size=k * n))).reshape(k, n) for k, n in sequences]
    size = data.draw(st.integers(1, 4))
    tiles = [(s, row, t) for s, n in enumerate(n_new) for row in range(rows) for t in range(0, n, size) if splits[s].sizes[row]]
    for s, row, first in data.draw(st.permutations(tiles)):
        mine = truth[s][splits[s].starts[row] : splits[s].stops[row], first : first + size]
        keys = np.arange(len(mine))
        with wafer.cores.borrowing() as borrow:
            told = borrow((row, 1), "taken keys", (len(mine),), np.int64)
            told.write((mine << np.arange(mine.shape[1])).sum(axis=1))
            kept.keep((row, 1), s, first, mine.shape[1], keys, told)
    for s, row, first in tiles:
        mine = truth[s][splits[s].starts[row] : splits[s].stops[row], first : first + size]
        keys, takers = kept.of((row, 1), s, first, mine.shape[1])
        assert keys.tolist() == np.flatnonzero(mine.any(axis=1)).tolist()
        assert takers.tolist() == [sum(1 << i for i in np.flatnonzero(mine[key])) for key in keys]
    bits = sum(int(split.sizes[0]) * n for split, n in zip(splits, n_new, strict=True))
    assert dict(wafer.sram.core_map(0, 1).blocks).get("chosen keys", 0) == -(-bits // 32) * 4
    assert "chosen keys" not in dict(wafer.sram.core_map(0, 0).blocks)
    kept.free()
    assert not wafer.sram.live
