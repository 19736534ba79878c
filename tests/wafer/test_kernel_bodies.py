"""Bodies that strangers write: a right result on every executor, or an error that says what to do; and declarations that cannot work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.wafer.kernel import Kernel

N = np.float32
TENTH, HALF = 0.1, 0.5
TABLE = np.arange(4, dtype=np.float32)
LIST = [1.0, 2.0]
COMPUTE = ("batched", "isolated", "interpreted")
COMPILED = ("batched", "isolated")


def run(kernel: Kernel, executor: Any, **more: Any) -> np.ndarray:
    """`y` (2, 2) after the kernel, on one core; x = 1/7, 2/7, 3/7, 4/7."""
    wafer = wse.Wafer(wse.TINY, rows=1, cols=1, executor=executor)
    x = wafer.place(np.arange(1, 5, dtype=N).reshape(2, 2) / N(7), name="x")
    y = wafer.place(np.zeros((2, 2), N), name="y")
    wafer.launch(kernel, x=x, y=y, **more)
    assert wafer.sram.live == ("x", "y")
    return y.gather()


def raised(kernel: Kernel, executor: Any, **more: Any) -> str:
    """What the launch says."""
    wafer = wse.Wafer(wse.TINY, rows=1, cols=1, executor=executor)
    x, y = wafer.place(np.ones((2, 2), N), name="x"), wafer.place(np.zeros((2, 2), N), name="y")
    with pytest.raises(wse.KernelError) as caught:
        wafer.launch(kernel, x=x, y=y, **more)
    assert wafer.sram.live == ("x", "y")
    assert [e.kind for e in wafer.ledger.events()] == ["inject"] * 2
    return str(caught.value)


# ---- results of double precision in one executor and single in another


def times_a_tenth(x, y):
    y[0, 0] = x[0, 0] * 0.1


def times_a_global(x, y):
    y[0, 0] = x[0, 0] * TENTH


def times_an_integer(x, y):
    y[0, 0] = x[0, 0] * 3


def times_an_index(x, y):
    for i in range(2):
        y[i, 0] = x[i, 0] * i


def adds_to_a_python_number(x, y):
    acc = 0.0
    for j in range(2):
        acc += x[0, j]
    y[0, 0] = acc


def is_at_least_a_python_zero(x, y):
    y[0, 0] = max(x[0, 0], 0.0)


def is_above_a_tenth(x, y):
    y[0, 0] = N(1) if x[0, 0] > 0.1 else N(2)


def cubes(x, y):
    y[0, 0] = x[0, 0] ** 3


def divides(x, y):
    y[0, 0] = x[0, 0] / 3


WIDENING = [
    (times_a_tenth, "a float32 meets float64"),
    (times_a_global, "a float32 meets float64"),
    (times_an_integer, "a float32 meets int64"),
    (times_an_index, "a float32 meets int64"),
    (adds_to_a_python_number, "a float32 meets float64"),
    (is_at_least_a_python_zero, "a float32 meets float64"),
    (is_above_a_tenth, "a float32 is compared with float64"),
    (cubes, "a float32 is raised to a power of int64"),
    (divides, "a float32 meets int64"),
]


@pytest.mark.slow
@pytest.mark.parametrize("executor", COMPILED)
@pytest.mark.parametrize(("body", "what"), WIDENING, ids=lambda p: getattr(p, "__name__", None))
def test_what_compiled_code_would_widen_is_refused_by_line(body: Callable[..., None], what: str, executor: str) -> None:
    kernel = wse.kernel(out=("y",))(body)
    for _ in range(2):  # also the second time, when it is compiled
        said = raised(kernel, executor)
        assert said.startswith(f"kernel `{body.__name__}` (test_kernel_bodies.py, line ")
        assert what in said
        assert said.endswith("plain Python in float32; write np.float32(...), or np.float64(...) for both")


def with_typed_numbers(x, y):
    half = N(HALF)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            a = x[i, j] * N(0.1) + half
            if a > 0.5 or a > 0 or x[i, j] != 0.25:
                a = a * N(i) + N(2.5) * x[i, j] * x[i, j]
            y[i, j] = max(a, N(0)) + N(np.float64(x[i, j]) * 0.1)


def with_double_precision(x, y):
    acc = np.float64(0.0)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            acc = acc + np.float64(x[i, j]) * 0.1
            y[i, j] = acc


@pytest.mark.slow
@pytest.mark.parametrize("body", [with_typed_numbers, with_double_precision])
def test_typed_numbers_give_the_same_bits_everywhere(body: Callable[..., None]) -> None:
    kernel = wse.kernel(out=("y",))(body)
    results = [run(kernel, executor) for executor in COMPUTE]
    assert len({r.tobytes() for r in results}) == 1
    assert results[0].any()


# ---- what a body may not do


def raises(x, y):
    y[0, 0] = x[0, 0]
    if x[0, 0] > N(0):
        raise ValueError("too big")


def returns_a_number(x, y):
    y[0, 0] = x[0, 0]
    return x[0, 1]


def returns_an_array(x, y):
    y[0, 0] = x[0, 0]
    return y


def writes_its_input(x, y):
    y[0, 0] = x[0, 0]
    x[0, 0] = N(0)


def writes_its_input_through_a_view(x, y):
    row = x[1]
    row[0] = N(0)
    y[0, 0] = x[0, 0]


def reads_a_global_array(x, y):
    y[0, 0] = x[0, 0] + TABLE[2]


def reads_a_global_list(x, y):
    y[0, 0] = x[0, 0] + N(LIST[0])


REFUSED = [
    (raises, COMPUTE, r": ValueError: too big"),
    (returns_a_number, COMPUTE, r"returns float32; a body stores its results in the arguments named in `out`"),
    (returns_an_array, COMPUTE, r"returns (an|nd)\s?array; a body stores its results in the arguments named in `out`"),
    (writes_its_input, COMPUTE, r"writes to an argument that is read-only[:;] name it in `out` or `inout`"),
    (writes_its_input_through_a_view, COMPUTE, r"writes to an argument that is read-only[:;] name it in `out` or `inout`"),
    (
        reads_a_global_array,
        (*COMPUTE, "dry"),
        r"`TABLE` is memory from outside \(ndarray\), which lies on no core; place it and pass it as an",
    ),
    (
        reads_a_global_list,
        (*COMPUTE, "dry"),
        r"`LIST` is memory from outside \(list\), which lies on no core; place it and pass it as an arg",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("body", "executors", "said"), REFUSED, ids=lambda p: getattr(p, "__name__", None))
def test_what_a_body_may_not_do_is_told_by_every_executor(body: Callable[..., None], executors: tuple[str, ...], said: str) -> None:
    kernel = wse.kernel(out=("y",))(body)
    for executor in executors:
        for _ in range(2):
            text = raised(kernel, executor)
            assert text.startswith(f"kernel `{body.__name__}`")
            assert re.search(said, text), (executor, text)
            assert "\n" not in text


def test_an_exception_of_plain_python_names_its_core() -> None:
    def divides_by_zero(x, y):
        y[0, 0] = x[0, 0] / N(1) + N(1 // (x.shape[0] - 2))

    assert raised(wse.kernel(out=("y",))(divides_by_zero), "interpreted").startswith(
        "kernel `divides_by_zero` on core (0, 0): ZeroDivisionError: "
    )


# ---- what a body may do


@pytest.mark.slow
def test_defaults_closures_prints_and_early_returns_work(capfd: pytest.CaptureFixture[str]) -> None:
    offset = 3.0

    @wse.kernel(out=("y",), scratch=("t",))
    def body(core, x, y, scale=N(2), t=wse.scratch(4), times=2):  # noqa: B008 - made once, as they should be
        print("core", core.row, core.col)
        if x.shape[0] == 0:
            return
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                t[j] = x[i, j] * scale + N(offset)
                y[i, j] = t[j] * N(times)

    values = np.arange(1, 5, dtype=N).reshape(2, 2) / N(7)
    for executor in COMPUTE:
        np.testing.assert_array_equal(run(body, executor), (values * N(2) + N(3)) * N(2))
        np.testing.assert_array_equal(run(body, executor, scale=N(1), times=1), values + N(3))
    assert capfd.readouterr().out == "core 0 0\n" * 6


def test_a_default_without_a_type_is_refused_like_an_argument() -> None:
    @wse.kernel(out=("y",))
    def body(x, y, scale=2.0):
        y[0, 0] = x[0, 0] * scale

    for executor in COMPUTE:
        assert raised(body, executor) == (
            "kernel `body`: `scale` must be a placed tensor or a typed scalar, got float; place the array, or write np.float32(...)"
        )


# ---- declarations


def plain(x, y):
    y[0, 0] = x[0, 0]


def generator(x, y):
    yield x


def with_rest(x, *y):
    pass


def with_keywords(x, **y):
    pass


def with_keyword_only(x, *, y):
    pass


def with_core_last(x, y, core):
    pass


@pytest.mark.parametrize(
    ("roles", "body", "said"),
    [
        ({"out": ("z",)}, plain, r"kernel `plain`: `out` names 'z', which is no parameter \['x', 'y'\]"),
        ({"inout": ("z",)}, plain, r"`inout` names 'z'"),
        ({"out": ("y",), "scratch": ("z",)}, plain, r"`scratch` names 'z'"),
        ({"out": (3,)}, plain, r"`out` names 3, which is no parameter"),
        ({"out": "y"}, plain, r"kernel `plain`: `out` is a sequence of names, for instance \(\"y\",\); got 'y'"),
        ({"out": None}, plain, r"`out` is a sequence of names"),
        ({"out": ("y", "y")}, plain, r"`y` is named in `out` and in `out`; it has one role"),
        ({"out": ("y",), "inout": ("y",)}, plain, r"`y` is named in `out` and in `inout`; it has one role"),
        ({"out": ("y",), "scratch": ("y",)}, plain, r"`y` is named in `out` and in `scratch`"),
        ({}, plain, r"kernel `plain` writes nothing: name its results in `out`"),
        ({"scratch": ("y",)}, plain, r"kernel `plain` writes nothing"),
        ({"out": ("y",), "code_bytes": -1}, plain, r"`code_bytes` must be an integer >= 0, got -1"),
        ({"out": ("y",), "code_bytes": 1.5}, plain, r"`code_bytes` must be an integer >= 0, got 1.5"),
        ({"out": ("y",), "code_bytes": True}, plain, r"`code_bytes` must be an integer >= 0, got True"),
        ({"out": ("y",), "macs": 3}, plain, r"`macs` must be a function or None, got 3"),
        ({"out": ("y",)}, generator, r"a kernel is a plain Python function, got <function generator"),
        ({"out": ("y",)}, print, r"a kernel is a plain Python function, got <built-in function print>"),
        ({"out": ("y",)}, 3, r"a kernel is a plain Python function, got 3"),
        ({"out": ("x",)}, with_rest, r"kernel `with_rest`: `\*y` has no one value"),
        ({"out": ("x",)}, with_keywords, r"`\*\*y` has no one value"),
        ({"out": ("x",)}, with_keyword_only, r"`y` has no one value"),
        ({"out": ("x",)}, with_core_last, r"kernel `with_core_last`: `core` comes first or not at all"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_told(roles: dict[str, Any], body: Any, said: str) -> None:
    with pytest.raises(wse.KernelError, match=said):
        wse.kernel(**roles)(body)


@pytest.mark.parametrize(
    ("macs", "said"),
    [
        (lambda s: 1.5, r"kernel `plain`: `macs` must give an integer >= 0, got 1.5"),
        (lambda s: -1, r"`macs` must give an integer >= 0, got -1"),
        (lambda s: None, r"`macs` must give an integer >= 0, got None"),
        (lambda s: s["z"], r"kernel `plain`: `macs` failed on \{'x': \(2, 2\), 'y': \(2, 2\)\}: KeyError: 'z'"),
    ],
)
def test_a_wrong_count_of_multiply_adds_is_told_before_a_core_runs(macs: Any, said: str) -> None:
    kernel = wse.kernel(out=("y",), macs=macs)(plain)
    for executor in (*COMPUTE, "dry"):
        assert re.search(said, raised(kernel, executor))
