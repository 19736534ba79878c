"""config.json to `ModelSpec`, for released checkpoints and for those written by transformers 5; everything else is refused by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wse_emu.checkpoint.families import FAMILIES, family_of
from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.fields import ABSENT, Fields
from wse_emu.checkpoint.files import read_bytes
from wse_emu.checkpoint.fp8_config import fp8_format
from wse_emu.checkpoint.jsonfile import parse_object
from wse_emu.checkpoint.rope import read_rope, rope_config
from wse_emu.checkpoint.wrapped import language_config
from wse_emu.foundation.activations import Activation
from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import ConfigError, SpecError
from wse_emu.foundation.memory_tokens import MemoryTokens
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.rotary_spec import RotarySpec

MAX_CONFIG_BYTES = 4 << 20
MAX_PARAMETERS = 1 << 50
"""More parameters than this are taken for a damaged config.json."""
MAX_TENSORS = 250_000
"""More published tensors than this are taken for a damaged config.json."""
_MAX_LAYERS = 1 << 16
_MAX_EXPERTS = 1 << 15

_PUBLISHED: Mapping[str, str] = MappingProxyType(
    {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
    }
)
"""Field of `ModelSpec` to its name in config.json, where the two differ in every family."""


def _token_id(fields: Fields, name: str, vocab_size: int, default: Any) -> int | None:
    value = fields.get(name, default)
    if value is None or (name == "pad_token_id" and type(value) is int and value == -1):
        return None
    if type(value) is not int or not 0 <= value < vocab_size:
        raise fields.fail(name, f"must be null or a token id in 0..{vocab_size - 1} (`vocab_size` - 1)")
    return int(value)


def _eos_ids(fields: Fields, vocab_size: int, default: Any) -> tuple[int, ...]:
    value = fields.get("eos_token_id", default)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise fields.fail("eos_token_id", f"must be null, a token id or a list of them, in 0..{vocab_size - 1} (`vocab_size` - 1)")
    return tuple(dict.fromkeys(ids))


_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"})
_PUBLISHED_ACTIVATION: Mapping[str, str] = MappingProxyType({"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"})


def _refuse_unsupported(fields: Fields, family: Family) -> None:
    for name in ("attention_bias", "mlp_bias") if family.attention_bias is None else ("mlp_bias",):
        if fields.given(name) and fields.boolean(name, False):
            raise fields.fail(name, "must be false; this family's biases are not supported")
    quantization = fields.object("quantization_config")
    if quantization is None:
        return
    if quantization.get("quant_method", None) not in family.quant_methods:
        methods = " or ".join(map(repr, family.quant_methods))
        raise quantization.fail("quant_method", f"must be {methods} for this family; or use a float32, float16 or bfloat16 checkpoint")
    fp8_format(fields.values, fields.where)


def _activation(fields: Fields, family: Family) -> Activation:
    name, default = family.activation
    value = fields.get(name, default)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise fields.fail(name, f"must be {' or '.join(map(repr, _ACTIVATIONS))}")
    return _ACTIVATIONS[value]


def _head_dim(fields: Fields, family: Family, hidden: int, heads: int) -> int:
    name = family.head_dim_field
    if name != "head_dim":
        return fields.integer(name, family.head_dim)
    if fields.given("head_dim"):
        return fields.integer("head_dim")
    if family.head_dim is not None and "head_dim" not in fields.values:
        return family.head_dim
    if hidden % heads:
        raise ConfigError(
            f"{fields.where}: `hidden_size` ({hidden}) must be a multiple of `num_attention_heads` ({heads}) where `head_dim` is not given"
        )
    return hidden // heads


def _given(fields: Fields, names: tuple[str, ...]) -> list[str]:
    """Those of the names that are there, or else the first."""
    return [n for n in dict.fromkeys(names) if fields.given(n)] or [names[0]]


def _count_names(rules: MoeRules) -> tuple[str, ...]:
    """Fields that may hold the number of experts, the family's own first."""
    return (rules.count, "num_local_experts", "num_experts")


def _top_k_names(rules: MoeRules) -> tuple[str, ...]:
    """The same of the experts of a token."""
    return (rules.top_k, "num_experts_per_tok")


def _either(fields: Fields, names: tuple[str, ...], default: int | None, layers: int) -> int:
    """Number of experts that any of these fields gives, or every layer alike in a list."""
    given = _given(fields, names)
    values = {fields.same_for_all(n, ABSENT if default is None else default, layers, high=_MAX_EXPERTS) for n in given}
    if len(values) > 1:
        raise ConfigError(f"{fields.where}: {' and '.join(f'`{n}`' for n in given)} disagree")
    return values.pop()


