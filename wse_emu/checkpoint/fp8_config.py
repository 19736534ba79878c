"""What a config.json says of FP8: blocks, scales, and which modules are stored in full, as transformers' fine-grained FP8 reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import ConfigError

_E4M3 = ("e4m3", "e4m3fn", "float8_e4m3fn")
"""Names that released configurations have for it."""
_PATTERN = re.compile(r"[\w.*\-]{1,256}")
_MAX_PATTERNS = 256
_MAX_STARS = 3
"""A pattern of more could take forever to match."""


class ModuleNames:
    """A list of modules, as transformers reads it.

    A name means the modules that begin with it, up to a dot, and those that end with it; one with ``*`` is a regular expression for how
    they begin.

    Parameters
    ----------
    names : tuple of str
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        plain = [name for name in names if "*" not in name]
        self._starts, self._ends = frozenset(name.removesuffix(".") for name in plain), frozenset(plain)
        self._lengths = sorted({len(name) for name in plain})
        self._patterns = [re.compile(rf"(?:{name})(?:(?<=\.)|(?=\.|$))") for name in names if "*" in name]

    def __contains__(self, module: str) -> bool:
        parts = module.split(".")
        if any(".".join(parts[:n]) in self._starts for n in range(1, len(parts) + 1)):
            return True
        return any(module[-n:] in self._ends for n in self._lengths) or any(p.match(module) for p in self._patterns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Format:
    """FP8 of one checkpoint."""

    block: tuple[int, int] | None
    """Rows and columns that share a scale; None is the whole matrix."""
    powers: bool
    """Whether every scale must be a power of two (``ue8m0``)."""
    kept: ModuleNames
    """Modules that are stored in full (``modules_to_not_convert``)."""


def fp8_format(config: Mapping[str, Any], where: str) -> Fp8Format | None:
    """How matrices are stored where a config.json says that they are in FP8; None where it does not.

    Raises
    ------
    ConfigError
        If it says so of another form of it.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return None
    where = f"{where}: `quantization_config`"
    said = (
        ("fmt", _E4M3), ("scale_fmt", ("float", "ue8m0")), ("expert_dtype", ("fp8",)), ("activation_scheme", ("dynamic", "static")),
    )  # fmt: skip
    for name, values in said:
        if quantization.get(name, values[0]) not in values:
            raise ConfigError(f"{where}: `{name}` must be {' or '.join(map(repr, values))}, got {show(quantization[name])}")
    block = quantization.get("weight_block_size", [128, 128])
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 1 <= n <= 1 << 20 for n in block)):
        raise ConfigError(f"{where}: `weight_block_size` must be two positive integers, or null for one scale a matrix, got {show(block)}")
    pair, powers = None if block is None else (block[0], block[1]), quantization.get("scale_fmt") == "ue8m0"
    return Fp8Format(block=pair, powers=powers, kept=_kept(quantization, where))


def _kept(quantization: Mapping[str, Any], where: str) -> ModuleNames:
    """Those of ``modules_to_not_convert``, or of ``ignored_layers``."""
    name = "ignored_layers" if quantization.get("modules_to_not_convert") is None else "modules_to_not_convert"
    names = quantization.get(name)
    if names is None:
        return ModuleNames()
    if not isinstance(names, list) or not all(isinstance(n, str) and _PATTERN.fullmatch(n) and n.count("*") <= _MAX_STARS for n in names):
        raise ConfigError(f"{where}: `{name}` must be a list of modules' names, in which at most {_MAX_STARS} `*` stand, got {show(names)}")
    if sum("*" in n for n in names) > _MAX_PATTERNS:
        raise ConfigError(f"{where}: `{name}` has more than {_MAX_PATTERNS} names with `*`")
    if any(re.search(r"^\*|\*\*", n) for n in names):
        raise ConfigError(f"{where}: `{name}`: a `*` repeats the character before it, as `.*` does, got {show(names)}")
    return ModuleNames(tuple(names))
