"""The README and the docs say what is true: the example's output, the commands, the ledger's schema."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from wse_emu.cli.app import app, invoke
from wse_emu.cli.exits import Exit
from wse_emu.cli.options import shipped_model
from wse_emu.memoryx import build
from wse_emu.wafer.ledger import KINDS, SCHEMA_VERSION, Event

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_example_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    (expected,) = blocks("text")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == expected


def test_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"\bmake ([a-z-]+)\b(?= |`|$)", "\n".join(code_of(page)))) <= targets


def code_of(page: Path) -> list[str]:
    """Code spans and blocks of a page."""
    return re.findall(r"```.*?```|`[^`\n]+`", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_commands_of_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    assert known == {"run", "verify", "plan", "cache"}
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
    listed: dict[str, list[str]] = {command: [] for command in ("run", "verify", "plan", "cache")}
    for keys, commands in re.findall(r"^\| (`[a-z_`, ]+`) \| ([a-z, ]+) \|", text.partition("## JSON documents")[2], flags=re.MULTILINE):
        for command in listed if commands == "all" else commands.split(", "):
            listed[command] += re.findall(r"`([a-z_]+)`", keys)
    words = {"run": ["--max-new-tokens", "1", "--no-verify"], "verify": [], "plan": [str(shipped_model())], "cache": []}
    for command, more in words.items():
        assert invoke([command, *more, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert sorted(listed[command]) == sorted(document), command
        assert f"## JSON documents (schema {document['schema']})" in text
        if command == "plan":
            assert ", ".join(f"`{key}`" for key in document["plan"]) in text


def test_command_line_page_has_every_exit_code() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    assert [int(n) for n in re.findall(r"(?:^|; )(\d+)\s", " ".join(text.split("An error is")[0].split()))] == [code.value for code in Exit]


def test_makefile_explains_itself() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make run" in done.stdout
    assert "make test" in done.stdout