def _moe_fields(fields: Fields, rules: MoeRules | None, layers: int) -> dict[str, Any]:
    """What a `ModelSpec` says of experts; nothing for a dense family, or where every layer is dense."""
    if rules is None:
        return {}
    dense = rules.dense(fields, layers)
    if len(dense) == layers:
        return {}
    return {
        "num_experts": _either(fields, _count_names(rules), rules.default_num_experts, layers),
        "top_k": _either(fields, _top_k_names(rules), rules.default_top_k, layers),
        "moe_intermediate_size": fields.integer(rules.width),
        "dense_layers": dense,
        "routing": rules.routing(fields),
    }


def _memory_tokens(fields: Fields) -> MemoryTokens | None:
    """ModelZoo's ``memory_tokens``: none unless both sizes are given."""
    inner = fields.object("memory_tokens")
    if inner is None:
        return None
    known = {f.name: f for f in dataclass_fields(MemoryTokens)}
    for name in inner.values:
        if name not in known:
            raise inner.fail(name, f"is unknown; there are {', '.join(known)}")
    if not inner.given("attn_memory_chunk_size") and not inner.given("num_memory_tokens_per_chunk"):
        return None
    given = {name: value for name, value in inner.values.items() if value is not None}
    sizes = {name: inner.integer(name) for name in ("attn_memory_chunk_size", "num_memory_tokens_per_chunk")}
    return MemoryTokens(**{**given, **sizes})


