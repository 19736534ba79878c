"""Mistakes in matrices of eight bits, made in the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable

from golden_models import is_fp8
from golden_tensors import FP8_TOP
from torch import Tensor

from golden_mistakes.subject import Subject, mistake


def _rescale(subject: Subject, wrong: Callable[[Tensor], Tensor]) -> None:
    """Multiply every block by ``wrong(scales) / scales``; the largest number of a block is `FP8_TOP` times its scale."""
    block = subject.config["quantization_config"]["weight_block_size"]
    for name, p in subject.model.named_parameters():
        if "_proj" not in name:
            continue
        rows, cols = (n // b for n, b in zip(p.shape[-2:], block, strict=True))
        blocks = p.reshape(-1, rows, block[0], cols, block[1])
        scales = blocks.abs().amax((2, 4)) / FP8_TOP
        p.copy_((blocks * (wrong(scales) / scales)[:, :, None, :, None]).reshape(p.shape))


@mistake("FP8: one scale for all blocks of a matrix", is_fp8)
def _(subject: Subject) -> None:
    _rescale(subject, lambda scales: scales * 0 + scales.mean((1, 2), keepdim=True))


@mistake("FP8: the scale of the block to the left", is_fp8)
def _(subject: Subject) -> None:
    _rescale(subject, lambda scales: scales.roll(1, 2))


@mistake("FP8: the scale of the block above", is_fp8)
def _(subject: Subject) -> None:
    _rescale(subject, lambda scales: scales.roll(1, 1))
