"""The README and the docs say what is true: the example's output, the commands, the ledger's schema."""

from __future__ import annotations

import json
import re
import subprocess
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

import wse_emu as wse
from wse_emu import reports, testing
from wse_emu.cli.app import app, invoke
from wse_emu.cli.exits import Exit
from wse_emu.cli.options import shipped_model
from wse_emu.memoryx import build
from wse_emu.wafer.ledger import KINDS, SCHEMA_VERSION, Event

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PROGRAMS = {"README.md": 1, "docs/models.md": 2, "docs/quick-start.md": 7, "docs/routing.md": 3}
"""Pages whose Python blocks are one program, and how many of them say what they print."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of every block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_of_a_page_prints_what_the_page_says(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cache_directory", lambda cache_dir=None: tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace, printed, compared = {"__name__": "page"}, "", 0
    for language, text in blocks(ROOT / name):
        if language == "python":
            exec(compile(text, name, "exec"), namespace)
            printed = capsys.readouterr().out
        elif language == "text":
            assert printed == text
            compared += 1
    assert compared == PROGRAMS[name]


def test_every_page_with_python_is_run_by_some_test() -> None:
    elsewhere = {"docs/ledger.md", "docs/adding-a-family.md", "docs/reports.md"}  # below, and in tests/reports/test_page.py
    with_python = {str(page.relative_to(ROOT)) for page in PAGES if any(language == "python" for language, _ in blocks(page))}
    assert with_python == elsewhere | set(PROGRAMS)


def test_program_of_the_ledger_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wafer = wse.Wafer(wse.WSE3, rows=2, cols=2)
    wafer.place(np.ones((2, 2), np.float32))
    (code,) = (text for language, text in blocks(DOCS / "ledger.md") if language == "python")
    exec(compile(code, "ledger.md", "exec"), {"wafer": wafer})
    assert json.loads((tmp_path / "ledger.json").read_text(encoding="utf-8"))["schema"] == SCHEMA_VERSION


def test_declarations_on_the_page_about_families_are_those_that_run() -> None:
    files = sorted((ROOT / "wse_emu" / "checkpoint" / "families").glob("*.py"))
    source = " ".join(" ".join(file.read_text(encoding="utf-8") for file in files).split())
    pieces = [piece for language, text in blocks(DOCS / "adding-a-family.md") if language == "python" for piece in text.split("\n\n\n")]
    assert len(pieces) == 4
    for piece in pieces:
        assert " ".join(piece.split()) in source, piece
    declared = [piece for piece in pieces[:3] if piece]
    assert sum(len(piece.splitlines()) for piece in declared) < 50


def test_reference_has_every_public_name() -> None:
    """Of the package, and of every module that the reference names."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    listed = re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    for name in listed:
        assert resolves(name), name
    homes = {f"{home}.{name}" for home, names in wse._HOME.items() for name in names}
    covered = {name for name in homes if name in listed or name.rpartition(".")[0] in listed}
    assert sorted(homes - covered) == []
    for package in (reports, testing):
        for name in package.__all__:
            home = getattr(getattr(package, name), "__module__", "wse_emu.reports.trace")  # a constant does not know its home
            assert home in listed or f"{home}.{name}" in listed, name
    bodies = {f"wse_kernels.{path.stem}" for path in (ROOT / "kernels" / "wse_kernels").glob("[a-z]*.py") if public_bodies(path)}
    assert sorted(bodies - set(listed)) == []


def public_bodies(path: Path) -> list[str]:
    """Kernels of a file that are not private."""
    return re.findall(r"^@kernel\([^)]*\)\ndef ([a-z]\w*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def resolves(name: str) -> bool:
    """Whether a dotted name leads to a module, or to something in one."""
    try:
        import_module(name)
    except ModuleNotFoundError:
        module, _, member = name.rpartition(".")
        return hasattr(import_module(module), member)
    return True


def test_navigation_has_every_page() -> None:
    named = re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"\bmake ([a-z-]+)\b(?= |`|$)", "\n".join(code_of(page)))) <= targets


def code_of(page: Path) -> list[str]:
    """Code spans and blocks of a page."""
    return re.findall(r"```.*?```|`[^`\n]+`", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_commands_of_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    assert known == {"run", "verify", "plan", "sparsify", "cache"}
    for command in re.findall(r"^`?wse-emu ([a-z]+)", "\n".join(code_of(ROOT / "README.md")), flags=re.MULTILINE):
        assert invoke([command, "--help"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def table(text: str, head: str) -> list[str]:
    """First cells, code spans, of the table below a heading."""
    section = text.partition(f"## {head}")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([a-z_]+)` \|", section, flags=re.MULTILINE)


def test_ledger_page_has_every_field_and_kind() -> None:
    text = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    assert table(text, "Fields of an event") == list(Event._fields)
    assert sorted(table(text, "Kinds")) == sorted(KINDS)
    assert f"## Fields of an event (schema {SCHEMA_VERSION})" in text


def test_command_line_page_has_every_key_of_every_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cache_directory", lambda cache_dir=None: tmp_path)
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    listed: dict[str, list[str]] = {command: [] for command in ("run", "verify", "plan", "sparsify", "cache")}
    for keys, commands in re.findall(r"^\| (`[a-z_`, ]+`) \| ([a-z, ]+) \|", text.partition("## JSON documents")[2], flags=re.MULTILINE):
        for command in listed if commands == "all" else commands.split(", "):
            listed[command] += re.findall(r"`([a-z_]+)`", keys)
    words = {"run": ["--max-new-tokens", "1", "--no-verify"], "verify": [], "plan": [str(shipped_model())], "cache": []}
    words["sparsify"] = ["--prompt", "Return the object", "--rows", "4"]
    for command, more in words.items():
        assert invoke([command, *more, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert sorted(listed[command]) == sorted(document), command
        assert f"## JSON documents (schema {document['schema']})" in text
        if command == "plan":
            assert ", ".join(f"`{key}`" for key in document["plan"]) in text


@pytest.mark.slow
def test_published_sizes_of_keys_and_values_are_what_plan_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama-3.1-8B, dense and with 25 and 28 of its 32 layers sparse."""
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = DOCS / "number-formats.md"
    (said,) = (text for language, text in blocks(page) if language == "console")
    sizes = []
    for command, answer in re.findall(r"^\$ wse-emu (.*)\n(.*)$", said, flags=re.MULTILINE):
        assert invoke(command.split()) == 0
        assert f"\n{answer}\n" in capsys.readouterr().out
        sizes += re.findall(r"\((.*? GB)", answer)
    assert sizes == ["2.1475 GB", "1.3757 GB", "1.2751 GB"]
    assert re.findall(r"^\| 16 bits.*\| (.*?) \|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE) == sizes


def test_command_line_page_has_every_exit_code() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    assert [int(n) for n in re.findall(r"(?:^|; )(\d+)\s", " ".join(text.split("An error is")[0].split()))] == [code.value for code in Exit]


def test_makefile_explains_itself() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make run" in done.stdout
    assert "make test" in done.stdout


def test_pictures_are_what_the_emulator_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script draws the committed files again, byte by byte, and every file is shown on some page."""
    spec = spec_from_file_location("make_pictures", ROOT / "tools" / "make_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(build, "cache_directory", lambda cache_dir=None: tmp_path)
    module.main(tmp_path / "pictures")
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {path.name: path.read_bytes() for path in (DOCS / "pictures").iterdir()}
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"(pictures/{name})" in pages for name in drawn)