def parse_config(config: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None, where: str = "config.json") -> ModelSpec:
    """Spec of the model that a config.json describes; needs no weights.

    Parameters
    ----------
    config : mapping
        config.json as parsed: a released checkpoint's (``rope_theta``, ``rope_scaling``, ``torch_dtype``) or transformers 5's
        (``rope_parameters``, ``dtype``). Of a model that also sees, the language model in ``text_config``.
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
        If a field is missing, has the wrong type or an absurd value, or asks for what is not supported: another architecture, biases
        that the family has not, partly rotated heads where it has none, quantised weights. A ``pad_token_id`` of -1 means none.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where}: must be an object, got {type(config).__name__}")
    config = language_config(config, where)
    fields = Fields(config, where)
    family = family_of(fields)
    if family.flatten is not None:
        config = {**config, **family.flatten(fields)}
        fields = Fields(config, where)
    if family.rope_scaling is not None and not fields.given("rope_scaling") and not fields.given("rope_parameters"):
        fields = Fields({**config, "rope_scaling": family.rope_scaling}, where)
    _refuse_unsupported(fields, family)
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    default_kv = family.num_kv_heads
    kv_heads = heads if fields.get("num_key_value_heads", default_kv) is None else fields.integer("num_key_value_heads", default_kv)
    head_dim = _head_dim(fields, family, hidden, heads)
    max_positions = fields.integer("max_position_embeddings", family.max_position_embeddings)
    vocab = fields.integer("vocab_size")
    tokens = fields if generation is None else Fields({**config, **_generation_ids(generation)}, f"{where} with generation_config.json")
    layers = fields.integer("num_hidden_layers", high=_MAX_LAYERS)
    with _in_published_names(fields, family):
        moe = _moe_fields(fields, family.moe, layers)
    if layers * (11 + 3 * moe.get("num_experts", 0)) > MAX_TENSORS:
        raise ConfigError(f"{where}: {layers} layers of {moe.get('num_experts', 0)} experts make more than {MAX_TENSORS} tensors")
    rope = read_rope(
        fields, family.rope_theta, max_positions, head_dim, by_type=family.rope_by_type, partial=family.partial_rotary,
        alpha=family.rope_alpha, mscales=family.rope_mscales,
    )  # fmt: skip
    window, window_layers = family.windows(fields, layers)
    with _in_published_names(fields, family):
        rules = family.read(fields, layers)
    reach = max(max_positions, 0 if rope.scaling is None else rope.scaling.context_length)
    if family.attention_bias is not None and fields.boolean("attention_bias", False):
        rules = {"biases": family.attention_bias, **rules}
    if rope.dim is not None:
        rules["rotary"] = replace(rules.get("rotary", RotarySpec()), dim=rope.dim)
    if not moe:
        rules.pop("shared_experts", None)
    local = "rotary" in rules and rules["rotary"].local_theta is not None
    if window is not None and window >= reach and not local:  # it holds every key
        window, window_layers = None, ()
    every_layer_moe = bool(moe) and not moe["dense_layers"]
    with _in_published_names(fields, family):
        spec = ModelSpec(
            family=family.model_type,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size", moe["moe_intermediate_size"] if every_layer_moe else ABSENT),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", family.rms_norm_eps),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            max_position_embeddings=max_positions,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", family.tie_word_embeddings),
            activation=_activation(fields, family),
            sliding_window=window,
            sliding_layers=window_layers,
            memory_tokens=_memory_tokens(fields),
            bos_token_id=_token_id(tokens, "bos_token_id", vocab, _default_id(family.bos_token_id, vocab)),
            eos_token_ids=_eos_ids(tokens, vocab, _default_id(family.eos_token_id, vocab)),
            pad_token_id=_token_id(tokens, "pad_token_id", vocab, _default_id(family.pad_token_id, vocab)),
            **moe,
            **rules,
        )
    if spec.n_params > MAX_PARAMETERS:
        raise ConfigError(f"{where}: describes {show(spec.n_params)} parameters, at most {MAX_PARAMETERS} are allowed")
    return spec


def _default_id(token_id: int | None, vocab_size: int) -> int | None:
    return token_id if token_id is not None and token_id < vocab_size else None


@contextmanager
def _in_published_names(fields: Fields, family: Family) -> Iterator[None]:
    """Errors about a spec as errors of config.json, in its names."""
    try:
        yield
    except SpecError as e:
        text = str(e)
        if not isinstance(e, ConfigError):
            names = {f"`{ours}`": f"`{published}`" for ours, published in _PUBLISHED.items()}
            if family.moe is not None:
                names["`num_experts`"] = f"`{_given(fields, _count_names(family.moe))[0]}`"
                names["`top_k`"] = f"`{_given(fields, _top_k_names(family.moe))[0]}`"
                if family.moe.width != "intermediate_size":
                    names["`moe_intermediate_size`"] = f"`{family.moe.width}`"
            text = f"{fields.where}: {_renamed(text, names)}"
        raise ConfigError(_renamed(text, family.published)) from e


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """Text with each of these words in the place of another, all at once, the longest first."""
    if not names:
        return text
    return re.sub("|".join(map(re.escape, sorted(names, key=len, reverse=True))), lambda found: names[found[0]], text)


def _generation_ids(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids that generation_config.json gives; null leaves config.json's in place, as transformers does."""
    return {k: generation[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if generation.get(k) is not None}


def read_config(path: Path) -> tuple[dict[str, Any], ModelSpec]:
    """Configuration and spec of a checkpoint directory, or of a config.json by itself; reads no weights.

    Of a model that also sees, those of the language model (`read_published` gives the whole of it).

    Parameters
    ----------
    path : Path
        A directory with config.json (and perhaps generation_config.json), or the file itself.

    Raises
    ------
    ConfigError
        If there is no config.json, it cannot be read, or `parse_config` refuses it.
    """
    config, spec = read_published(path)
    return dict(language_config(config, str(path))), spec


def read_published(path: Path) -> tuple[dict[str, Any], ModelSpec]:
    """Configuration as it is published, and the spec that it comes to; `path` and errors as for `read_config`."""
    if os.path.isfile(path) and path.suffix != ".json":
        raise ConfigError(f"{path}: a file; a checkpoint is a directory with config.json and *.safetensors files")
    file = path if path.suffix == ".json" and not os.path.isdir(path) else path / "config.json"
    data = read_bytes(file, limit=MAX_CONFIG_BYTES, error=ConfigError)
    if data is None:
        raise ConfigError(f"{file}: there is no such file; a checkpoint is a local directory with config.json and *.safetensors files")
    config = parse_object(data, where=str(file), error=ConfigError)
    generation_file = file.with_name("generation_config.json")
    data = read_bytes(generation_file, limit=MAX_CONFIG_BYTES, error=ConfigError)
    generation = None if data is None else parse_object(data, where=str(generation_file), error=ConfigError)
    return config, parse_config(config, generation=generation, where=str(file))


def unread_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of a config.json that ask for what the family's modelling code in transformers does not do: it ignores them, as happens here.

    Parameters
    ----------
    config : mapping
        One that `parse_config` accepts; of a model that also sees, the language model's.

    Returns
    -------
    tuple of str
        Each as "`use_cla` (True) of config.json".
    """
    fields = Fields(config, "config.json")
    says = {name: fields.get(name, None) for name in family_of(fields).unread}
    allowed = {name: (None, *values) for name, values in family_of(fields).unread.items()}
    other = [n for n, value in says.items() if not all(v in allowed[n] for v in (value if isinstance(value, list) else [value]))]
    return tuple(f"`{name}` ({show(says[name])}) of config.json" for name in other)


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
    family = FAMILIES[spec.family]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        family.activation[0]: _PUBLISHED_ACTIVATION[spec.activation],
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": rope_config(spec.rope_scaling) or (None if family.rope_scaling is None else {"rope_type": "default"}),
        "tie_word_embeddings": spec.tie_word_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": spec.pad_token_id,
        "torch_dtype": "float32",
        **family.window_config(spec),
    }
    if spec.memory_tokens is not None:
        config["memory_tokens"] = asdict(spec.memory_tokens)
    if family.attention_bias is not None:
        config["attention_bias"] = spec.biases == family.attention_bias
    if family.moe is not None:
        config |= _moe_config(spec, family.moe)
    config |= family.write(spec)
    return config if family.nest is None else family.nest(config)


def _moe_config(spec: ModelSpec, rules: MoeRules) -> dict[str, Any]:
    out = rules.dense_config(spec)
    if not spec.is_moe:  # every layer is dense
        return out
    out |= {rules.count: spec.num_experts, rules.top_k: spec.top_k, rules.width: spec.moe_intermediate_size}
    return out | rules.routing_config(spec.routing)
