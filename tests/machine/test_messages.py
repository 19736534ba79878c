"""What a wrong kernel, launch or placement says: the rule, the value and the way out, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.foundation.errors import InputError, KernelError, PlacementError
from wse_emu.wafer.ledger import Ledger


def double(x: Any) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] = x[i, j] * np.float32(2)


def allocates(x: Any) -> None:
    y = x.copy()
    x[0, 0] = y[0, 0]


def adds_arrays(x: Any) -> None:
    x[:] = x + x


def makes_a_list(x: Any) -> None:
    y = [x[0, 0]]
    x[0, 0] = y[0]


def knows_no_name(x: Any) -> None:
    x[0, 0] = nowhere  # type: ignore[name-defined]  # noqa: F821


def stores_text(x: Any) -> None:
    x[0, 0] = "a"


def opens_a_file(x: Any) -> None:
    with open("x"):
        x[0, 0] = 1


def wafer_and_tensor(executor: Any = "batched") -> tuple[wse.Wafer, Any]:
    wafer = wse.Wafer(wse.TINY, rows=2, cols=2, executor=executor)
    return wafer, wafer.place(np.ones((4, 4), np.float32), name="x")


@pytest.mark.parametrize("executor", ["batched", "isolated"])
@pytest.mark.parametrize(
    ("body", "line", "reason"),
    [
        (allocates, "y = x.copy()", "it allocates memory; a body has its blocks"),
        (adds_arrays, "x[:] = x + x", "it allocates memory"),
        (makes_a_list, "y = [x[0, 0]]", "it allocates memory"),
        (stores_text, 'x[0, 0] = "a"', "No implementation of function"),
        (knows_no_name, None, "NameError: name 'nowhere' is not defined"),
        (opens_a_file, None, "context manager"),
    ],
)
def test_a_body_that_does_not_compile_is_told_by_line_and_reason(
    body: Callable[..., None], line: str | None, reason: str, executor: str
) -> None:
    wafer, x = wafer_and_tensor(executor)
    with pytest.raises(KernelError) as caught:
        wafer.launch(wse.kernel(inout=("x",))(body), x=x)
    said = str(caught.value)
    assert said.startswith(f"kernel `{body.__name__}` does not compile")
    assert reason in said
    assert "\n" not in said
    assert line is None or f"test_messages.py, line {body.__code__.co_firstlineno + 1}: `{line}`" in said
    assert caught.value.__cause__ is not None, "the compiler's own words stay in reach"
    assert wafer.sram.live == ("x",)


def test_a_function_without_the_decorator_is_no_kernel() -> None:
    wafer, x = wafer_and_tensor()
    with pytest.raises(
        KernelError, match=r"takes a kernel, got <function double .*; declare the function with @wse.kernel\(out=\(\.\.\.\)\)"
    ):
        wafer.launch(double, x=x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "said"), [((), "missing `x`"), (("x", "y", "z"), "unknown `y`, `z`"), (("y",), "missing `x`; unknown `y`")]
)
def test_arguments_that_do_not_match_are_named(names: tuple[str, ...], said: str) -> None:
    wafer, x = wafer_and_tensor()
    with pytest.raises(KernelError) as caught:
        wafer.launch(wse.kernel(inout=("x",))(double), **dict.fromkeys(names, x))
    assert str(caught.value) == f"kernel `double` takes `x`: {said}"


def test_an_unknown_grid_axis_is_refused_by_name() -> None:
    wafer, _ = wafer_and_tensor()
    with pytest.raises(PlacementError, match=r"`w`: `axes` may hold 'row', 'col' and None, got 'rows'"):
        wafer.place(np.ones((4, 4), np.float32), axes=("rows", "col"), name="w")  # type: ignore[arg-type]
    assert wafer.sram.live == ("x",)


@pytest.mark.parametrize("by", ["kind", ("kind", "core")])
def test_totals_by_an_unknown_field_or_by_one_string_are_refused(by: Any) -> None:
    with pytest.raises(InputError, match=r"a sequence of layer, stage, kind and name, for instance \('kind',\); got "):
        Ledger().totals(by=by)


def test_objects_say_what_they_are() -> None:
    wafer, _ = wafer_and_tensor()
    assert repr(wafer.ledger) == "Ledger(1 event)"
    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = wse.from_config({**config, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8})
    assert repr(model).endswith("parameters, no wafer chosen yet)")
