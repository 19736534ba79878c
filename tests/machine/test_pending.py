"""Programs that go on while their numbers are computed: whoever looks at one finds it, and bits and ledger are those of a run that waits.

Here a shared driver does nothing at all until it must, so that whatever forgot to wait reads what was there before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.engine import attention_block as block
from wse_emu.foundation.errors import ForkError, StoreError
from wse_emu.layers.linear import matmul
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer import pending
from wse_emu.wafer.kernel import kernel
from wse_emu.wafer.placement import TokenBands
from wse_emu.wafer.turn import Turn
from wse_kernels import threads
from wse_kernels.threads import Driver, SharedDriver, Unfinished

from .models import CONFIGS, RULES, make_model


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Nothing is computed before somebody looks; one entry for every call that was put off."""
    begun: list[int] = []

    def begin(self: SharedDriver, units: int, *args: Any) -> Unfinished:
        begun.append(units)
        return Unfinished(self.function, 1, np.zeros(2, np.int64), args)

    monkeypatch.setattr(SharedDriver, "begin", begin)
    return begun


def product(wafer: wse.Wafer) -> tuple[wse.PlacedTensor, np.ndarray[Any, Any]]:
    """``x @ w`` on a wafer, and what it must be: small integers, exact in float32."""
    x, w = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(12, dtype=np.float32).reshape(3, 4)
    bands = TokenBands(2, wafer.rows)
    placed = wafer.place(x)
    out = wafer.place(np.full((2, 4), -1, np.float32))
    flat = w.ravel().copy()
    flat.flags.writeable = False
    matmul(wafer, placed, StreamedMatrix("w", 3, 4, flat), out, bands)
    return out, x @ w


