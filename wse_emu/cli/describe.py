"""Which model ran on which prompt, and where: as lines for people and as entries of a ``--json`` document."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from wse_emu.cli.patterns import layers_text
from wse_emu.foundation.pattern_json import pattern_text, pattern_to_json
from wse_emu.foundation.precision import FLOAT32, Precision
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.foundation.units import counted

if TYPE_CHECKING:
    from pathlib import Path

    from wse_emu.cli.load import Request
    from wse_emu.foundation.attention_pattern import AttentionPattern
    from wse_emu.foundation.model_spec import ModelSpec
    from wse_emu.model import WaferModel
    from wse_emu.sampling import Sampler
    from wse_emu.wafer.sram import SramMap
    from wse_emu.wafer.wafer import Wafer

JSON_SCHEMA = 1
"""Version of the document that ``--json`` writes."""


def header(request: Request, wafer: Wafer, precision: Precision = FLOAT32, *, rerouted: bool = False) -> str:
    """What runs where, a line each; also the routing rule, if it is not the checkpoint's own."""
    spec = request.spec
    shape = f"{counted(spec.num_layers, 'layer')}, hidden {spec.hidden_size}, {counted(spec.num_heads, 'head')} / {spec.num_kv_heads} kv"
    if spec.is_moe:
        shape += f", {counted(spec.num_experts, 'expert')}, top {spec.top_k}"
    cores = f"{wafer.rows} x {wafer.cols} = {counted(wafer.rows * wafer.cols, 'core')} of {wafer.spec.name}"
    attention = "".join(f"\nattention {line}" for line in attention_lines(spec))
    routing = f"\nrouting   {rule_text(spec.routing)}" if rerouted else ""
    stored = "" if precision == FLOAT32 else f", stored in {precision}"
    return (
        f"model     {request.path.resolve().name}: {spec.family}, {spec.n_params:,} parameters\n"
        f"          {shape}\n"
        f"wafer     {cores}, executor {wafer.executor}{stored}{attention}{routing}"
    )


def rule_text(rule: RoutingRule) -> str:
    """A rule for people: what it has other than the default one, Mixtral's."""
    default = RoutingRule()
    said = [f"{f.name} {getattr(rule, f.name)}" for f in fields(rule) if getattr(rule, f.name) != getattr(default, f.name)]
    return ", ".join(said) or "as Mixtral's"


def attention_lines(spec: ModelSpec) -> list[str]:
    """Patterns that a model was given, each with its layers; none where it is as its checkpoint says."""
    layers: dict[AttentionPattern, list[int]] = {}
    for layer, pattern in enumerate(spec.patterns):
        layers.setdefault(pattern, []).append(layer)
    return [f"{pattern_text(pattern)}: layers {layers_text(having)}" for pattern, having in layers.items()]


def sampling_text(sampler: Sampler) -> str:
    """How tokens are chosen, for people."""
    if sampler.greedy:
        return "greedy"
    top = [f"top-k {sampler.top_k}"] if sampler.top_k is not None else []
    top += [f"top-p {sampler.top_p:g}"] if sampler.top_p < 1 else []
    return ", ".join(["sampled", f"temperature {sampler.temperature:g}", *top, f"seed {sampler.seed}"])


def model_entry(path: Path, spec: ModelSpec) -> dict[str, Any]:
    """Entry ``model`` of a ``--json`` document."""
    of_model = {**asdict(replace(spec, patterns=())), "patterns": [pattern_to_json(pattern) for pattern in spec.patterns]}
    return {"path": str(path), "family": spec.family, "n_params": spec.n_params, "spec": of_model}


def what_and_where(request: Request, model: WaferModel, lies: SramMap | None, precision: Precision = FLOAT32) -> dict[str, Any]:
    """Entries of a ``--json`` document that say which model ran on which prompt and where; `lies` on the fullest core."""
    sram, wafer = None, model.wafer
    if lies is not None:
        sram = {
            "worst_core": [lies.row, lies.col],
            "peak_bytes": lies.used_bytes,
            "capacity_bytes": lies.capacity_bytes,
            "blocks": lies.blocks,
        }
    return {
        "model": model_entry(request.path, request.spec),
        "ignored": list(model.checkpoint.ignored),
        "precision": {"dtype": precision.dtype, "kv_dtype": precision.kv, "precision_opt_level": precision.precision_opt_level},
        "wafer": {"name": wafer.spec.name, "rows": wafer.rows, "cols": wafer.cols, "executor": wafer.executor, "sram": sram},
        "prompt": {"text": request.text, "ids": request.ids},
    }
