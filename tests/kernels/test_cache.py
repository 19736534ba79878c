"""The disk cache of compiled kernels: never stale, never trusted blindly, never in the way; and what the decorator promises."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numba import config, typeof
from numba.core.errors import NumbaError

import wse_kernels
from wse_kernels import _cache, _jit
from wse_kernels._jit import compile_count, compile_log, kernel, plain

compiles = pytest.mark.skipif(bool(config.DISABLE_JIT), reason="nothing is compiled")

HELPER = """
import numpy as np
from wse_kernels._jit import helper

FACTOR = np.float32(2)

@helper
def scaled(x):
    return x * FACTOR
"""

PROBE = """
from wse_kernels._jit import kernel
from wse_kernels.probe_helper import scaled

@kernel()
def probe(x, out):
    for i in range(x.shape[0]):
        out[i] = scaled(x[i])
"""

RUN = """
import json, os, sys, time
import numpy as np
from wse_kernels import _jit
from wse_kernels.probe import probe
{before}
x, out = np.arange(1, 4, dtype=np.float32), np.zeros(3, np.float32)
probe(x, out)
count = _jit.compile_count()
print(json.dumps([out.tolist(), count.compiled, count.loaded]))
"""

TOGETHER = """
ready, other = sys.argv[1:3]
open(ready, "w").close()
while not os.path.exists(other):
    time.sleep(0.001)