@kernel(inout=("x",))
def add_one(x: Any) -> None:
    """A stranger's kernel."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] = x[i, j] + np.float32(1)


def test_nothing_is_computed_before_somebody_looks(lazy: list[int]) -> None:
    wafer = wse.Wafer(rows=2, cols=2)
    out, want = product(wafer)
    assert len(lazy) == 1
    assert (out.unsettled == -1).all()
    assert not wafer.pending.is_empty
    np.testing.assert_array_equal(out.gather(), want)
    assert wafer.pending.is_empty


@pytest.mark.parametrize("look", ["data", "flat", "block", "gather", "drain"])
def test_whoever_looks_waits(lazy: list[int], look: str) -> None:
    wafer = wse.Wafer(rows=2, cols=2)
    out, want = product(wafer)
    if look == "drain":
        np.testing.assert_array_equal(wafer.drain(out), want)
    elif look == "block":
        np.testing.assert_array_equal(out.block(0, 0), want[:1, :2])
    elif look == "gather":
        np.testing.assert_array_equal(out.gather(), want)
    else:
        np.testing.assert_array_equal(np.sort(getattr(out, look)), np.sort(want.ravel()))


def test_a_strangers_kernel_finds_what_was_computed_before(lazy: list[int]) -> None:
    wafer = wse.Wafer(rows=2, cols=2)
    out, want = product(wafer)
    wafer.launch(add_one, x=out)
    np.testing.assert_array_equal(out.gather(), want + 1)


def test_a_tensor_that_is_freed_keeps_what_others_compute_from_it(lazy: list[int]) -> None:
    wafer = wse.Wafer(rows=2, cols=2)
    first, want = product(wafer)
    second, _ = product(wafer)
    first.free()
    np.testing.assert_array_equal(second.gather(), want)


IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [0, 0, 0, 0, 0, 6, 5]])
MASK = np.array([[1] * 7, [0] * 5 + [1] * 2])


def what_a_run_leaves(model: wse.WaferModel) -> tuple[Any, ...]:
    """Logits, hidden states and tokens, as bytes, and the ledger."""
    out = model(IDS, attention_mask=MASK, output_hidden_states=True)
    new = model.generate(IDS, 4, attention_mask=MASK)
    return out.logits.tobytes(), [h.tobytes() for h in out.hidden_states], new.tobytes(), model.wafer.ledger.to_json()


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("options", [{}, {"bta_max_tile": 1}, {"moe_implementation": "functional"}], ids=str)
def test_a_run_that_puts_off_all_it_can_gives_the_same_bits_and_ledger(
    family: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    want = what_a_run_leaves(make_model(family, 3, 2, **options))
    begun = request.getfixturevalue("lazy")
    assert what_a_run_leaves(make_model(family, 3, 2, **options)) == want
    assert len(begun) > 20


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(RULES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_does_one_of_every_family_and_format(family: str, dtype: str, request: pytest.FixtureRequest) -> None:
    want = what_a_run_leaves(make_model(family, 3, 2, rules=True, dtype=dtype))
    begun = request.getfixturevalue("lazy")
    assert what_a_run_leaves(make_model(family, 3, 2, rules=True, dtype=dtype)) == want
    assert len(begun) > 20


def test_a_model_verifies_when_everything_is_put_off(lazy: list[int]) -> None:
    report = make_model("qwen3_moe", 3, 2).verify(np.arange(5))
    assert report.passed
    assert lazy


def test_statistics_of_attention_are_there_when_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = block.attention
    seen: list[Any] = []
    busy = False

    def attention(*args: Any, **kwargs: Any) -> Any:
        line = args[0].pending
        if busy and not args[0].is_dry:
            assert line.is_empty  # the probe has looked at queries, keys and values
            line.run(Call([]), 1)
        found = inner(*args, **kwargs)
        if found is not None and not args[0].is_dry:
            seen.append(tuple(part.copy().tobytes() for part in found))
        return found

    monkeypatch.setattr(block, "attention", attention)
    make_model("mixtral", 3, 2).verify(np.arange(5))
    eager, seen[:] = seen.copy(), []
    busy = True
    make_model("mixtral", 3, 2).verify(np.arange(5))
    assert len(eager) == 2
    assert seen == eager


# ---- the line


class Call:
    """A shared driver and its call, by hand."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.is_done = log, False

    def begin(self, units: int, *args: Any) -> Call:
        self.log.append("begun")
        return self

    def finish(self) -> None:
        self.is_done = True
        self.log.append("finished")


def test_what_is_asked_for_meanwhile_comes_after_in_order() -> None:
    log: list[str] = []
    line, call = pending.Pending(Turn()), Call(log)
    line.behind(log.append, "at once")
    line.run(call, 1)  # type: ignore[arg-type]
    line.behind(log.append, "first")
    line.run(Driver(lambda part, n: log.append("second")), 1)
    line.behind(log.append, "third")
    assert log == ["at once", "begun"]
    line.finish()
    line.finish()
    assert log == ["at once", "begun", "finished", "first", "second", "third"]


def test_when_the_helpers_are_done_the_line_goes_on() -> None:
    log: list[str] = []
    line, call = pending.Pending(Turn()), Call(log)
    line.run(call, 1)  # type: ignore[arg-type]
    line.behind(log.append, "first")
    call.is_done = True
    line.run(Call(log), 1)  # type: ignore[arg-type]
    assert log == ["begun", "finished", "first", "begun"]
    assert not line.is_empty


def test_the_line_is_bounded() -> None:
    log: list[str] = []
    line = pending.Pending(Turn())
    line.run(Call(log), 1)  # type: ignore[arg-type]
    for _ in range(pending.MOST + 1):
        line.run(Driver(lambda part, n: log.append("done")), 1)
    assert log.count("done") == pending.MOST + 1


def test_an_error_in_the_line_is_raised_and_what_is_behind_it_stays() -> None:
    log: list[str] = []
    line = pending.Pending(Turn())

    def fail() -> None:
        raise StoreError("was written to")

    line.run(Call(log), 1)  # type: ignore[arg-type]
    line.behind(fail)
    line.behind(log.append, "behind")
    with pytest.raises(StoreError, match="was written to"):
        line.finish()
    assert "behind" not in log
    line.finish()
    assert log[-1] == "behind"


