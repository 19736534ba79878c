"""ModelZoo's MoE options: names, defaults and errors, and the rule that they describe."""

from __future__ import annotations

import pytest

from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.moe_config import MoEConfig
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule


def test_defaults_are_modelzoos() -> None:
    config = MoEConfig()
    assert (config.num_experts, config.num_shared_experts, config.top_k, config.load_balancing_loss_coef) == (0, None, 1, 0.0)
    assert (config.moe_implementation, config.router_fp32, config.is_moe) == ("experimental", True, False)
    assert config.routing == ROUTING_PRESETS["modelzoo"]
    assert MoEConfig(num_experts=1, num_shared_experts=1).is_moe


def test_options_say_the_rule() -> None:
    config = MoEConfig(
        num_experts=4, top_k=2, null_expert_bias=1.1, router_use_bias=True, router_fp32=False, router_selection_nonlinearity="sigmoid",
        fp16_type="cb16",
    )  # fmt: skip
    assert config.routing == RoutingRule(
        router_selection_nonlinearity="sigmoid", null_expert_bias=1.1, router_use_bias=True, router_fp32=False, selection_dtype="cb16"
    )
    assert MoEConfig(num_experts=4, routing_algorithm="hash").routing == RoutingRule(routing_algorithm="hash")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": -1}, "`num_experts` must be an integer >= 0, got -1"),
        ({"num_experts": 1 << 16}, "`num_experts` must not exceed 32768"),
        ({"num_experts": 4, "top_k": 0}, "`top_k` must be an integer >= 1, got 0"),
        ({"num_experts": 4, "top_k": 5}, r"`top_k` must lie in 1\.\.4"),
        ({"num_experts": 4, "top_k": 2, "routing_algorithm": "hash"}, "`top_k` must be 1 with `routing_algorithm` 'hash'"),
        ({"num_experts": 4, "num_shared_experts": 1, "routing_algorithm": "hash"}, "`num_shared_experts` needs"),
        ({"num_shared_experts": 0}, "`num_shared_experts` must be an integer >= 1 or None"),
        ({"load_balancing_loss_coef": -0.1}, "`load_balancing_loss_coef` must be a finite number >= 0"),
        ({"load_balancing_loss_coef": 0.1, "routing_algorithm": "hash"}, "must be 0 with `routing_algorithm` 'hash'"),
        ({"load_balancing_loss_coef": 0.1, "routing_algorithm": "uniform"}, "must be 0 with `routing_algorithm` 'uniform'"),
        ({"load_balancing_loss_coef": 0.1, "router_selection_nonlinearity": "sinkhorn"}, "must be 0 with `router_selection_nonlinearity`"),
        ({"num_experts": 4, "null_expert_bias": 1.0, "expert_weighting_normalization": False}, "`null_expert_bias` needs"),
        ({"num_experts": 4, "null_expert_bias": 1.0, "routing_algorithm": "hash"}, "`null_expert_bias` needs `routing"),
        ({"moe_implementation": "forge_experimental"}, "`moe_implementation` must be one of functional, experimental, optimized"),
        ({"router_selection_nonlinearity": "relu"}, "`router_selection_nonlinearity` must be one of"),
        ({"probability_before_ffn": True, "moe_implementation": "optimized"}, "`probability_before_ffn` needs `moe_implementation`"),
    ],
)  # fmt: skip
def test_contradictions_raise_as_in_modelzoo(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MoEConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing_algorithm": "hash", "top_k": 2}, "`top_k` must be 1 with `routing_algorithm` 'hash', got 2"),
        ({"routing_algorithm": "nope"}, "`routing_algorithm` must be one of learned, hash, uniform, got 'nope'"),
        ({"router_fp32": "yes"}, "`router_fp32` must be True or False, got 'yes'"),
        ({"null_expert_bias": 1.1, "expert_weighting_normalization": False}, "`null_expert_bias` needs `expert_weighting_normalization`"),
        ({"load_balancing_loss_coef": float("inf")}, "`load_balancing_loss_coef` must be a finite number >= 0, got inf"),
        ({"fp16_type": "half"}, "`fp16_type` must be one of bfloat16, float16, cbfloat16, cb16, float32, got 'half'"),
        ({"fp16_type": "float32", "router_fp32": False}, "`router_fp32` False leaves logits in `fp16_type`: name one of 16 bits"),
        ({"router_selection_nonlinearity": None}, "`router_selection_nonlinearity` must not be None with `routing_algorithm` 'learned'"),
        ({"routing_algorithm": "uniform", "router_use_bias": True}, "`router_use_bias` needs `routing_algorithm` 'learned'"),
    ],
)
@pytest.mark.parametrize("num_experts", [0, 1, 4])
def test_dense_options_are_valid_from_birth_too(num_experts: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MoEConfig(num_experts=num_experts, **options)


def test_shared_experts_stand_beside_others() -> None:
    with pytest.raises(SpecError, match="`num_shared_experts` stand beside experts that are chosen: `num_experts` must be >= 1"):
        MoEConfig(num_shared_experts=2)
    with pytest.raises(SpecError, match=r"`top_k` must lie in 1\.\.1 \(`num_experts`\), got 2"):
        MoEConfig(num_experts=1, num_shared_experts=1, top_k=2)
    assert MoEConfig(num_experts=1, num_shared_experts=1).is_moe


def test_what_hash_routing_ignores_is_said() -> None:
    for name in ("router_selection_nonlinearity", "expert_weighting_nonlinearity"):
        with pytest.warns(UserWarning, match=f"`{name}` 'sigmoid' is ignored with `routing_algorithm` 'hash'") as said:
            MoEConfig(num_experts=4, routing_algorithm="hash", **{name: "sigmoid"})
        assert said[0].filename == __file__
        MoEConfig(num_experts=4, routing_algorithm="hash", **{name: None})


def test_modelzoo_names_mean_what_they_mean_there() -> None:
    assert MoEConfig(num_experts=4, fp16_type="cbfloat16").routing.selection_dtype == "cb16"
    assert MoEConfig(num_experts=4, gate_initializer={"name": "normal", "std": 0.02}).routing == MoEConfig(num_experts=4).routing
    assert MoEConfig(num_experts=4, expert_weighting_nonlinearity="sinkhorn").routing.weighs_together
    assert MoEConfig(num_experts=4, tie_policy="reject").routing.tie_policy == "reject"
