"""Every move matters: with any one delivery of any kind left out, the run fails by name instead of giving an answer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.foundation.errors import WseError
from wse_emu.wafer.cores import Cores

from .models import make_model

PROMPT, NEW = np.array([[5, 9, 2, 7, 1], [0, 0, 3, 8, 4]]), 2
MASK = np.array([[1] * 5, [0, 0, 1, 1, 1]])
CHANGES = {
    "mixtral": {"num_hidden_layers": 1},
    "llama": {"num_hidden_layers": 1},
    "qwen3_moe": {"num_hidden_layers": 2, "use_sliding_window": False},
}
"""Every kind of layer once, and no window: a key before it is kept, but nobody reads it any more."""
GRIDS = {"prefill and bands": (4, 5), "one row": (1, 7), "bands": (6, 2)}


class Lossy:
    """Stands in for `Cores.deliver`: notes where each delivery comes from, and leaves one of them out, or only its last target."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, drop: int | None = None, *, last_only: bool = False) -> None:
        self.sites: list[tuple[str, str, int]] = []
        self.wafer: wse.Wafer | None = None
        self._drop = drop
        real = Cores.deliver

        def deliver(cores: Cores, payload: Any, targets: Iterable[Any], to: Any) -> None:
            frame = sys._getframe(1)
            while frame.f_code.co_filename.endswith("cores.py"):
                frame = frame.f_back  # type: ignore[assignment]
            assert self.wafer is not None
            self.sites.append((self.wafer.ledger._stage, frame.f_code.co_name, frame.f_lineno))
            kept = list(targets)
            if len(self.sites) - 1 == self._drop:
                kept = kept[:-1] if last_only else []
            real(cores, payload, kept, to)

        monkeypatch.setattr(Cores, "deliver", deliver)


def run(lossy: Lossy, family: str, grid: tuple[int, int]) -> np.ndarray:
    model = make_model(family, *grid, "isolated", changes=CHANGES[family])
    lossy.wafer = model.wafer
    try:
        return model.generate(PROMPT, NEW, attention_mask=MASK)
    finally:
        assert not model.wafer.sram.live, "a failed run leaves nothing on the wafer"


BY_DEFAULT = {("mixtral", "bands")}
CASES = [
    pytest.param(family, grid, marks=[] if (family, grid) in BY_DEFAULT else pytest.mark.slow) for family in CHANGES for grid in GRIDS
]
"""By default a mixture; Qwen3-MoE, which has every kind of stage, takes longest and is marked slow with the others."""


@pytest.mark.parametrize(("family", "grid"), CASES)
def test_leaving_out_any_one_move_makes_the_run_fail(family: str, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        whole = Lossy(patch)
        run(whole, family, GRIDS[grid])
    by_site: dict[tuple[str, str, int], list[int]] = {}
    for i, site in enumerate(whole.sites):
        by_site.setdefault(site, []).append(i)
    stages = {stage for stage, _, _ in by_site}
    expected = {"embedding", "attention_norm", "qkv", "kv_cache", "attention", "attention_out", "ffn_norm", "final_norm", "lm_head"}
    expected |= {"mixtral": {"router", "experts"}, "llama": {"ffn"}, "qwen3_moe": {"router", "experts", "ffn", "head_norm"}}[family]
    if GRIDS[grid][0] == 1:
        expected -= {"kv_cache"}  # one row holds all keys: nothing moves
    assert expected <= stages
    survived = []
    for site, indices in by_site.items():
        # An expert's weights stream past all rows, also past those whose tokens did not choose it.
        variants = [False] if site[:2] == ("experts", "stream") else [False, True]
        for last_only in variants:
            with monkeypatch.context() as patch:
                lossy = Lossy(patch, indices[len(indices) // (2 + last_only)], last_only=last_only)
                try:
                    run(lossy, family, GRIDS[grid])
                except WseError:
                    continue
                survived.append((site, last_only))
    assert not survived, f"{len(survived)} deliveries were left out unnoticed: {survived}"
