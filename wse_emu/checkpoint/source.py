"""What an opened checkpoint is: a spec, its configuration as published, and tensors that are read one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.model_spec import ModelSpec


class TensorSource(Protocol):
    """Published tensors by their Hugging Face names; values are widened exactly to float32.

    Nothing is held in memory beyond the array returned. A file that changes meanwhile raises `CheckpointError`.
    """

    @property
    def fingerprint(self) -> str:
        """Text that changes when any tensor's bytes change."""

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as published; matrices are (out, in). Raises `CheckpointError` for an unknown name."""

    def dtype(self, name: str) -> str:
        """Stored type: ``"float32"``, ``"float16"`` or ``"bfloat16"``."""

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes as it is stored, those of its scales included."""

    def read(self, name: str) -> NDArray[np.float32]:
        """Whole tensor, float32, C-contiguous, read-only."""

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Entries ``start:stop`` of the first axis, float32, C-contiguous, read-only."""

    def read_part(self, name: str, key: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """Elements that the indices `key` select, float32, read-only; for what lies in a larger tensor (`PublishedTensor.key`)."""

    def close(self) -> None:
        """Let go of files; arrays handed out stay valid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One model as published; use as a context manager or call `close` to let go of its files."""

    name: str
    """What to call it in messages: the directory's name, or ``"random (seed 0)"``."""
    spec: ModelSpec
    config: Mapping[str, Any] = field(repr=False)
    """config.json as read."""
    tensors: TensorSource = field(repr=False)
    fingerprint: str
    """Text that changes when any file that was read changes (config, generation config, tensors, tokenizer)."""
    ignored: tuple[str, ...] = ()
    """Tensors of the directory that transformers leaves out too, such as layers that predict further tokens; sorted.

    Before them, fields of config.json that it does not look at and that say other than what it computes.
    """
    path: Path | None = None
    """Directory; None for random weights."""
    tokenizer_path: Path | None = None
    """tokenizer.json of the directory, if there is one."""

    def close(self) -> None:
        """Let go of the tensor files."""
        self.tensors.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
