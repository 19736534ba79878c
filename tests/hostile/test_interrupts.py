"""Ctrl-C at any point: nothing stays on the wafer, on disk or in a thread, and the next run gives what a fresh one gives."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint.replace import new_directory
from wse_emu.cli.entry import main
from wse_emu.cli.exits import Exit
from wse_emu.memoryx import LayerStream, build
from wse_kernels import _cache

from .interrupts import Interrupt, spread
from .models import PROMPT, make_model, same, what_is_there

NEW = 2


@pytest.fixture(autouse=True)
def _swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python itself swallows an interrupt that falls into a finaliser; the run then goes on."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def raised_by_numpy(error: BaseException) -> bool:
    """Whether NumPy lost an interrupt while it looked for the common dtype of two structured arrays, which are always of one dtype here."""
    return isinstance(error, TypeError) and str(error).startswith("Cannot compare structured arrays unless they have a common dtype")


def interrupted_at(points: list[int], work: Callable[[], Any], check: Callable[[str], None]) -> int:
    """Do `work` once for each point, interrupted there, and `check` after each; returns how many interrupts reached the caller."""
    reached = 0
    for point in points:
        with Interrupt(point) as interrupt:
            try:
                work()
            except BaseException as error:
                # NumPy makes another error of it here and there, mostly with the interrupt as its reason; comparing structured arrays
                # it forgets the reason.
                if not any(isinstance(e, KeyboardInterrupt) for e in chain(error)) and not raised_by_numpy(error):
                    raise
                reached += 1
        check(interrupt.where)
    return reached


def prefetch_threads() -> list[threading.Thread]:
    """Threads of prefetching streams that do not end by themselves."""
    alive = [t for t in threading.enumerate() if t.name == "memoryx-prefetch"]
    for thread in alive:
        if thread.is_alive():  # one that was interrupted before it began is listed, and never begins
            thread.join(10)
    return [t for t in alive if t.is_alive()]


@pytest.mark.parametrize(
    ("executor", "n", "dense"),
    [
        ("batched", 50, 10), ("isolated", 3, 2),
        pytest.param("batched", 250, 100, marks=pytest.mark.slow), pytest.param("isolated", 15, 8, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_interrupted_run(executor: str, n: int, dense: int) -> None:
    model = make_model(executor)
    fresh = make_model(executor)
    expected = fresh.generate(PROMPT, NEW)
    model.generate(PROMPT, NEW)
    mine = model.wafer.place(np.arange(6.0, dtype=np.float32).reshape(2, 3))
    before = what_is_there(model.wafer)
    with Interrupt() as whole:
        model.generate(PROMPT, NEW)

    def check(where: str) -> None:
        assert not prefetch_threads(), where
        assert what_is_there(model.wafer) == before, where
        events = model.wafer.ledger.events()
        assert len(events) == len(model.wafer.ledger), where
        assert all(p.stop <= len(events) for p in model.wafer.ledger.passes()), where
        model.wafer.ledger.clear()

    points = spread(whole.points, n, dense)
    reached = interrupted_at(points, lambda: model.generate(PROMPT, NEW), check)
    assert reached > len(points) * 0.9
    assert same(model.generate(PROMPT, NEW), expected)
    assert same(mine.gather(), np.arange(6.0, dtype=np.float32).reshape(2, 3))
    assert model.wafer.ledger.events()[: len(fresh.wafer.ledger)] == fresh.wafer.ledger.events()
    assert model.recorded_kv is not None
    assert same(model.recorded_kv, fresh.recorded_kv)


@pytest.mark.parametrize("n", [10, pytest.param(80, marks=pytest.mark.slow)])
def test_an_interrupted_verification(n: int) -> None:
    model = make_model()
    assert model.verify(PROMPT).passed
    before = what_is_there(model.wafer)
    with Interrupt() as whole:
        model.verify(PROMPT)

    def check(where: str) -> None:
        assert what_is_there(model.wafer) == before, where

    assert interrupted_at(spread(whole.points, n), lambda: model.verify(PROMPT), check)
    assert model.verify(PROMPT).passed


def files(folder: Path) -> set[str]:
    """Every file and directory below `folder`."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint on disk."""
    make_model().save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(("n", "dense"), [(40, 10), pytest.param(300, 100, marks=pytest.mark.slow)])
