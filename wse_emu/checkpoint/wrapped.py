"""Directories of models that also see: the language model inside, whose tensors carry a prefix and whose configuration lies one level down.

Images are not read: what the vision tower and its projector hold is left out, and named with the other tensors that are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.checkpoint.mxfp4 import Codes
from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import CheckpointError, ConfigError

WRAPPERS: Mapping[str, str] = MappingProxyType({"llama4": "llama4_text", "gemma3": "gemma3_text"})
"""``model_type`` of such a directory, and of the language model inside."""

_PREFIXES = (("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.lm_head.", "lm_head."))
"""How released files name its tensors, how transformers names its own modules, and what they are called without the rest."""
_NOT_TEXT = r"(model\.)?(vision_model|vision_tower|multi_modal_projector)\..*"


def is_wrapped(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a language model inside of a larger one."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in WRAPPERS


def language_config(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Configuration of the language model that a config.json describes: itself, or what lies inside.

    Raises
    ------
    ConfigError
        If there is nothing inside, or something else.
    """
    if not is_wrapped(config):
        return config
    inner, text = WRAPPERS[config["model_type"]], config.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(f"{where}: `text_config` must be an object with the fields of the language model, got {show(text)}")
    if text.get("model_type", inner) != inner:
        raise ConfigError(f"{where}: `text_config`: `model_type` must be {inner!r}, got {show(text['model_type'])}")
    outer = {name: config[name] for name in ("quantization_config",) if name in config}
    return {**outer, **text, "model_type": inner, "architectures": None}


class LanguageTensors:
    """Tensors of the language model under the names that it has by itself; a source of codes like the one that it reads from.

    Parameters
    ----------
    source : Codes
    where : str
        What to call it in messages.

    Raises
    ------
    CheckpointError
        If two tensors come to one name.
    """

    def __init__(self, source: Codes, where: str) -> None:
        self._source = source
        self._stored: dict[str, str] = {}
        left_out: list[str] = []
        for stored in source.names():
            if re.fullmatch(_NOT_TEXT, stored):
                left_out.append(stored)
                continue
            prefix, instead = next(((p, i) for p, i in _PREFIXES if stored.startswith(p)), ("", ""))
            name = instead + stored.removeprefix(prefix)
            if name in self._stored:
                raise CheckpointError(f"{where}: {self._stored[name]!r} and {stored!r} are both the language model's {name!r}")
            self._stored[name] = stored
        self.left_out = tuple(left_out)
        """Tensors that are not the language model's."""

    def _of(self, name: str) -> str:
        return self._stored.get(name, name)

    @property
    def fingerprint(self) -> str:
        """That of the source."""
        return self._source.fingerprint

    def names(self) -> Sequence[str]:
        """Names of the language model's tensors, sorted."""
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as published."""
        return self._source.shape(self._of(name))

    def dtype(self, name: str) -> str:
        """Stored type."""
        return self._source.dtype(self._of(name))

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes in its file."""
        return self._source.stored_bytes(self._of(name))

    def read(self, name: str) -> NDArray[np.float32]:
        """Whole tensor, float32, C-contiguous, read-only."""
        return self._source.read(self._of(name))

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Entries ``start:stop`` of the first axis, float32, C-contiguous, read-only."""
        return self._source.read_rows(self._of(name), start, stop)

    def read_part(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """Elements that `key` selects, float32, read-only."""
        return self._source.read_part(self._of(name), key)

    def read_codes(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.uint8]:
        """Elements that `key` selects of a tensor of bytes, as they are stored."""
        return self._source.read_codes(self._of(name), key)

    def close(self) -> None:
        """Let go of the files."""
        self._source.close()
