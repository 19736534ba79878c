"""Command lines and configurations of any values: an answer or one line and an exit code, in bounded time; never a traceback.

The cases are few by default; ``HYPOTHESIS_PROFILE=thorough`` does thousands.
"""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.cli.app import invoke
from wse_emu.cli.exits import Exit
from wse_emu.memoryx import build

from .bases import CONFIGS, IDS, small_wafer, write_base
from .damage import KEYS, plausible, values
from .watch import listing, watched_opens

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
CASES = 1000 if THOROUGH else 30

words = st.one_of(
    st.integers(-3, 9).map(str),
    st.sampled_from(["0", "1e3", "-0", "nan", "inf", "-inf", "", " ", "0x10", "9" * 30, "9" * 5000, "1.5", "True", "٣", "é", "-", "--"]),
    st.sampled_from(["batched", "isolated", "dry", "wse2", "wse3", "activated", "all", "float32"]),
    st.sampled_from(["switch", "reject", "{}", '{"n_group": 3}']),
    st.text(max_size=5),
)  # fmt: skip
files = st.sampled_from(["ids", "absent", ".", "model", "model/config.json", "binary", "/dev/null", "/proc/1/mem", "", "\udcff"])
OPTIONS = {
    "plan": (
        "--rows", "--cols", "--prompt-tokens", "--new-tokens", "--batch", "--wafer", "--prefill-chunk", "--routing", "--bta-max-tile",
        "--json",
    ),
    "run": (
        "--prompt", "--ids", "--max-new-tokens", "--rows", "--cols", "--wafer", "--executor", "--temperature", "--top-k", "--top-p",
        "--seed", "--stream-experts", "--prefill-chunk", "--verify", "--no-verify", "--json",
    ),
    "verify": (
        "--prompt", "--ids", "--rows", "--cols", "--wafer", "--executor", "--prefill-chunk", "--routing", "--tie-policy",
        "--moe-implementation", "--bta-max-tile", "--json",
    ),
    "cache": ("--json", "--help"),
}  # fmt: skip
FLAGS = ("--json", "--verify", "--no-verify", "--help")


def of_options(names: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    """Some options, each with a word."""
    pairs: list[st.SearchStrategy[list[str]]] = []
    for name in names:
        word = files if name == "--ids" else words
        pairs.append(st.just([name]) if name in FLAGS else st.tuples(st.just(name), word).map(list))
    return st.lists(st.one_of(pairs), max_size=4).map(lambda found: [word for pair in found for word in pair])


lines = st.one_of(
    [st.tuples(st.just(name), st.one_of(st.just("model"), files, words), of_options(OPTIONS[name])) for name in ("plan", "run", "verify")]
    + [st.tuples(st.just("cache"), st.none(), of_options(OPTIONS["cache"])), st.tuples(words, st.none(), of_options(OPTIONS["run"]))]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("options")
    write_base("llama", root / "model")
    (root / "ids").write_text(" ".join(map(str, IDS)))
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "cache").mkdir()
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setattr(build, "cache_directory", lambda cache_dir=None: place / "cache" / "weights")
    monkeypatch.setattr("sys.stdin", io.StringIO("3 14 15"))
    return place


@pytest.mark.slow
@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(line=lines)
def test_any_command_line_is_answered_or_refused_in_one_line(here: Path, line: tuple[str, str | None, list[str]]) -> None:
    command, model, options = line
    small = ["--rows", "2", "--cols", "2"] if command in ("run", "verify", "plan") else []
    arguments = [command, *([] if model is None else [model]), *small, *options, *(["--max-new-tokens", "2"] if command == "run" else [])]
    before = listing(here)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, watched_opens(here):
        code = invoke(arguments)
    said = err.getvalue()
    assert code in {Exit.OK, Exit.VERIFICATION_FAILED, Exit.USAGE, Exit.DOES_NOT_FIT, Exit.CHECKPOINT}, f"{arguments}: {code}: {said}"
    if code in (Exit.USAGE, Exit.CHECKPOINT):
        assert said.startswith("wse-emu: "), said
        assert said.count("\n") == 1, said
        assert len(said) < 2000, said
        assert out.getvalue() == ""
    elif "--json" in options and "--help" not in options:
        assert json.loads(out.getvalue() or "{}") is not None
    made = listing(here).keys() - before.keys()
    assert all(str(here / "cache" / "weights") in path for path in made), made


@pytest.mark.slow
@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(list(CONFIGS)),
    changes=st.lists(st.one_of(plausible, st.tuples(st.sampled_from(KEYS), values)), min_size=1, max_size=3).map(dict),
)
def test_any_configuration_runs_rightly_or_is_refused(kind: str, changes: dict[str, Any]) -> None:
    """With random weights, so that shapes may be anything; what does not fit a small grid is refused as well."""
    said = ""
    try:
        with watched_opens(Path("/nonexistent")):
            model = wse.from_config({**CONFIGS[kind], **changes}, wafer=small_wafer())
            ids = [i % model.spec.vocab_size for i in IDS][: model.spec.context_length]
            if model.spec.n_params < 1 << 20:
                assert model.verify(ids).passed or not np.isfinite(model(ids).logits).all()
                model.generate(ids[:1], 1)
            else:
                with pytest.raises(wse.SramOverflowError):
                    wse.from_config(model.spec, wafer=wse.Wafer(rows=1, cols=1, executor="dry"))([0] * len(ids))
    except wse.WseError as e:
        said = str(e)
    assert len(said) < 1500