def test_an_interrupted_opening_leaves_the_cache_whole(saved: Path, tmp_path: Path, n: int, dense: int) -> None:
    cache = tmp_path / "cache"
    wafer = wse.Wafer(wse.WSE3, rows=2, cols=2)
    expected = make_model().generate(PROMPT, NEW)

    def from_scratch() -> wse.WaferModel:
        for file in (cache / "weights").glob("*"):
            file.unlink()
        return wse.from_pretrained(saved, wafer=wafer, cache_dir=cache)

    from_scratch()
    (layout,) = (cache / "weights").iterdir()
    content = layout.read_bytes()
    descriptors = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    with Interrupt() as whole:
        from_scratch()

    def check(where: str) -> None:
        left = list((cache / "weights").iterdir())
        assert left in ([], [layout]), where
        assert not left or layout.stat().st_size == len(content), where

    points = spread(whole.points, n, dense)
    assert interrupted_at(points, from_scratch, check) > len(points) * 0.9
    gc.collect()
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    model = wse.from_pretrained(saved, wafer=wafer, cache_dir=cache)
    assert same(model.generate(PROMPT, NEW), expected)
    model.close()


@pytest.mark.parametrize("there", [False, True], ids=["new", "overwritten"])
@pytest.mark.parametrize(("n", "dense"), [(20, 8), pytest.param(100, 60, marks=pytest.mark.slow)])
def test_an_interrupted_save_is_whole_or_not_there(tmp_path: Path, there: bool, n: int, dense: int) -> None:
    model, other = make_model(), make_model(seed=4)
    target = tmp_path / "to" / "checkpoint"
    target.parent.mkdir()

    def prepare() -> None:
        for folder in target.parent.iterdir():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        if there:
            other.save(target)

    prepare()
    before = {p.name: p.read_bytes() for p in target.glob("*")}
    model.save(target, overwrite=there)
    after = {p.name: p.read_bytes() for p in target.iterdir()}
    prepare()
    with Interrupt() as whole:
        model.save(target, overwrite=there)
    prepare()

    def check(where: str) -> None:
        assert [p.name for p in target.parent.iterdir()] in ([], [target.name]), where
        assert {p.name: p.read_bytes() for p in target.glob("*")} in (before, after), where
        prepare()

    assert interrupted_at(spread(whole.points, n, dense), lambda: model.save(target, overwrite=there), check)


