"""wse-emu: a functional emulator of a wafer-scale AI computer.

>>> import wse_emu as wse
>>> wafer = wse.Wafer(wse.WSE3, rows=8, cols=8)
>>> model = wse.from_pretrained("checkpoint-dir", wafer=wafer)  # doctest: +SKIP

Every name below loads its module when it is first used, so that ``import wse_emu`` costs nothing: neither Numba nor NumPy is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wse_emu.foundation.attention_pattern import AttentionPattern
    from wse_emu.foundation.biases import Biases
    from wse_emu.foundation.clamped_experts import ClampedExperts
    from wse_emu.foundation.errors import (
        BusyError,
        CheckpointError,
        ConfigError,
        ForkError,
        InputError,
        KernelError,
        NumberOverflowError,
        PlacementError,
        RouteError,
        SaveError,
        SpecError,
        SramOverflowError,
        SramStateError,
        StoreError,
        TieError,
        TraceError,
        UninitializedReadError,
        WseError,
    )
    from wse_emu.foundation.indexer import Indexer
    from wse_emu.foundation.latent_attention import LatentAttention
    from wse_emu.foundation.memory_tokens import MemoryTokens
    from wse_emu.foundation.model_spec import ModelSpec
    from wse_emu.foundation.moe_config import MoEConfig
    from wse_emu.foundation.norm_spec import NormSpec, QkNorm
    from wse_emu.foundation.query_temperature import QueryTemperature
    from wse_emu.foundation.rotary_spec import RotarySpec
    from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
    from wse_emu.foundation.scales import Scales
    from wse_emu.foundation.shared_experts import SharedExperts
    from wse_emu.foundation.wafer_spec import TINY, WSE2, WSE3, WaferSpec
    from wse_emu.model import ModelOutput, WaferModel, from_config, from_pretrained
    from wse_emu.sampling import Sampler
    from wse_emu.wafer import moves
    from wse_emu.wafer.kernel import kernel, scratch
    from wse_emu.wafer.placement import Split
    from wse_emu.wafer.wafer import Wafer

_HOME = {
    "wse_emu.foundation.attention_pattern": ("AttentionPattern",),
    "wse_emu.foundation.errors": (
        "BusyError", "CheckpointError", "ConfigError", "ForkError", "InputError", "KernelError", "NumberOverflowError",
        "PlacementError", "RouteError", "SaveError", "SpecError", "SramOverflowError", "SramStateError", "StoreError", "TieError",
        "TraceError", "UninitializedReadError", "WseError",
    ),
    "wse_emu.foundation.biases": ("Biases",),
    "wse_emu.foundation.clamped_experts": ("ClampedExperts",),
    "wse_emu.foundation.model_spec": ("ModelSpec",),
    "wse_emu.foundation.moe_config": ("MoEConfig",),
    "wse_emu.foundation.indexer": ("Indexer",),
    "wse_emu.foundation.latent_attention": ("LatentAttention",),
    "wse_emu.foundation.memory_tokens": ("MemoryTokens",),
    "wse_emu.foundation.norm_spec": ("NormSpec", "QkNorm"),
    "wse_emu.foundation.query_temperature": ("QueryTemperature",),
    "wse_emu.foundation.rotary_spec": ("RotarySpec",),
    "wse_emu.foundation.routing_rule": ("ROUTING_PRESETS", "RoutingRule"),
    "wse_emu.foundation.scales": ("Scales",),
    "wse_emu.foundation.shared_experts": ("SharedExperts",),
    "wse_emu.foundation.wafer_spec": ("TINY", "WSE2", "WSE3", "WaferSpec"),
    "wse_emu.model": ("ModelOutput", "WaferModel", "from_config", "from_pretrained"),
    "wse_emu.sampling": ("Sampler",),
    "wse_emu.wafer": ("moves",),
    "wse_emu.wafer.kernel": ("kernel", "scratch"),
    "wse_emu.wafer.placement": ("Split",),
    "wse_emu.wafer.wafer": ("Wafer",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ROUTING_PRESETS",
    "TINY",
    "WSE2",
    "WSE3",
    "AttentionPattern",
    "Biases",
    "BusyError",
    "CheckpointError",
    "ClampedExperts",
    "ConfigError",
    "ForkError",
    "Indexer",
    "InputError",
    "KernelError",
    "LatentAttention",
    "MemoryTokens",
    "MoEConfig",
    "ModelOutput",
    "ModelSpec",
    "NormSpec",
    "NumberOverflowError",
    "PlacementError",
    "QkNorm",
    "QueryTemperature",
    "RotarySpec",
    "RouteError",
    "RoutingRule",
    "Sampler",
    "SaveError",
    "Scales",
    "SharedExperts",
    "SpecError",
    "Split",
    "SramOverflowError",
    "SramStateError",
    "StoreError",
    "TieError",
    "TraceError",
    "UninitializedReadError",
    "Wafer",
    "WaferModel",
    "WaferSpec",
    "WseError",
    "__version__",
    "from_config",
    "from_pretrained",
    "kernel",
    "moves",
    "scratch",
]


def __getattr__(name: str) -> object:
    try:
        module = _MODULE_OF[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    # `moves` is a module of its package
    value = import_module(f"{module}.{name}") if name == "moves" else getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
