"""Exit codes and the one line that an error becomes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wse_emu.cli.app import invoke
from wse_emu.cli.exits import EXIT_HELP, Exit, exit_code, message, report
from wse_emu.foundation import errors

CODES = {
    errors.WseError: Exit.INTERNAL,
    errors.SpecError: Exit.USAGE,
    errors.ConfigError: Exit.CHECKPOINT,
    errors.CheckpointError: Exit.CHECKPOINT,
    errors.StoreError: Exit.CHECKPOINT,
    errors.SaveError: Exit.CHECKPOINT,
    errors.InputError: Exit.USAGE,
    errors.PlacementError: Exit.DOES_NOT_FIT,
    errors.SramOverflowError: Exit.DOES_NOT_FIT,
    errors.SramStateError: Exit.INTERNAL,
    errors.UninitializedReadError: Exit.INTERNAL,
    errors.RouteError: Exit.INTERNAL,
    errors.KernelError: Exit.INTERNAL,
    errors.TraceError: Exit.USAGE,
    errors.BusyError: Exit.INTERNAL,
    errors.ForkError: Exit.INTERNAL,
    errors.TieError: Exit.USAGE,
    errors.NumberOverflowError: Exit.USAGE,
    KeyboardInterrupt: Exit.INTERRUPTED,
    BrokenPipeError: Exit.BROKEN_PIPE,
    PermissionError: Exit.CHECKPOINT,
    ZeroDivisionError: Exit.INTERNAL,
}


@pytest.mark.parametrize(("error", "code"), CODES.items(), ids=lambda x: getattr(x, "__name__", str(x)))
def test_every_error_has_its_code(error: type[BaseException], code: Exit) -> None:
    assert exit_code(error("x")) is code


def test_every_error_of_the_project_is_listed_above() -> None:
    ours = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.WseError)}
    assert ours <= set(CODES)


def test_help_names_every_code() -> None:
    for code in Exit:
        assert f"\n  {code.value} " in EXIT_HELP


def test_message_is_one_line() -> None:
    assert message(errors.InputError("first\n  second")) == "first second"


def test_error_without_text_is_named_by_its_class() -> None:
    assert message(errors.InputError()) == "InputError"


def test_an_error_of_our_own_asks_for_the_traceback() -> None:
    assert message(ZeroDivisionError("division by zero")).startswith(
        "ZeroDivisionError: division by zero (an error of wse-emu itself; run again"
    )


def test_traceback_only_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WSE_EMU_DEBUG", raising=False)
    assert report(errors.InputError("no")) is Exit.USAGE
    assert capsys.readouterr() == ("", "wse-emu: no\n")
    monkeypatch.setenv("WSE_EMU_DEBUG", "1")
    report(errors.InputError("no"))
    assert capsys.readouterr().err.endswith("wse_emu.foundation.errors.InputError: no\nwse-emu: no\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "--foo"], "No such option: --foo"),
        (["run", "--rows", "0"], "'--rows'"),
        (["run", "--executor", "gpu"], "'gpu' is not one of 'batched', 'isolated', 'interpreted'"),
        (["run", "--max-new-tokens", "many"], "'--max-new-tokens'"),
        (["plan"], "MODEL_OR_CONFIG"),
        (["paln"], "No such command 'paln'"),
        (["9" * 5000], f"No such command '{'9' * 99} (5002 characters);"),
        (["cache", "list"], "extra argument(s) (list); see wse-emu cache --help\n"),
        (["run", "--top-p", "2"], "`top_p` must lie in (0, 1], got 2.0"),
        (["run", "--temperature", "-1"], "`temperature` must be positive and finite, got -1.0"),
        (["run", "--prompt", "a", "--ids", "b"], "`--prompt` and `--ids` both say where to start"),
    ],
)
def test_bad_usage_is_one_line_and_two(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(arguments) == Exit.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.startswith("wse-emu: ")
    assert err.count("\n") == 1
    assert not any(clumsy in err for clumsy in ("..", ".;", "?;", "Value error"))


def test_missing_checkpoint_is_four(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["run", str(tmp_path)], ["verify", str(tmp_path)], ["plan", str(tmp_path)]):
        assert invoke(arguments) == Exit.CHECKPOINT
        assert capsys.readouterr().err.startswith(f"wse-emu: {tmp_path / 'config.json'}: ")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "-h"], ["verify", "--help"], ["plan", "--help"], ["cache", "--help"]])
def test_help_documents_the_exit_codes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(arguments) == Exit.OK
    assert "3    the model does not fit on the wafer" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import wse_emu

    assert invoke(["--version"]) == Exit.OK
    assert capsys.readouterr().out == f"wse-emu {wse_emu.__version__}\n"


def process(code: str, **environment: str) -> subprocess.Popen[bytes]:
    """A Python process that runs `code` with the packages of this repository."""
    root = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'kernels')!r}]\n{code}"
    words = [sys.executable, "-c", code]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment})


def left_by_its_reader(code: str) -> tuple[int, bytes]:
    """Exit code and stderr of a Python process whose stdout nobody reads."""
    child = process(code)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    error = child.stderr.read()
    child.stderr.close()
    return child.wait(timeout=60), error


@pytest.mark.parametrize("what", ["print('x' * 100000, flush=True)", "tables.console().print('x' * 100000)"])
def test_a_reader_that_leaves_is_no_error(what: str) -> None:
    code = (
        "from wse_emu.cli import run, tables\nfrom wse_emu.cli.entry import main\n"
        f"def read_request(*_):\n    {what}\n"
        "run.read_request = read_request\nsys.argv = ['wse-emu', 'run']\nmain()"
    )
    assert left_by_its_reader(code) == (Exit.BROKEN_PIPE, b"")


def test_text_that_the_terminal_cannot_show_is_escaped() -> None:
    code = (
        "from wse_emu.cli import run\nfrom wse_emu.cli.entry import main\n"
        "def read_request(*_):\n    print('na\\u00efve')\n    sys.exit(0)\n"
        "run.read_request = read_request\nsys.argv = ['wse-emu', 'run']\nmain()"
    )
    with process(code, PYTHONIOENCODING="ascii") as child:
        out, error = child.communicate(timeout=60)
    assert (child.returncode, out, error) == (0, b"na\\xefve\n", b"")


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_a_reader_that_leaves_before_a_command_is_no_error(word: str) -> None:
    code = f"from wse_emu.cli.entry import main\nsys.argv = ['wse-emu', {word!r}]\nmain()"
    assert left_by_its_reader(code) == (Exit.BROKEN_PIPE, b"")


def test_interruption_before_a_command_is_told_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupting:
        def __format__(self, spec: str) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("wse_emu.cli.app.__version__", Interrupting())
    assert invoke(["--version"]) == Exit.INTERRUPTED
    assert capsys.readouterr().err.strip() == "wse-emu: interrupted"
