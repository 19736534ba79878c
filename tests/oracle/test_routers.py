"""Routers of transformers, live, against the routing rule of each family: the same experts and weights from the same hidden states."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from wse_emu.layers.router import router_code
from wse_emu.reference import routing
from wse_kernels.routing import WORK_ROWS, route_tokens

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
T = 200
NAMES = (
    "mixtral", "qwen3_moe normalised", "qwen3_moe", "deepseek_v2 greedy", "deepseek_v2 group_limited_greedy", "deepseek_v3", "glm4_moe",
    "dots1", "gpt_oss", "granitemoe", "phimoe", "ernie4_5_moe", "minimax_m2", "llama4",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_experts_and_weights_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    oracle = importlib.import_module("golden_routers")
    assert set(oracle.CASES) == set(NAMES)
    n_experts = oracle.E
    torch.manual_seed(7)
    rule, top_k = oracle.CASES[name][4:]
    rule.check_sizes(n_experts, top_k)
    x, bias, correction = torch.randn(T, oracle.H), torch.randn(n_experts), torch.randn(n_experts) * 0.2
    gate, logits, dense, ids = oracle.consult(name, x, bias, correction)
    own = (x.double() @ gate.detach().double().T).numpy() + (bias.double().numpy() if rule.router_use_bias else 0)
    np.testing.assert_allclose(own, logits.detach().double().numpy(), atol=2e-5)
    corrected = correction.double().numpy() if rule.e_score_correction_bias else None
    chosen = routing.choose(routing.compared(own, rule, corrected), top_k, rule)
    wide = np.zeros((T, n_experts))
    np.put_along_axis(wide, chosen, routing.weights(own, chosen, rule), axis=1)
    np.testing.assert_allclose(wide, dense.detach().double().numpy(), atol=3e-6 * rule.routed_scaling_factor)
    if ids is not None:
        np.testing.assert_array_equal(np.sort(chosen, axis=1), np.sort(ids.numpy(), axis=1))
    # and the kernel, from the very logits of transformers
    given = logits.detach().float().numpy().copy()
    found, weights, none = np.zeros((T, top_k), np.int64), np.zeros((T, top_k), np.float32), np.zeros((1, 1), np.float32)
    code = router_code(rule)._replace(has_bias=0)
    added = none if corrected is None else correction.numpy()[None]
    route_tokens(given, none, added, code, np.empty((WORK_ROWS, n_experts), np.float32), found, weights)
    narrow = np.zeros((T, n_experts))
    np.put_along_axis(narrow, found, weights.astype(np.float64), axis=1)
    np.testing.assert_allclose(narrow, dense.detach().double().numpy(), atol=5e-7 * rule.routed_scaling_factor)
