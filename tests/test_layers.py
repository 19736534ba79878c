"""Which way imports point: a module imports only from lower ranks, or from its own room."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS: dict[str, tuple[int, str]] = {
    "wse_kernels": (0, "kernels"),
    "wse_emu.foundation": (1, "foundation"),
    "wse_emu.wafer": (2, "wafer"),
    "wse_emu.reference": (2, "reference"),
    "wse_emu.checkpoint": (2, "checkpoint"),
    "wse_emu.memoryx": (3, "memoryx"),
    "wse_emu.swarmx": (3, "swarmx"),
    "wse_emu.layers": (4, "layers"),
    "wse_emu.engine": (5, "engine"),
    "wse_emu.sampling": (5, "engine"),
    "wse_emu.equivalence": (6, "equivalence"),
    "wse_emu.equivalence.report": (5, "findings"),
    "wse_emu.doctor": (6, "doctor"),
    "wse_emu.reports": (6, "reports"),
    "wse_emu.model": (7, "face"),
    "wse_emu.testing": (7, "face"),
    "wse_emu.cli": (7, "face"),
    "wse_emu.__main__": (7, "face"),
    "wse_emu": (7, "face"),
}
"""Package or module to its rank and room; the longest name that fits decides."""

THIRD_PARTY: dict[str, set[str]] = {
    "kernels": {"numpy", "numba", "llvmlite"},
    "foundation": {"numpy"},
    "reference": {"numpy", "scipy"},
}
"""What else a room may import, where that is bounded."""

OWN = ("wse_emu", "wse_kernels")


def room_of(module: str) -> tuple[int, str]:
    """Rank and room of a module of ours.

    >>> room_of("wse_emu.wafer.ledger")
    (2, 'wafer')
    """
    name = module
    while name:
        if name in ROOMS and (name != "wse_emu" or module == "wse_emu"):
            return ROOMS[name]
        name = name.rpartition(".")[0]
    raise LookupError(f"{module} lies in no room: give it one in tests/test_layers.py")


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every module under `root`, a checkout."""
    for base, package in ((root, "wse_emu"), (root / "kernels", "wse_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path, modules: set[str]) -> Iterator[str]:
    """Absolute names that a file imports, wherever in the file; relative imports raise."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{path.name}:{node.lineno} imports relatively; imports are absolute")
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)


def violations(root: Path) -> list[str]:
    """One sentence per import that breaks the rule."""
    found = dict(sources(root))
    bad = []
    for module, path in found.items():
        rank, room = room_of(module)
        for target in imports(path, set(found)):
            top = target.partition(".")[0]
            if top in OWN:
                target_rank, target_room = room_of(target)
                if target_room != room and (target_rank >= rank or (room == "reference" and target_room != "foundation")):
                    bad.append(f"{module} (rank {rank}) imports {target} (rank {target_rank})")
            elif room in THIRD_PARTY and top not in THIRD_PARTY[room] and top not in sys.stdlib_module_names:
                bad.append(f"{module} imports {target}; {room} may import only {', '.join(sorted(THIRD_PARTY[room]))}")
    return bad


def test_imports_point_downwards() -> None:
    assert violations(ROOT) == []


def test_every_module_lies_in_a_room() -> None:
    names = [name for name, _ in sources(ROOT)]
    assert "wse_emu" in names
    for name in names:
        room_of(name)


def test_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("package", ["wse_emu", "kernels/wse_kernels"])
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


def checkout(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in {"wse_emu/__init__.py": "", "wse_emu/layers/__init__.py": "", "kernels/wse_kernels/__init__.py": "", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("wse_emu/foundation/a.py", "from wse_emu.layers import x", "wse_emu.foundation.a (rank 1) imports wse_emu.layers (rank 4)"),
        ("wse_emu/foundation/a.py", "def f():\n    import wse_emu.layers", "wse_emu.foundation.a (rank 1) imports wse_emu.layers (rank 4)"),
        ("wse_emu/wafer/a.py", "import wse_emu.checkpoint", "wse_emu.wafer.a (rank 2) imports wse_emu.checkpoint (rank 2)"),
        ("wse_emu/wafer/a.py", "from wse_emu import layers", "wse_emu.wafer.a (rank 2) imports wse_emu.layers (rank 4)"),
        ("wse_emu/engine/a.py", "import wse_emu as wse", "wse_emu.engine.a (rank 5) imports wse_emu (rank 7)"),
        ("wse_emu/reference/a.py", "import wse_kernels", "wse_emu.reference.a (rank 2) imports wse_kernels (rank 0)"),
        ("wse_emu/reference/a.py", "import numba", "wse_emu.reference.a imports numba; reference may import only numpy, scipy"),
        ("kernels/wse_kernels/a.py", "import scipy", "wse_kernels.a imports scipy; kernels may import only llvmlite, numba, numpy"),
    ],
)
def test_a_wrong_import_is_named(tmp_path: Path, file: str, line: str, message: str) -> None:
    assert violations(checkout(tmp_path, {file: line})) == [message]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("wse_emu/engine/a.py", "from wse_emu.sampling import Sampler\nfrom wse_emu import layers\nimport wse_kernels\nimport scipy"),
        ("wse_emu/cli/a.py", "from wse_emu.model import from_pretrained\nimport wse_emu"),
        ("wse_emu/reference/a.py", "from wse_emu.foundation.taps import TapRecord\nimport math, scipy.special"),
    ],
)
def test_a_right_import_passes(tmp_path: Path, file: str, line: str) -> None:
    assert violations(checkout(tmp_path, {file: line})) == []


def test_relative_imports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"a\.py:2 imports relatively"):
        violations(checkout(tmp_path, {"wse_emu/wafer/a.py": "import math\nfrom . import b"}))


def test_a_module_without_a_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"wse_emu\.attic\.a lies in no room"):
        violations(checkout(tmp_path, {"wse_emu/attic/a.py": ""}))
