"""Python threads: on wafers of their own at once, on one wafer one after the other; bits and ledgers are those of one thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.foundation.errors import BusyError
from wse_kernels import threads

from .models import CONFIG, NEW, PROMPT, make_model, same, what_is_there

PROMPTS = [np.array([i, 7, 2 * i + 1]) for i in range(6)]


@pytest.fixture(autouse=True)
def _crowd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every driver in three parts, and threads that take turns as often as Python lets them."""
    monkeypatch.setattr(threads, "WORTH_NS", 0)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*work: Callable[[], Any]) -> list[Any]:
    """Results of calls that begin together, each in a thread of its own."""
    start = threading.Barrier(len(work))

    def run(call: Callable[[], Any]) -> Any:
        start.wait(60)
        with threads.limit_threads(3):
            return call()

    with ThreadPoolExecutor(len(work)) as pool:
        return [f.result(120) for f in [pool.submit(run, call) for call in work]]


@pytest.mark.parametrize("executor", ["batched", "isolated", "interpreted"])
def test_models_on_wafers_of_their_own_run_at_once(executor: str) -> None:
    expected = make_model(executor)
    want = expected.generate(PROMPT, 2)
    models = [make_model(executor) for _ in range(3)]
    results = at_once(*[lambda m=m: m.generate(PROMPT, 2) for m in models])
    for model, ids in zip(models, results, strict=True):
        assert same(ids, want)
        assert model.wafer.ledger.events() == expected.wafer.ledger.events()


def test_calls_of_one_model_run_one_after_the_other() -> None:
    model, alone = make_model(), make_model()
    want = [alone.generate(p, NEW) for p in PROMPTS]
    results = at_once(*[lambda p=p: model.generate(p, NEW) for p in PROMPTS])
    assert all(same(a, b) for a, b in zip(results, want, strict=True))
    assert not model.wafer.sram.live
    # Passes of one call lie together, and their events are those of a call alone.
    phases = [p.phase for p in model.wafer.ledger.passes()]
    assert phases == ["prompt", *["decode"] * (NEW - 1)] * len(PROMPTS)
    assert sorted(map(str, model.wafer.ledger.events())) == sorted(map(str, alone.wafer.ledger.events()))


def test_two_models_on_one_wafer_take_turns() -> None:
    wafer = wse.Wafer(wse.WSE3, rows=2, cols=2)
    models = [wse.from_config(CONFIG, seed=s, wafer=wafer) for s in (3, 4)]
    want = [make_model(seed=s).generate(PROMPT, NEW) for s in (3, 4)]
    results = at_once(*[lambda m=m: [m.generate(PROMPT, NEW) for _ in range(3)] for m in models])
    for found, expected in zip(results, want, strict=True):
        assert all(same(ids, expected) for ids in found)
    assert not wafer.sram.live


def test_a_grid_is_chosen_once() -> None:
    model = wse.from_config(CONFIG, seed=3)
    wafers = at_once(*[lambda: model.wafer] * 4)
    assert all(w is wafers[0] for w in wafers)


@wse.kernel(inout=("x",), code_bytes=64)
def add_one(x):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] += np.float32(1)


def test_launches_on_one_wafer_from_several_threads() -> None:
    wafer = wse.Wafer(wse.WSE3, rows=3, cols=2)
    hosts = [np.full((6, 4), 10 * t, np.float32) for t in range(4)]

    def work(host: np.ndarray) -> np.ndarray:
        with wafer.place(host, name=f"x{host[0, 0]:g}") as x:
            for _ in range(25):
                wafer.launch(add_one, x=x)
            return x.gather()

    for host, result in zip(hosts, at_once(*[lambda h=h: work(h) for h in hosts]), strict=True):
        assert same(result, host + np.float32(25))
    assert not wafer.sram.live
    assert wafer.sram.used_bytes() == wse.WSE3.base_code_bytes
    kinds = [e.kind for e in wafer.ledger.events()]
    assert (kinds.count("launch"), kinds.count("inject"), kinds.count("probe")) == (100, 4, 4)


def test_a_callback_may_not_run_the_model_inside() -> None:
    model = make_model()
    want = model.generate(PROMPT, NEW)
    before = what_is_there(model.wafer)
    for call in (
        lambda: model(PROMPT), lambda: model.generate(PROMPT, 1), lambda: model.verify(PROMPT),
        lambda: wse.from_config(CONFIG, seed=4, wafer=model.wafer)(PROMPT),
    ):  # fmt: skip
        with pytest.raises(BusyError, match="called by a callback of a run that is not finished, on the same wafer"):
            model.generate(PROMPT, NEW, on_token=lambda step, ids, call=call: call())
        assert what_is_there(model.wafer) == before
    assert same(model.generate(PROMPT, NEW), want)


def test_a_callback_may_place_tensors_and_run_another_model() -> None:
    model, other = make_model(), make_model(seed=4)
    want, of_other = model.generate(PROMPT, NEW), other.generate(PROMPT, NEW)
    seen = []

    def on_token(step: int, ids: np.ndarray) -> None:
        with model.wafer.place(np.ones((2, 2), np.float32)) as x:
            model.wafer.launch(add_one, x=x)
        seen.append(other.generate(PROMPT, NEW))

    assert same(model.generate(PROMPT, NEW, on_token=on_token), want)
    assert len(seen) == NEW
    assert all(same(ids, of_other) for ids in seen)


def test_kernels_called_from_several_threads() -> None:
    from wse_kernels.matmul import STORE, mesh_matmul

    rng = np.random.default_rng(0)
    cases = [(rng.standard_normal(40 * 30, np.float32), rng.standard_normal(30 * 50, np.float32)) for _ in range(4)]
    for _, w in cases:
        w.flags.writeable = False

    def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        out, rows = np.zeros(40 * 50, np.float32), np.arange(40)
        mesh_matmul(x, 40, np.array([0, 11, 30]), rows, w, 0, 30, 50, out, 40, np.array([0, 50]), rows, np.zeros(1, np.float32), STORE)
        return out

    with threads.limit_threads(1):
        want = [product(*case) for case in cases]
    results = at_once(*[lambda c=c: [product(*c) for _ in range(50)] for c in cases])
    for found, expected in zip(results, want, strict=True):
        assert all(same(out, expected) for out in found)