def test_what_nobody_wants_any_more_ends_too() -> None:
    log: list[str] = []
    line = pending.Pending(Turn())
    line.run(Call(log), 1)  # type: ignore[arg-type]
    line.behind(lambda: 1 // 0)
    line.run(Driver(lambda part, n: log.append("computed")), 1)
    line.behind(log.append, "behind")
    line.abandon()
    line.abandon()
    assert line.is_empty
    assert log == ["begun", "finished", "behind"]


def test_another_thread_that_looks_waits_for_its_turn() -> None:
    log: list[str] = []
    turn = Turn()
    line = pending.Pending(turn)
    line.run(Call(log), 1)  # type: ignore[arg-type]
    line.behind(log.append, "behind")
    other = threading.Thread(target=line.finish)
    with turn.lock:
        other.start()
        other.join(0.1)
        assert log == ["begun"]
        line.finish()
    other.join(60)
    assert log == ["begun", "finished", "behind"]


def test_what_comes_now_comes_even_if_the_line_fails() -> None:
    log: list[str] = []
    line = pending.Pending(Turn())
    line.run(Call(log), 1)  # type: ignore[arg-type]
    line.behind(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        line.now(log.append, "now")
    assert log == ["begun", "finished", "now"]


def test_a_call_that_cannot_be_finished_is_given_up() -> None:
    class Broken(Call):
        def finish(self) -> None:
            raise MemoryError("no room for scratch")

    log: list[str] = []
    line = pending.Pending(Turn())
    line.run(Broken(log), 1)  # type: ignore[arg-type]
    line.behind(log.append, "behind")
    with pytest.raises(MemoryError, match="no room"):
        line.finish()
    line.abandon()
    assert line.is_empty
    assert log == ["begun", "behind"]


def test_what_the_line_reads_is_looked_at_before_it_goes_on() -> None:
    log: list[str] = []
    line = pending.Pending(Turn())

    def gone() -> None:
        raise StoreError("was cut")

    line.check = gone
    line.run(Call(log), 1)  # type: ignore[arg-type]
    line.run(Driver(lambda part, n: log.append("computed")), 1)
    with pytest.raises(StoreError, match="was cut"):
        line.finish()
    line.abandon()
    assert log == ["begun", "finished", "finished"]


def test_a_pass_that_fails_leaves_nothing_unfinished(lazy: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mixtral", 3, 2)
    want = model.generate(np.arange(5), 2)
    calls: list[Any] = []
    inner = block.attention

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            assert not model.wafer.pending.is_empty
            raise StoreError("gone")
        return inner(*args, **kwargs)

    monkeypatch.setattr(block, "attention", fail)
    with pytest.raises(StoreError, match="gone"):
        model.generate(np.arange(5), 2)
    assert model.wafer.pending.is_empty
    monkeypatch.setattr(block, "attention", inner)
    np.testing.assert_array_equal(model.generate(np.arange(5), 2), want)


def test_a_child_that_was_forked_in_the_middle_of_it_is_told_so() -> None:
    log: list[str] = []
    line, call = pending.Pending(Turn()), Call(log)
    line.run(call, 1)  # type: ignore[arg-type]
    line.after_fork()
    with pytest.raises(ForkError, match=r"in the middle of a computation.*make the model anew in the child"):
        line.finish()
    line.abandon()
    assert log == ["begun"]


def test_real_helpers_and_one_thread_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    want = make_model("qwen3_moe", 3, 2).generate(IDS, 5, attention_mask=MASK)
    monkeypatch.setattr(threads, "WORTH_NS", 0)
    for n in (2, 3):
        with threads.limit_threads(n):
            model = make_model("qwen3_moe", 3, 2)
            for _ in range(3):
                np.testing.assert_array_equal(model.generate(IDS, 5, attention_mask=MASK), want)