"""


def start(folder: Path, before: str = "", *args: str) -> subprocess.Popen[str]:
    """Run `RUN` on the packages in `folder`, with the cache beside them."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "PYTHON", "COV"))}
    env |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "WSE_EMU_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-W", "error", "-c", RUN.format(before=before), *args]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[object]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Folder with a copy of the package that holds two modules more: a kernel, and in another file the helper it calls."""
    package = tmp_path / "wse_kernels"
    source = Path(wse_kernels.__file__).parent
    package.mkdir()
    for name in ("__init__.py", "_jit.py", "_cache.py"):
        shutil.copy(source / name, package / name)
    (package / "probe_helper.py").write_text(HELPER)
    (package / "probe.py").write_text(PROBE)
    return tmp_path


def test_edited_helper_in_another_file_gives_the_new_result(copied):
    assert finish(start(copied)) == [[2, 4, 6], 1, 0]
    assert finish(start(copied)) == [[2, 4, 6], 0, 1]
    helper = copied / "wse_kernels" / "probe_helper.py"
    helper.write_text(HELPER.replace("np.float32(2)", "np.float32(3)"))
    assert finish(start(copied)) == [[3, 6, 9], 1, 0]
    helper.write_text(HELPER)
    assert finish(start(copied)) == [[2, 4, 6], 0, 1]
    assert len(list((copied / "cache" / "kernels").iterdir())) == 2


def test_two_processes_that_compile_at_once_leave_one_whole_file(copied):
    a, b = str(copied / "a"), str(copied / "b")
    pair = [start(copied, TOGETHER, a, b), start(copied, TOGETHER, b, a)]
    assert [finish(process)[0] for process in pair] == [[2, 4, 6]] * 2
    assert finish(start(copied)) == [[2, 4, 6], 0, 1]
    assert [path.suffix for path in (copied / "cache" / "kernels").glob("*/*")] == [".nbc"]


def test_importing_the_package_or_its_cache_folders_loads_neither_numba_nor_numpy():
    code = "import sys, wse_kernels, wse_kernels._cache; print([m for m in ('numba', 'llvmlite', 'numpy') if m in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(Path(wse_kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


class Package:
    """A covered package in a folder of its own, under the name of the real one, in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._patch = monkeypatch
        self.module("base", "")

    def module(self, name: str, text: str, root: str = "wse_kernels") -> ModuleType:
        """Write and import one module; what was imported before counts as unchanged."""
        path = self.folder / root / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        self._patch.setitem(_jit._sources, root, _jit._Sources(path.parent))
        full = f"{root}.{name}"
        spec = importlib.util.spec_from_file_location(full, path)
        module = importlib.util.module_from_spec(spec)
        self._patch.setitem(sys.modules, full, module)
        spec.loader.exec_module(module)
        return module

    def files(self) -> list[Path]:
        return sorted(_cache.kernels_root().glob("*/*"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    monkeypatch.setenv("WSE_EMU_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return Package(tmp_path, monkeypatch)


SIMPLE = """
from wse_kernels._jit import kernel

@kernel()
def probe(x):
    return x + x
"""


def fresh(compiled) -> tuple[int, int]:
    """Call the same function through a new dispatcher; return how many compilations and loads that took."""
    before = compile_count()
    assert kernel()(plain(compiled))(21) == 42
    after = compile_count()
    return after.compiled - before.compiled, after.loaded - before.loaded


@compiles
def test_second_dispatcher_loads_what_the_first_compiled(package):
    probe = package.module("probe", SIMPLE).probe
    assert fresh(probe) == (1, 0)
    assert fresh(probe) == (0, 1)
    assert compile_log()[-1] == ("wse_kernels.probe.probe", "(int64)", False, True)
    [path] = package.files()
    assert probe._cache.cache_path == str(path.parent)


@compiles
@pytest.mark.skipif(sys.platform == "win32", reason="no mode bits")
def test_folders_and_files_are_the_users_own(package):
    fresh(package.module("probe", SIMPLE).probe)
    [path] = package.files()
    modes = [p.stat().st_mode & 0o777 for p in (path, path.parent, path.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


@compiles
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b"x" * 99],
    ids=["half", "empty", "bit", "other"],
)
def test_torn_file_is_compiled_again_and_replaced(package, damage):
    probe = package.module("probe", SIMPLE).probe
    fresh(probe)
    [path] = package.files()
    path.write_bytes(damage(path.read_bytes()))
    assert fresh(probe) == (1, 0)
    assert fresh(probe) == (0, 1)


@compiles
def test_whole_file_that_cannot_be_rebuilt_is_compiled_again(package):
    probe = package.module("probe", SIMPLE).probe
    fresh(probe)
    [path] = package.files()
    assert _cache.write_entry(path, b"not a pickle")
    assert fresh(probe) == (1, 0)


@compiles
def test_folder_that_cannot_be_made_means_compiling(package, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    probe = package.module("probe", SIMPLE).probe
    assert fresh(probe) == (1, 0)
    assert fresh(probe) == (1, 0)


@pytest.mark.nojit
def test_damaged_payload_is_never_handed_out(tmp_path):
    path = tmp_path / "kernels" / "stamp" / "probe.nbc"
    assert _cache.write_entry(path, b"payload")
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert _cache.read_entry(path) is None
        path.write_bytes(whole[:at])
        assert _cache.read_entry(path) is None
    path.write_bytes(whole)
    assert _cache.read_entry(path) == b"payload"


@pytest.mark.nojit
@pytest.mark.skipif(sys.platform == "win32", reason="no mode bits")
def test_files_that_others_could_have_written_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "kernels" / "stamp" / "probe.nbc"
    assert _cache.write_entry(path, b"payload")
    assert _cache.read_entry(path) == b"payload"
    path.chmod(0o620)
    assert _cache.read_entry(path) is None
    path.chmod(0o600)
    path.parent.chmod(0o770)
    assert _cache.read_entry(path) is None
    assert not _cache.write_entry(path, b"payload")
    path.parent.chmod(0o700)
    link = path.with_name("link.nbc")
    link.symlink_to(path)
    assert _cache.read_entry(link) is None
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert _cache.read_entry(path) is None


@compiles
def test_sources_edited_after_their_import_are_neither_read_from_nor_kept_on_disk(package):
    probe = package.module("probe", SIMPLE).probe
    path = package.folder / "wse_kernels" / "probe.py"
    path.write_text(SIMPLE + "\n# edited while this process runs\n")
    assert fresh(probe) == (1, 0)
    assert package.files() == []


MADE = """
from wse_kernels._jit import kernel

def make(value):
    @kernel()
    def probe(x):
        return x + value
    return probe

def make_caller(body):
    @kernel()
    def caller(x):
        return body(x)
    return caller

def generate(body):
    scope = {"body": body, "__name__": __name__}
    exec(compile("def caller(x):\\n    return body(x)", __file__, "exec"), scope)
    return kernel()(scope["caller"])
"""


@compiles
@pytest.mark.parametrize("make", ["make_caller", "generate"])
def test_functions_made_with_other_values_are_told_apart(package, make):
    module = package.module("probe", MADE)
    callers = [getattr(module, make)(module.make(value)) for value in (1, 2, 2.5)]
    assert [caller(40) for caller in callers] == [41, 42, 42.5]
    assert len(package.files()) == 6
    before = compile_count()
    assert [kernel()(plain(caller))(40) for caller in callers] == [41, 42, 42.5]
    after = compile_count()
    assert (after.compiled - before.compiled, after.loaded - before.loaded) == (0, 3)


@compiles
@pytest.mark.parametrize("make", ["make_caller", "generate"])
def test_functions_made_around_a_users_kernel_are_not_kept(package, make):
    @kernel()
    def user(x):
        return x + 1

    caller = getattr(package.module("probe", MADE), make)(user)
    assert caller(41) == 42
    assert package.files() == []


@compiles
def test_users_kernel_is_compiled_in_every_process(package):
    @kernel()
    def user(x):
        return x + x

    assert user._cache.cache_path is None
    assert fresh(user) == (1, 0)
    assert fresh(user) == (1, 0)
    assert package.files() == []


@compiles
def test_kernel_that_takes_a_kernel_is_not_kept(package):
    probe = package.module("probe", "from wse_kernels._jit import kernel\n\n@kernel()\ndef probe(f, x):\n    return f(x)\n").probe

    @kernel()
    def user(x):
        return x + 1

    assert probe(user, 41) == 42
    assert package.files() == []


@compiles
def test_kernels_of_the_emulator_follow_all_of_its_sources(package):
    package.module("other", "", root="wse_emu")
    assert fresh(package.module("probe", SIMPLE, root="wse_emu").probe) == (1, 0)
    assert fresh(package.module("probe", SIMPLE, root="wse_emu").probe) == (0, 1)
    package.module("other", "VALUE = 2\n", root="wse_emu")
    assert fresh(package.module("probe", SIMPLE, root="wse_emu").probe) == (1, 0)


@compiles
def test_types_of_arguments_are_told_apart():
    pair, twisted = namedtuple("Pair", "row col"), namedtuple("Pair", "col row")
    x = np.zeros((2, 2), np.float32)
    locked = x.copy()
    locked.flags.writeable = False
    arrays = [x, x.T, x[:, :1], locked, x[0], x.astype(np.int64)]
    tuples = [(1, 2), (1, 2.0), ((1,), 2), pair(1, 2), twisted(1, 2), pair(1, 2.0)]
    values = [1, 1.0, np.float32(1), np.int32(1), True, None, *arrays, *tuples]
    texts = [_jit._describe_type(typeof(value)) for value in values]
    assert None not in texts
    assert len(set(texts)) == len(values)
    assert _jit._describe_type(typeof(kernel()(lambda x: x))) is None
    assert _jit._describe_type(typeof((1, kernel()(lambda x: x)))) is None


@pytest.mark.nojit
def test_stamp_follows_sources_and_versions(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1\n")
    one = _cache.hash_sources(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    two = _cache.hash_sources(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({one, two, _cache.hash_sources(tmp_path)}) == 3
    here = _cache.kernels_stamp()
    for package in ("numba", "llvmlite", "numpy"):
        with monkeypatch.context() as patch:
            patch.setattr(_cache, "version", lambda name, changed=package: "0" if name == changed else "1")
            other = _cache.kernels_stamp()
        assert other != here
    assert _cache.kernels_stamp() == here


@pytest.mark.nojit
def test_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WSE_EMU_CACHE_DIR", str(tmp_path))
    assert _cache.kernels_root() == tmp_path / "kernels"
    monkeypatch.delenv("WSE_EMU_CACHE_DIR")
    if sys.platform != "win32":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert _cache.kernels_root() == tmp_path / "xdg" / "wse-emu" / "kernels"
        monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
        assert _cache.kernels_root() == Path.home() / ".cache" / "wse-emu" / "kernels"


@pytest.mark.nojit
def test_old_stamps_are_listed_and_cleared_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("WSE_EMU_CACHE_DIR", str(tmp_path))
    assert _cache.cache_entries() == []
    current, old = _cache.kernels_stamp(), "0" * 24
    for stamp in (old, current):
        assert _cache.write_entry(_cache.kernels_root() / stamp / "probe.nbc", b"payload")
    foreign = _cache.kernels_root() / "my-notes" / "x.nbc"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    kept = _cache.kernels_root() / old / "README"
    kept.write_text("mine too")
    entries = _cache.cache_entries()
    assert [(e.stamp, e.n_files, e.is_current) for e in entries] == [(current, 1, True), (old, 1, False)]
    assert entries[0].size_bytes == entries[0].path.joinpath("probe.nbc").stat().st_size
    assert [e.stamp for e in _cache.clear_cache(keep_current=True)] == [old]
    assert [e.stamp for e in _cache.clear_cache()] == [current, old]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["README", "x.nbc"]


@compiles
def test_specialisations_of_drivers_are_counted_apart():
    @kernel(driver=True)
    def driver(x):
        for i in range(x.shape[0]):
            x[i] += 1

    before = compile_count()
    driver(np.zeros(4, np.float32))
    driver(np.zeros(5, np.float32))
    driver(np.zeros(4))
    after = compile_count()
    assert after.drivers - before.drivers == 2
    assert after.compiled - before.compiled == 2


@compiles
def test_body_that_allocates_does_not_compile():
    @kernel()
    def body(x):
        t = np.empty(4, np.float32)
        t[0] = x[0]
        return t[0]

    with pytest.raises(NumbaError, match="function empty"):
        body(np.zeros(4, np.float32))


@pytest.mark.nojit
def test_division_by_zero_gives_infinity():
    @kernel(cache=False)
    def body(x, out):
        out[0] = x[0] / x[1]

    out = np.zeros(1, np.float32)
    with np.errstate(divide="ignore"):
        body(np.array([1, 0], np.float32), out)
    assert out[0] == np.inf


@pytest.mark.nojit
def test_plain_gives_the_function_back():
    def body(x):
        return x

    compiled = kernel()(body)
    assert plain(compiled) is body
    assert compiled.py_func is body
    assert plain(plain) is plain
