"""What is shipped: import cost, the lazy face, and the wheel seen from an empty environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("numba", "llvmlite", "scipy", "numpy", "torch", "safetensors", "tokenizers", "typer", "rich")


def python(code: str, *, cwd: Path | None = None, interpreter: str = sys.executable, **env: str) -> str:
    """Run `code` in a fresh interpreter and return what it wrote."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [interpreter, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import wse_emu; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(5)) < 0.3


def test_import_loads_nothing_heavy() -> None:
    loaded = json.loads(python("import json, sys, wse_emu; print(json.dumps(sorted(sys.modules)))"))
    assert [name for name in HEAVY if name in loaded] == []


def test_help_loads_no_numba() -> None:
    code = (
        "import sys\nfrom wse_emu.cli.entry import main\nsys.argv = ['wse-emu', 'run', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\nassert 'numba' not in sys.modules"
    )
    assert "--max-new-tokens" in python(code, COLUMNS="120")


def test_every_public_name_can_be_had() -> None:
    import wse_emu as wse

    assert sorted(wse.__all__) == sorted(set(wse.__all__))
    for name in wse.__all__:
        assert getattr(wse, name) is not None
        assert name in dir(wse)


def test_unknown_name_is_an_attribute_error() -> None:
    import wse_emu as wse

    with pytest.raises(AttributeError, match="module 'wse_emu' has no attribute 'Waver'"):
        wse.Waver  # noqa: B018


def test_version_is_that_of_the_changelog() -> None:
    import wse_emu as wse

    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == wse.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout without the network."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=ROOT, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_both_packages_and_the_model(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"wse_emu", "wse_kernels"}
    assert {"wse_emu/py.typed", "wse_kernels/py.typed"} <= set(names)
    shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT / "wse_emu" / "data").rglob("*") if p.is_file()}
    assert shipped
    assert shipped <= set(names)


@pytest.mark.slow
def test_wheel_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    interpreter = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # The dependencies come from this interpreter: a plain path line, so that its own .pth files (an editable install) are not followed.
    import numpy

    (site / "dependencies.pth").write_text(str(Path(numpy.__file__).parents[1]) + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = python(
        "import wse_emu, wse_kernels; print(wse_emu.__file__, wse_kernels.__file__)",
        cwd=elsewhere, interpreter=str(interpreter), PYTHONPATH="",
    )  # fmt: skip
    assert all(Path(p).is_relative_to(site) for p in where.split())
    command = [str(interpreter), "-m", "wse_emu", "run", "--max-new-tokens", "2", "--json"]
    env = {**os.environ, "PYTHONPATH": "", "WSE_EMU_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verification"]["passed"] is True
