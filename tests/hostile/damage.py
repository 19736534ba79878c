"""Ways to damage a checkpoint directory, as plain tuples that Hypothesis draws, shrinks and prints; `apply` does them."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

INDEX = "model.safetensors.index.json"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, "@weights 0", "@weights 1")
KEYS = (
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "eos_token_id", "bos_token_id",
    "pad_token_id", "tie_word_embeddings", "hidden_act", "torch_dtype", "num_local_experts", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "quantization_config",
    "partial_rotary_factor", "original_max_position_embeddings", "attention_dropout", "initializer_range",
)  # fmt: skip
ROPE_KEYS = (
    "rope_type", "type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor", "rope_theta", "partial_rotary_factor",
)  # fmt: skip
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "su", "mrope")
NAMES = (
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel", "llama",
    "mistral", "mixtral", "qwen3", "qwen3_moe", "gpt2", "silu", "gelu", "float32", "int4", "full_attention", "sliding_attention",
)  # fmt: skip

numbers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**15, 2**16 + 1, 2**20, 2**31, 2**31 + 1, 2**53, 2**63, 2**64, 10**30, 10**400, -(2**63), 127, 128, 129]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-45, 1e-30, 1e-6, 0.5, 1.0, 1.5, 1e4, 1e10, 1e38, 1e300, -1e4]),
)
scalars = st.one_of(numbers, st.none(), st.booleans(), st.sampled_from(NAMES), st.text(max_size=4))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(ROPE_KEYS), inner, max_size=3))
factors = st.lists(st.sampled_from([0.5, 1.0, 1.25, 2.0, 4.0]), min_size=4, max_size=4)
sensible = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(KINDS[:6])},
    optional={
        "factor": st.sampled_from([1, 1.0, 2.0, 7.5, 1e12, 1e308]),
        "original_max_position_embeddings": st.sampled_from([1, 2, 16, 64, 2**31]),
        "low_freq_factor": st.sampled_from([1.0, 2.0]), "high_freq_factor": st.sampled_from([1.0, 4.0]), "short_factor": factors,
        "long_factor": factors, "attention_factor": st.sampled_from([0.5, 1.0, 1e30, 3.5e38]), "beta_fast": st.sampled_from([1, 32]),
        "beta_slow": st.sampled_from([1, 1e-3]), "mscale": st.sampled_from([0.0, 1.0]), "truncate": st.booleans(),
    },
)  # fmt: skip
plausible = st.one_of(
    st.tuples(st.just("rms_norm_eps"), st.floats(1e-12, 0.1)),
    st.tuples(st.just("rope_theta"), st.floats(1.5, 1e12)),
    st.tuples(st.sampled_from(["eos_token_id", "bos_token_id", "pad_token_id"]), st.integers(0, 59)),
    st.tuples(st.just("num_experts_per_tok"), st.integers(1, 4)),
    st.tuples(st.just("norm_topk_prob"), st.booleans()),
    st.tuples(st.just("sliding_window"), st.integers(1, 6)),
    st.tuples(st.just("use_sliding_window"), st.booleans()),
    st.tuples(st.just("max_position_embeddings"), st.integers(7, 70)),
    st.tuples(st.just("num_key_value_heads"), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("tie_word_embeddings"), st.booleans()),
    st.tuples(st.just("layer_types"), st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=2, max_size=2)),
)
"""A key and a value that a sound configuration may have; not all of them go with these weights."""
texts = st.sampled_from(
    [
        b"", b"{}", b"[]", b"null", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 50_000, b'{"a":' * 50_000, b"NaN", b'{"a": NaN}',
        b'{"a": 1, "a": 2}', b'{"a": ' + b"9" * 5000 + b"}", b"\x00" * 64, b'"x"', b"0", "{}".encode("utf-16"),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<html>404</html>", b"\x80\x04\x95" + b"K" * 20,
    ]
)  # fmt: skip
where = st.one_of(st.integers(0, 80), st.integers(0, 1 << 20))
weights = st.sampled_from(
    [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -3.5, 1e-45, 1e-30, 1e4, 6e4, 1e20, -1e30, 3e38, 1e-8]
)  # fmt: skip
links = st.sampled_from(
    [
        "outside file", "outside same name", "../outside/secret", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc/passwd", "nothing",
        "itself", "config.json", "tokenizer.json", ".", "..", "inside copy",
    ]
)  # fmt: skip
shards = st.one_of(
    st.sampled_from(
        [
            "../outside/secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x\0.safetensors", "gone.safetensors", "a\\b",
            "pytorch_model.bin", "config.json", "model.safetensors", "@weights 0", "@weights 1", "~/x.safetensors", "C:x.safetensors",
            "é.safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors",
        ]
    ),
    scalars,
)  # fmt: skip

STEPS = st.one_of(
    plausible.map(lambda pair: ("set", "config.json", *pair)),
    plausible.map(lambda pair: ("set", "config.json", *pair)),
    st.tuples(st.just("set"), st.sampled_from(["config.json"] * 6 + ["generation_config.json"]), st.sampled_from(KEYS), values),
    st.tuples(st.just("set"), st.just("config.json"), st.sampled_from(KEYS), numbers),
    st.tuples(st.just("set"), st.just("config.json"), st.sampled_from(["rope_scaling", "rope_parameters"]), sensible),
    st.tuples(st.just("drop"), st.just("config.json"), st.sampled_from(KEYS)),
    st.tuples(st.just("set rope"), st.sampled_from(ROPE_KEYS), scalars),
    st.tuples(st.just("write"), st.sampled_from(FILES), texts),
    st.tuples(st.just("flip"), st.sampled_from(FILES), where, st.integers(1, 255)),
    st.tuples(st.just("insert"), st.sampled_from(FILES), where, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("cut"), st.sampled_from(FILES), where),
    st.tuples(st.just("grow"), st.sampled_from(FILES), st.integers(1, 5000)),
    st.tuples(st.just("kind"), st.sampled_from(FILES), st.sampled_from(["fifo", "directory", "socket", "device", "unlink", "unreadable"])),
    st.tuples(st.just("link"), st.sampled_from(FILES), links),
    st.tuples(st.just("swap"), st.sampled_from(FILES), st.sampled_from(FILES)),
    st.tuples(st.just("map"), st.integers(0, 60), shards),
    st.tuples(st.just("map new"), st.text(max_size=5), shards),
    st.tuples(st.just("entry"), st.integers(0, 60), st.sampled_from(["dtype", "shape", "data_offsets", "more"]), values),
    st.tuples(st.just("entry dtype"), st.integers(0, 60), st.sampled_from(["F32", "F16", "BF16", "I32", "I16", "U8", "F64", "BOOL", "F4"])),
    st.tuples(st.just("entry shift"), st.integers(0, 60), st.integers(-64, 64), st.integers(-64, 64)),
    st.tuples(st.just("entry shape"), st.integers(0, 60), st.lists(st.sampled_from([0, 1, 2, 20, 24, 32, 60, 2**31, -1]), max_size=9)),
    st.tuples(st.just("entry rename"), st.integers(0, 60), st.text(max_size=4)),
    st.tuples(st.just("entry exchange"), st.integers(0, 60), st.integers(0, 60)),
    st.tuples(st.just("entry twice"), st.integers(0, 60)),
    st.tuples(st.just("header bytes"), st.one_of(st.integers(0, 300), st.sampled_from([2**25, 2**32, 2**62, 2**63, 2**64 - 1, 2**64 - 8]))),
    st.tuples(st.just("header pad"), st.integers(1, 20)),
    st.tuples(st.just("weight"), st.integers(0, 60), where, weights),
    st.tuples(st.just("weight"), st.integers(0, 60), where, weights),
    st.tuples(st.just("scale"), st.integers(0, 60), st.sampled_from([0.0, -1.0, 1e-20, 1e3, 1e10, 1e19, 1e30])),
    st.tuples(st.just("tokenizer"), st.sampled_from(["normalizer", "decoder", "post_processor", "model", "padding"]), values),
    st.tuples(st.just("more"), st.sampled_from(["pytorch_model.bin", "model.pt", "extra.safetensors", ".part", "model-00009.safetensors"])),
    st.tuples(st.just("touch"), st.sampled_from(FILES)),
)
"""One step of damage."""


def _named(directory: Path, name: str) -> Path:
    """A file of the directory; ``@weights N`` is its Nth file of weights."""
    if not name.startswith("@weights"):
        return directory / name
    found = sorted(directory.glob("*.safetensors"))
    return found[int(name[-1]) % len(found)] if found else directory / "model.safetensors"


def _content(file: Path) -> bytes:
    """Content of a regular file: an earlier step may have put there what has no end, or what waits for ever."""
    if not file.is_file():
        raise OSError(f"{file} is no file any more")
    return file.read_bytes()


def _set(directory: Path, name: str, key: str, value: Any) -> None:
    file = directory / name
    content = json.loads(_content(file))
    content[key] = value
    file.write_text(json.dumps(content))


def _drop(directory: Path, name: str, key: str) -> None:
    file = directory / name
    content = json.loads(_content(file))
    content.pop(key, None)
    file.write_text(json.dumps(content))


def _set_rope(directory: Path, key: str, value: Any) -> None:
    content = json.loads(_content(directory / "config.json"))
    name = "rope_parameters" if "rope_parameters" in content else "rope_scaling"
    inner = content.get(name) or {}
    inner[key] = value
    _set(directory, "config.json", name, inner)


def _write(directory: Path, name: str, content: bytes) -> None:
    _named(directory, name).write_bytes(content)


def _flip(directory: Path, name: str, at: int, mask: int) -> None:
    file = _named(directory, name)
    content = bytearray(_content(file))
    content[at % len(content)] ^= mask
    file.write_bytes(content)


def _insert(directory: Path, name: str, at: int, more: bytes) -> None:
    file = _named(directory, name)
    content = _content(file)
    at %= len(content)
    file.write_bytes(content[:at] + more + content[at:])


def _cut(directory: Path, name: str, at: int) -> None:
    file = _named(directory, name)
    os.truncate(file, at % file.stat().st_size)


def _grow(directory: Path, name: str, n: int) -> None:
    with open(_named(directory, name), "ab") as f:
        f.write(bytes(n))


def _kind(directory: Path, name: str, kind: str) -> None:
    file = _named(directory, name)
    if kind == "unreadable":
        file.chmod(0)
        return
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
        (file / "config.json").write_text("{}")
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(directory)
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.bind(file.name)
        finally:
            os.chdir(here)
    elif kind == "device":
        os.mknod(file, 0o20600, os.makedev(1, 5))


def _link(directory: Path, name: str, to: str) -> None:
    file = _named(directory, name)
    content = _content(file)
    file.unlink()
    outside = directory.parent / "outside"
    if to == "outside same name":
        (outside / file.name).write_bytes(content)
        to = str(outside / file.name)
    elif to == "outside file":
        to = str(outside / "secret.safetensors")
    elif to == "itself":
        to = file.name
    elif to == "inside copy":
        (directory / "copy").write_bytes(content)
        to = "copy"
    file.symlink_to(to)


def _swap(directory: Path, one: str, other: str) -> None:
    a, b = _named(directory, one), _named(directory, other)
    content = _content(a)
    a.write_bytes(_content(b))
    b.write_bytes(content)


def _map(directory: Path, n: int, to: Any) -> None:
    file = directory / INDEX
    content = json.loads(_content(file))
    names = sorted(content["weight_map"])
    content["weight_map"][names[n % len(names)]] = _named(directory, to).name if isinstance(to, str) and to.startswith("@") else to
    file.write_text(json.dumps(content))


def _map_new(directory: Path, name: str, to: Any) -> None:
    file = directory / INDEX
    content = json.loads(_content(file))
    content["weight_map"][name] = _named(directory, to).name if isinstance(to, str) and to.startswith("@") else to
    file.write_text(json.dumps(content))


def _header(directory: Path, change: Callable[[dict[str, Any], str], Any], n: int) -> None:
    """Rewrite the header of one file of weights; its data stay."""
    files = sorted(directory.glob("*.safetensors"))
    file = files[n % len(files)]
    content = _content(file)
    size = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + size])
    names = sorted(k for k in table if k != "__metadata__")
    text = change(table, names[n // len(files) % len(names)])
    header = text if isinstance(text, bytes) else json.dumps(table).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def _entry(directory: Path, n: int, key: str, value: Any) -> None:
    _header(directory, lambda table, name: table[name].update({key: value}), n)


def _entry_shift(directory: Path, n: int, begin: int, end: int) -> None:
    def change(table: dict[str, Any], name: str) -> None:
        a, b = table[name]["data_offsets"]
        table[name]["data_offsets"] = [a + begin, b + end]

    _header(directory, change, n)


def _entry_rename(directory: Path, n: int, to: str) -> None:
    def change(table: dict[str, Any], name: str) -> None:
        table[to] = table.pop(name)

    _header(directory, change, n)


def _entry_exchange(directory: Path, n: int, other: int) -> None:
    def change(table: dict[str, Any], name: str) -> None:
        names = sorted(k for k in table if k != "__metadata__")
        another = names[other % len(names)]
        table[name], table[another] = table[another], table[name]

    _header(directory, change, n)


def _entry_twice(directory: Path, n: int) -> None:
    def change(table: dict[str, Any], name: str) -> bytes:
        text = json.dumps(table)
        return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(table[name])}}}".encode()

    _header(directory, change, n)


def _header_bytes(directory: Path, size: int) -> None:
    file = _named(directory, "@weights 0")
    file.write_bytes(size.to_bytes(8, "little") + _content(file)[8:])


def _header_pad(directory: Path, n: int) -> None:
    _header(directory, lambda table, name: json.dumps(table).encode() + b" " * n, 0)


def _codes(entry: dict[str, Any], value: float) -> bytes:
    if entry["dtype"] == "F32":
        return struct.pack("<f", value)
    if entry["dtype"] == "F16":
        return struct.pack("<e", max(-65504.0, min(65504.0, value)) if abs(value) < float("inf") else value)
    return struct.pack("<f", value)[2:]


def _weight(directory: Path, n: int, at: int, value: float) -> None:
    _tensor(directory, n, lambda entry, data: _replaced(data, at, _codes(entry, value)))


def _replaced(data: bytes, at: int, code: bytes) -> bytes:
    begin = at * len(code) % len(data) if data else 0
    return data[:begin] + code + data[begin + len(code) :]


def _scale(directory: Path, n: int, factor: float) -> None:
    import ml_dtypes
    import numpy as np

    def change(entry: dict[str, Any], data: bytes) -> bytes:
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[entry["dtype"]]
        array = np.frombuffer(data, dtype).astype(np.float64) * factor
        limit = float(ml_dtypes.finfo(dtype).max)
        return bytes(np.clip(array, -limit, limit).astype(dtype).tobytes())

    _tensor(directory, n, change)


def _tensor(directory: Path, n: int, change: Callable[[dict[str, Any], bytes], bytes]) -> None:
    files = sorted(directory.glob("*.safetensors"))
    file = files[n % len(files)]
    content = _content(file)
    start = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:start])
    names = sorted(k for k in table if k != "__metadata__")
    entry = table[names[n // len(files) % len(names)]]
    begin, end = (start + i for i in entry["data_offsets"])
    file.write_bytes(content[:begin] + change(entry, content[begin:end]) + content[end:])


def _more(directory: Path, name: str) -> None:
    os.mkfifo(directory / name)


_STEPS: dict[str, Callable[..., None]] = {
    "set": _set, "drop": _drop, "set rope": _set_rope, "write": _write, "flip": _flip, "insert": _insert, "cut": _cut, "grow": _grow,
    "kind": _kind, "link": _link, "swap": _swap, "map": _map, "map new": _map_new, "entry": _entry,
    "entry dtype": lambda directory, n, dtype: _entry(directory, n, "dtype", dtype), "entry shift": _entry_shift,
    "entry shape": lambda directory, n, shape: _entry(directory, n, "shape", shape), "entry rename": _entry_rename,
    "entry exchange": _entry_exchange, "entry twice": _entry_twice, "header bytes": _header_bytes, "header pad": _header_pad,
    "weight": _weight, "scale": _scale, "tokenizer": lambda directory, key, value: _set(directory, "tokenizer.json", key, value),
    "more": _more, "touch": lambda directory, name: os.utime(_named(directory, name)),
}  # fmt: skip


LAYOUT_STEPS = st.one_of(
    st.tuples(st.just("flip"), where, st.integers(1, 255)),
    st.tuples(st.just("insert"), where, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("cut"), where),
    st.tuples(st.just("grow"), st.integers(1, 9000)),
    st.tuples(st.just("kind"), st.sampled_from(["fifo", "socket", "device", "unlink", "unreadable"])),
    st.tuples(st.just("link"), links.filter(lambda to: to not in ("inside copy", ".", ".."))),
    st.tuples(st.just("write"), texts),
)
"""One step of damage to the layout file of a checkpoint."""


def apply_to_layout(file: Path, step: tuple[Any, ...]) -> None:
    """Do one of `LAYOUT_STEPS`; times are those of now."""
    name, *arguments = step
    (file.parent.parent / "outside").mkdir(exist_ok=True)
    _STEPS[name](file.parent, file.name, *arguments)


def apply(directory: Path, steps: list[tuple[Any, ...]]) -> None:
    """Do the steps; one that an earlier step made impossible (its file is gone or no JSON any more) is left out."""
    for name, *arguments in steps:
        try:
            if arguments and isinstance(arguments[0], str) and arguments[0] in FILES and not _named(directory, arguments[0]).is_file():
                continue
            _STEPS[name](directory, *arguments)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError, OverflowError, RecursionError):
            continue
