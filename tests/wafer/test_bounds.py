"""A core that runs alone cannot reach past its blocks, compiled or not."""

from __future__ import annotations

import numpy as np
import pytest

import wse_emu as wse


@wse.kernel(out=("y",))
def read_past_the_end(x, y):
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            y[i, j] = x[i + 1, j]


@wse.kernel(out=("y",))
def write_past_the_end(x, y):
    for i in range(y.shape[0] + 1):
        for j in range(y.shape[1]):
            y[i, j] = x[0, j]


@pytest.mark.parametrize("executor", ["isolated", "interpreted"])
@pytest.mark.parametrize("kernel", [read_past_the_end, write_past_the_end], ids=lambda k: k.name)
def test_an_index_outside_of_a_block_is_refused_with_core_and_blocks(kernel: object, executor: str) -> None:
    wafer = wse.Wafer(wse.TINY, executor=executor)
    x, y = (wafer.place(np.ones((8, 12), np.float32), name=name) for name in "xy")
    message = rf"kernel `{kernel.name}` on core \(0, 0\): index .*out of bounds.*its blocks are \{{'x': \(2, 3\), 'y': \(2, 3\)\}}"
    with pytest.raises(wse.KernelError, match=message):
        wafer.launch(kernel, x=x, y=y)
    x.free()
    y.free()
    assert not wafer.sram.live
