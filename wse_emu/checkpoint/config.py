"""config.json to `ModelSpec`, for released checkpoints and for those written by transformers 5; everything else is refused by name.

Defaults of absent fields are those of ``LlamaConfig`` and ``MixtralConfig`` of transformers 5, but the sizes that define a model have none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.jsonfile import parse_object, read_bytes
from wse_emu.foundation.errors import ConfigError, SpecError
from wse_emu.foundation.model_spec import ModelSpec

ARCHITECTURES: Mapping[str, str] = MappingProxyType({"LlamaForCausalLM": "llama", "MixtralForCausalLM": "mixtral"})
"""Architecture (``architectures`` of config.json) to family (``model_type``)."""

MAX_CONFIG_BYTES = 4 << 20
MAX_PARAMETERS = 1 << 50
"""More parameters than this are taken for a damaged config.json."""
MAX_TENSORS = 250_000
"""More published tensors than this are taken for a damaged config.json."""

_MAX_DIM = 1 << 31
_ABSENT: Any = object()

_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
        "mixtral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    }
)


class _Fields:
    """Typed access to one JSON object; a wrong type or value raises `ConfigError` that names the field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, name: str, rule: str) -> ConfigError:
        return ConfigError(f"{self.where}: `{name}` {rule}, got {_show(self.values.get(name))}")

    def get(self, name: str, default: Any = _ABSENT) -> Any:
        value = self.values.get(name, default)
        if value is _ABSENT:
            raise ConfigError(f"{self.where}: `{name}` is missing; it has no default")
        return value

    def integer(self, name: str, default: Any = _ABSENT, *, low: int = 1, high: int = _MAX_DIM) -> int:
        value = self.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(name, f"must be an integer in {low}..{high}")
        return int(value)

    def number(self, name: str, default: Any = _ABSENT) -> float:
        value = self.get(name, default)
        if type(value) is int and abs(value) < 1 << 53:
            return float(value)
        if type(value) is not float or value != value or value in (float("inf"), float("-inf")):
            raise self.fail(name, "must be a finite number")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.fail(name, "must be true or false")
        return value

    def object(self, name: str) -> _Fields | None:
        value = self.get(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(name, "must be an object or null")
        return _Fields(value, f"{self.where}: `{name}`")


def _show(value: object) -> str:
    """``repr`` cut to a length that fits a message; never converts a huge integer to decimal."""
    if type(value) is int and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _family(fields: _Fields) -> str:
    known = ", ".join(f"{a} ({f})" for a, f in ARCHITECTURES.items())
    model_type = fields.get("model_type", None)
    architectures = fields.get("architectures", None)
    if architectures is not None:
        if not isinstance(architectures, list) or not architectures or not all(isinstance(a, str) for a in architectures):
            raise fields.fail("architectures", "must be a list of names")
        unknown = [a for a in architectures if a not in ARCHITECTURES]
        if unknown:
            raise ConfigError(f"{fields.where}: unknown architecture {_show(unknown[0])}; known are {known}")
        families = {ARCHITECTURES[a] for a in architectures}
        if len(families) > 1:
            raise fields.fail("architectures", "must name one family")
        family = families.pop()
        if model_type is not None and model_type != family:
            raise fields.fail("model_type", f"must be {family!r} for architecture {architectures[0]}")
        return family
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        if model_type is None:
            raise ConfigError(f"{fields.where}: neither `architectures` nor `model_type` is there; known architectures are {known}")
        raise ConfigError(f"{fields.where}: unknown `model_type` {_show(model_type)}; known architectures are {known}")
    return model_type


def _rope_theta(fields: _Fields, default: float) -> float:
    """Rotary base, from `rope_theta` or from `rope_parameters`; any rope type but the default one is refused by name."""
    thetas: dict[str, float] = {}
    if fields.get("rope_theta", None) is not None:
        thetas["rope_theta"] = fields.number("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        inner = fields.object(name)
        if inner is None:
            continue
        for key in ("rope_type", "type"):
            kind = inner.get(key, "default")
            if kind != "default":
                raise ConfigError(
                    f"{inner.where}: {key} {_show(kind)} is not supported, only 'default' is; "
                    "scaled rotary embeddings would give other results, so they are not ignored"
                )
        extra = sorted(set(inner.values) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if extra:
            raise ConfigError(f"{inner.where}: {_show(extra[0])} is not supported; known are rope_type and rope_theta")
        if inner.get("partial_rotary_factor", None) is not None and inner.number("partial_rotary_factor") != 1.0:
            raise inner.fail("partial_rotary_factor", "must be 1 (rotary embedding over the whole head)")
        if inner.get("rope_theta", None) is not None:
            thetas[f"{name}.rope_theta"] = inner.number("rope_theta")
    if fields.get("partial_rotary_factor", None) is not None and fields.number("partial_rotary_factor") != 1.0:
        raise fields.fail("partial_rotary_factor", "must be 1 (rotary embedding over the whole head)")
    if len(set(thetas.values())) > 1:
        raise ConfigError(f"{fields.where}: rotary bases disagree: {', '.join(f'{k} = {v}' for k, v in thetas.items())}")
    return next(iter(thetas.values()), default)


def _token_id(fields: _Fields, name: str, vocab_size: int, default: Any) -> int | None:
    value = fields.get(name, default)
    if value is None or (name == "pad_token_id" and type(value) is int and value == -1):
        return None
    if type(value) is not int or not 0 <= value < vocab_size:
        raise fields.fail(name, f"must be null or a token id in 0..{vocab_size - 1} (`vocab_size` - 1)")
    return int(value)


def _eos_ids(fields: _Fields, vocab_size: int, default: Any) -> tuple[int, ...]:
    value = fields.get("eos_token_id", default)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise fields.fail("eos_token_id", f"must be null, a token id or a list of them, in 0..{vocab_size - 1} (`vocab_size` - 1)")
    return tuple(dict.fromkeys(ids))


def _refuse_unsupported(fields: _Fields, family: str, max_positions: int) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name, None) is not None and fields.boolean(name, False):
            raise fields.fail(name, "must be false; biases are not supported")
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.fail("hidden_act", "must be 'silu'")
    if family == "mixtral" and fields.get("sliding_window", None) is not None:
        window = fields.integer("sliding_window")
        if window < max_positions:
            rule = f"must be null or at least `max_position_embeddings` ({max_positions}); sliding attention is not supported"
            raise fields.fail("sliding_window", rule)
    layer_types = fields.get("layer_types", None)
    if layer_types is not None and (not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types)):
        raise fields.fail("layer_types", "must name 'full_attention' only")
    if fields.get("quantization_config", None) is not None:
        raise fields.fail("quantization_config", "is not supported; use a float32, float16 or bfloat16 checkpoint")


def parse_config(config: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None, where: str = "config.json") -> ModelSpec:
    """Spec of the model that a config.json describes; needs no weights.

    Parameters
    ----------
    config : mapping
        config.json as parsed: a released checkpoint's (``rope_theta``, ``rope_scaling``, ``torch_dtype``) or transformers 5's
        (``rope_parameters``, ``dtype``).
    generation : mapping, optional
        generation_config.json as parsed; its ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` take the place of config.json's.
    where : str
        What to call `config` in messages.

    Returns
    -------
    ModelSpec

    Raises
    ------
    ConfigError
        If a field is missing, has the wrong type or an absurd value, or asks for what is not supported: another architecture, biases,
        scaled rotary embeddings, sliding windows shorter than the context, quantised weights. A ``pad_token_id`` of -1 means none.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where}: must be an object, got {type(config).__name__}")
    fields = _Fields(config, where)
    family = _family(fields)
    defaults = _DEFAULTS[family]
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_default = defaults["num_key_value_heads"]
    kv_heads = heads if fields.get("num_key_value_heads", kv_default) is None else fields.integer("num_key_value_heads", kv_default)
    if fields.get("head_dim", None) is not None:
        head_dim = fields.integer("head_dim")
    elif hidden % heads:
        raise ConfigError(
            f"{where}: `hidden_size` ({hidden}) must be a multiple of `num_attention_heads` ({heads}) where `head_dim` is not given"
        )
    else:
        head_dim = hidden // heads
    max_positions = fields.integer("max_position_embeddings", defaults["max_position_embeddings"])
    _refuse_unsupported(fields, family, max_positions)
    moe = family == "mixtral"
    vocab = fields.integer("vocab_size")
    tokens = fields if generation is None else _Fields({**config, **_generation_ids(generation)}, f"{where} with generation_config.json")
    layers = fields.integer("num_hidden_layers", high=1 << 16)
    experts = fields.integer("num_local_experts", 8, high=1 << 15) if moe else 0
    if layers * (9 + 3 * experts) > MAX_TENSORS:
        raise ConfigError(f"{where}: {layers} layers of {experts} experts make more than {MAX_TENSORS} tensors")
    try:
        spec = ModelSpec(
            family=family,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", defaults["rms_norm_eps"]),
            rope_theta=_rope_theta(fields, defaults["rope_theta"]),
            max_position_embeddings=max_positions,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            num_experts=experts,
            top_k=fields.integer("num_experts_per_tok", 2, high=1 << 15) if moe else 0,
            renormalize=True,
            bos_token_id=_token_id(tokens, "bos_token_id", vocab, 1 if vocab > 1 else None),
            eos_token_ids=_eos_ids(tokens, vocab, 2 if vocab > 2 else None),
            pad_token_id=_token_id(tokens, "pad_token_id", vocab, None),
        )
    except ConfigError:
        raise
    except SpecError as e:
        raise ConfigError(f"{where}: {e}") from e
    if spec.n_params > MAX_PARAMETERS:
        raise ConfigError(f"{where}: describes {_show(spec.n_params)} parameters, at most {MAX_PARAMETERS} are allowed")
    return spec


def _generation_ids(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids that generation_config.json gives; null leaves config.json's in place, as transformers does."""
    return {k: generation[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if generation.get(k) is not None}


def read_config(path: Path) -> tuple[dict[str, Any], ModelSpec]:
    """Configuration and spec of a checkpoint directory, or of a config.json by itself; reads no weights.

    Parameters
    ----------
    path : Path
        A directory with config.json (and perhaps generation_config.json), or the file itself.

    Raises
    ------
    ConfigError
        If there is no config.json, it cannot be read, or `parse_config` refuses it.
    """
    file = path if path.suffix == ".json" and not os.path.isdir(path) else path / "config.json"
    data = read_bytes(file, limit=MAX_CONFIG_BYTES, error=ConfigError)
    if data is None:
        raise ConfigError(f"{file}: there is no such file; a checkpoint is a local directory with config.json and *.safetensors files")
    config = parse_object(data, where=str(file), error=ConfigError)
    generation_file = file.with_name("generation_config.json")
    data = read_bytes(generation_file, limit=MAX_CONFIG_BYTES, error=ConfigError)
    generation = None if data is None else parse_object(data, where=str(generation_file), error=ConfigError)
    return config, parse_config(config, generation=generation, where=str(file))


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json of a spec, in the style of released checkpoints; ``parse_config(to_config(spec)) == spec``.

    Parameters
    ----------
    spec : ModelSpec

    Returns
    -------
    dict
        Values that JSON can hold.
    """
    eos: int | list[int] | None = list(spec.eos_token_ids)
    if len(spec.eos_token_ids) <= 1:
        eos = spec.eos_token_ids[0] if spec.eos_token_ids else None
    config: dict[str, Any] = {
        "architectures": [next(a for a, f in ARCHITECTURES.items() if f == spec.family)],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": spec.pad_token_id,
        "torch_dtype": "float32",
    }
    if spec.is_moe:
        config |= {"num_local_experts": spec.num_experts, "num_experts_per_tok": spec.top_k, "sliding_window": None}
    return config