@pytest.mark.parametrize(("n", "dense"), [(6, 2), pytest.param(20, 8, marks=pytest.mark.slow)])
def test_an_interrupted_command(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], n: int, dense: int
) -> None:
    monkeypatch.setattr(build, "cache_directory", lambda cache_dir=None: tmp_path / "cache")
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "ids").write_text(" ".join(map(str, PROMPT)))
    arguments = ["run", str(saved), "--ids", str(tmp_path / "ids"), "--max-new-tokens", "2", "--rows", "2", "--cols", "2", "--json"]
    arguments += [word for name in ("ledger", "trace", "report") for word in (f"--{name}", str(out / name))]
    monkeypatch.setattr(sys, "argv", ["wse-emu", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # `main` ignores Ctrl-C once all is said
    codes: list[Any] = []

    def run() -> None:
        try:
            main()
        except SystemExit as end:
            codes.append(end.code)

    run()
    capsys.readouterr()
    cached = files(tmp_path / "cache")
    with Interrupt() as whole:
        run()
    assert codes == [Exit.OK, Exit.OK]
    capsys.readouterr()
    wholes = {p.name: p.stat().st_size for p in out.iterdir()}
    assert set(wholes) == {"ledger", "trace", "report"}
    codes.clear()

    def check(where: str) -> None:
        said, error = capsys.readouterr()
        if codes[-1] == Exit.OK:  # too late to change anything, or swallowed by Python
            json.loads(said)
        else:
            assert (codes[-1], error) == (Exit.INTERRUPTED, "wse-emu: interrupted\n"), where
            assert said == "" or json.loads(said), where
        assert files(tmp_path / "cache") == cached, where
        assert {p.name for p in out.iterdir()} <= set(wholes), where
        for file in out.iterdir():
            if file.name != "report":  # whose size changes with the seconds in it
                assert file.stat().st_size == wholes[file.name], where
                json.loads(file.read_text())
            else:
                assert file.read_text().endswith("</html>\n"), where
            file.unlink()

    points = spread(whole.points, n, dense)[1:]  # the first is the beginning of `main` itself
    assert interrupted_at(points, run, check) == 0
    assert codes.count(Exit.INTERRUPTED) > len(points) / 2


@pytest.mark.parametrize("there", [False, True], ids=["new", "overwritten"])
def test_a_directory_is_whole_wherever_its_making_is_interrupted(tmp_path: Path, there: bool) -> None:
    """Every point: also between the two renames, and while what was there is removed."""
    target = tmp_path / "to" / "directory"

    def prepare() -> None:
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        if there:
            target.mkdir()
            (target / "file").write_text("old")

    def work() -> None:
        with new_directory(target, overwrite=True, replaceable=lambda name: True) as part:
            (part / "file").write_text("new")

    def check(where: str) -> None:
        found = {p.relative_to(target.parent).as_posix(): p.is_file() and p.read_text() for p in target.parent.rglob("*")}
        wholes = [{"directory": False, "directory/file": text} for text in ("old", "new")]
        assert found in (wholes if there else [{}, wholes[1]]), where
        prepare()

    prepare()
    with Interrupt() as whole:
        work()
    prepare()
    assert interrupted_at(list(range(1, whole.points + 1)), work, check)


def test_a_second_ctrl_c_while_the_wafer_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    wafer = wse.Wafer(wse.WSE3, rows=2, cols=2, executor="isolated")
    before, back_to, calls = what_is_there(wafer), wafer.sram.back_to, []

    def once_more(mark: Any) -> None:
        calls.append(mark)
        if len(calls) == 1:
            raise KeyboardInterrupt
        back_to(mark)

    monkeypatch.setattr(wafer.sram, "back_to", once_more)

    def work() -> None:
        with wafer.all_or_nothing():
            wafer.place(np.zeros((2, 2), np.float32))
            wafer.ledger.current_scope = 3, "left by an interrupt"
            raise OSError("of the run")

    with pytest.raises(OSError, match="of the run"):
        work()
    assert what_is_there(wafer) == before
    assert len(calls) == 2


def test_a_stream_that_nobody_leaves_ends_its_thread() -> None:
    stream = LayerStream(make_model().store, depth=1)
    stream.__enter__()
    (thread,) = [t for t in threading.enumerate() if t.name == "memoryx-prefetch"]
    del stream
    thread.join(10)
    assert not thread.is_alive()


def test_an_interrupted_kernel_cache_holds_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "kernels" / "stamp" / "function.nbc"
    payload = b"code" * 1000
    with Interrupt() as whole:
        assert _cache.write_entry(path, payload)
    path.unlink()

    def check(where: str) -> None:
        assert not path.parent.exists() or [p.name for p in path.parent.iterdir()] in ([], [path.name]), where
        assert not path.exists() or _cache.read_entry(path) == payload, where
        path.unlink(missing_ok=True)

    assert interrupted_at(list(range(1, whole.points + 1)), lambda: _cache.write_entry(path, payload), check)


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A process of the command line."""
    code = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; sys.argv = {['wse-emu', *arguments]!r}\n"
    code += "from wse_emu.cli.entry import main\nmain()"
    words = [sys.executable, "-c", code]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


@pytest.fixture
def _sigint() -> Iterator[None]:
    """Children begin with Python's own handler, whatever this process was started with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_sigint")
@pytest.mark.skipif(sys.platform == "win32", reason="about SIGINT")
def test_a_real_signal_ends_the_command_with_one_line(saved: Path, tmp_path: Path) -> None:
    """Sent as soon as the command has said its first word."""
    (tmp_path / "ids").write_text("1 2 3")
    arguments = ["run", str(saved), "--ids", str(tmp_path / "ids"), "--max-new-tokens", "28", "--trace", str(tmp_path / "trace")]
    with command(*arguments, WSE_EMU_CACHE_DIR=str(tmp_path / "cache")) as child:
        assert child.stdout is not None
        assert child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=120)
    assert (child.returncode, error) == (Exit.INTERRUPTED, "wse-emu: interrupted\n")
    assert not [name for name in files(tmp_path) if name.endswith(".part")]
    assert not (tmp_path / "trace").exists()


@pytest.mark.usefixtures("_sigint")
@pytest.mark.skipif(sys.platform == "win32", reason="about SIGINT")
def test_a_signal_while_the_command_line_is_loading(tmp_path: Path) -> None:
    """A module of its imports that interrupts."""
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code = f"import sys; sys.path[:0] = {[str(tmp_path), *(p for p in sys.path if p)]!r}\nfrom wse_emu.cli.entry import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (Exit.INTERRUPTED, "", "wse-emu: interrupted\n")
