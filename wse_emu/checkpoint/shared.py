"""Shared experts of config.json that are counted: together one network of so many experts' width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wse_emu.checkpoint.fields import Fields
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.shared_experts import SharedExperts


def read_n_shared(fields: Fields, name: str, default: Any) -> SharedExperts | None:
    """``name`` experts of ``moe_intermediate_size``; None where there are none.

    Without that width every layer is dense: whoever reads a mixture has asked for it before.
    """
    n_shared = fields.integer(name, default, low=0)
    if not n_shared or not fields.given("moe_intermediate_size"):
        return None
    return SharedExperts(intermediate_size=n_shared * fields.integer("moe_intermediate_size"))


def n_shared_config(name: str) -> Callable[[ModelSpec], dict[str, Any]]:
    """Write how many."""

    def write(spec: ModelSpec) -> dict[str, Any]:
        width = 0 if spec.shared_experts is None else spec.shared_experts.intermediate_size
        return {name: width // spec.moe_intermediate_size if spec.is_moe else 0}

    return write
