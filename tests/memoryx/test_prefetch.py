"""The stream prepares in the background, in order, within its bound, and hands errors to whoever waits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from wse_emu.foundation.errors import SpecError, StoreError
from wse_emu.memoryx import LayerStream, ShapeStore
from wse_emu.testing import contract_specs


class Recorder(ShapeStore):
    """Keeps what is resident, and who called."""

    def __init__(self) -> None:
        super().__init__(contract_specs()["mixtral"], "recorder")
        self.resident: set[str] = set()
        self.log: list[tuple[str, tuple[str, ...]]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.fail_on: str | None = None
        self.most = 0
        self.ready: set[str] = set()

    def check_readable(self) -> None:
        pass

    def is_ready(self, names: Sequence[str]) -> bool:
        return self.ready.issuperset(names)

    def prepare(self, names: Sequence[str]) -> None:
        assert self.gate.wait(10)
        self.threads.add(threading.current_thread().name)
        if self.fail_on in names:
            raise StoreError(f"cannot read {self.fail_on}")
        self.resident |= set(names)
        self.most = max(self.most, len(self.resident))
        self.log.append(("prepare", tuple(names)))

    def drop(self, names: Sequence[str]) -> None:
        self.resident -= set(names)
        self.log.append(("drop", tuple(names)))


GROUPS = [[f"{n}.a", f"{n}.b"] for n in range(6)]


def wait_until(happened: Callable[[], bool]) -> None:
    for _ in range(1000):
        if happened():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen in five seconds")


def wait_for(store: Recorder, names: Sequence[str]) -> None:
    wait_until(lambda: store.resident.issuperset(names))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_each_group_is_resident_while_it_is_used_and_gone_afterwards(depth: int) -> None:
    store = Recorder()
    with LayerStream(store, depth=depth) as stream:
        for n, names in enumerate(GROUPS):
            with stream.layer(names, then=GROUPS[n + 1] if n + 1 < len(GROUPS) else ()):
                assert store.resident.issuperset(names)
                assert not any(store.resident.intersection(g) for g in GROUPS[:n])
    assert store.resident == set()
    assert store.most <= (2 if depth == 0 else 4)
    prepared = [names for what, names in store.log if what == "prepare"]
    assert prepared == [tuple(g) for g in GROUPS]
    background = {t for t in store.threads if t != threading.current_thread().name}
    assert background == (set() if depth == 0 else {"memoryx-prefetch"})


def test_next_group_is_prepared_while_this_one_is_used() -> None:
    store = Recorder()
    with LayerStream(store) as stream, stream.layer(GROUPS[0], then=GROUPS[1]):
        wait_for(store, GROUPS[1])
        assert store.resident == {*GROUPS[0], *GROUPS[1]}
    assert store.resident == set()


def test_waits_for_a_preparation_that_has_not_ended() -> None:
    store = Recorder()
    with LayerStream(store) as stream:
        with stream.layer(GROUPS[0]):
            store.gate.clear()
            assert stream.schedule(GROUPS[1])
        threading.Timer(0.05, store.gate.set).start()
        with stream.layer(GROUPS[1]):
            assert store.gate.is_set()
            assert store.resident == set(GROUPS[1])


def test_never_more_than_depth_groups_are_pending() -> None:
    store = Recorder()
    with LayerStream(store, depth=2) as stream:
        assert [stream.schedule(g) for g in GROUPS[:3]] == [True, True, False]
        assert not stream.schedule(GROUPS[0])
        assert not stream.schedule([])
        for names in GROUPS[:3]:
            with stream.layer(names):
                assert store.resident.issuperset(names)
    assert store.resident == set()


def test_nobody_is_woken_for_a_group_that_is_ready() -> None:
    store = Recorder()
    store.ready = set(GROUPS[1])
    with LayerStream(store) as stream:
        assert not stream.schedule(GROUPS[1])
        with stream.layer(GROUPS[0], then=GROUPS[1]):
            assert store.resident == set(GROUPS[0])
        with stream.layer(GROUPS[1], then=[*GROUPS[1], *GROUPS[2]]):
            wait_for(store, GROUPS[2])
        assert [names for what, names in store.log if what == "prepare"] == [(*GROUPS[0],), (*GROUPS[1],), (*GROUPS[1], *GROUPS[2])]
    assert store.threads == {threading.current_thread().name, "memoryx-prefetch"}


def test_a_model_of_one_layer_keeps_what_comes_again() -> None:
    store = Recorder()
    with LayerStream(store) as stream:
        for n in range(3):
            with stream.layer(GROUPS[0], then=GROUPS[0]):
                assert store.resident == set(GROUPS[0])
                wait_until(lambda: len(store.log) >= 2 * n + 2)  # noqa: B023 - the next preparation ends before this group is left
    assert store.resident == set()


def test_experts_that_were_guessed_but_not_used_are_dropped_at_the_end() -> None:
    store = Recorder()
    with LayerStream(store) as stream:
        with stream.layer(GROUPS[0], then=[*GROUPS[1], *GROUPS[2]]):
            wait_for(store, GROUPS[2])
        with stream.layer(GROUPS[1]):
            assert store.resident.issuperset(GROUPS[1])
    assert store.resident == set()


@pytest.mark.parametrize("depth", [0, 1])
def test_error_of_the_thread_surfaces_where_the_group_is_waited_for(depth: int) -> None:
    store = Recorder()
    store.fail_on = "1.b"
    with LayerStream(store, depth=depth) as stream:
        with stream.layer(GROUPS[0], then=GROUPS[1]):
            time.sleep(0.02)
        with pytest.raises(StoreError, match=r"cannot read 1\.b"), stream.layer(GROUPS[1]):
            raise AssertionError("the body must not run")
        with stream.layer(GROUPS[2]):  # the stream goes on
            assert store.resident == set(GROUPS[2])


def test_error_of_a_group_that_nobody_uses_harms_nobody() -> None:
    store = Recorder()
    store.fail_on = "1.b"
    with LayerStream(store) as stream, stream.layer(GROUPS[0], then=GROUPS[1]):
        time.sleep(0.02)
    assert store.resident == set()


def test_error_in_the_body_drops_the_group_and_ends_the_thread() -> None:
    store = Recorder()
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), LayerStream(store) as stream, stream.layer(GROUPS[0], then=GROUPS[1]):
        raise ZeroDivisionError
    assert store.resident == set()
    assert threading.active_count() == before


def test_use_outside_with_or_twice_raises() -> None:
    stream = LayerStream(Recorder())
    with pytest.raises(StoreError, match="is used inside `with`"), stream.layer(GROUPS[0]):
        pass
    with stream, pytest.raises(StoreError, match="in use already"):
        stream.__enter__()
    with stream, stream.layer(GROUPS[0]):  # again, after it was left
        pass


@pytest.mark.parametrize("depth", [-1, 1.0, True, None])
def test_depth_is_checked(depth: object) -> None:
    with pytest.raises(SpecError, match=r"`depth` .* must be a non-negative integer"):
        LayerStream(Recorder(), depth=depth)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_prepares_the_groups_itself() -> None:
    store = Recorder()
    store.gate.clear()
    with LayerStream(store) as stream:
        stream.schedule(GROUPS[0])
        pid = os.fork()
        if pid == 0:  # the child must not return into pytest
            try:
                store.gate.set()
                for group, then in pairwise(GROUPS):
                    with stream.layer(group, then):
                        assert store.resident == set(group)
                os._exit(0 if store.threads == {"MainThread"} else 1)
            except BaseException:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        store.gate.set()
