"""Checkpoints with anything wrong in them: a named error, or the right answer; nothing else is opened, left behind or waited for.

300 cases by default; ``HYPOTHESIS_PROFILE=thorough`` does 5,000. What became of them is written at the end (``-s`` shows it).
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.checkpoint import published_names
from wse_emu.cli.app import invoke
from wse_emu.cli.exits import Exit
from wse_emu.memoryx import build

from .bases import CONFIGS, IDS, PROMPT, small_wafer, write_base
from .damage import LAYOUT_STEPS, STEPS, apply, apply_to_layout
from .watch import watched, watched_opens

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
MESSAGE_LENGTH = 1500
SQUARES_OVERFLOW = 1e18
"""Values of this size have squares that a float32 sum cannot hold: as in any float32 model, a norm then gives 0, and products infinity."""
SCORES_BLUR = 1e7
"""Attention scores of this size are rounded to whole numbers: their exponential says nothing any more."""
BEYOND = "values beyond float32; the verification names the stage"
CODES = {int(code) for code in (Exit.OK, Exit.VERIFICATION_FAILED, Exit.USAGE, Exit.DOES_NOT_FIT, Exit.CHECKPOINT)}


class Field:
    """Directories of one run, and what became of the cases."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.wafer = small_wafer()
        self.outcomes: Counter[str] = Counter()
        self.bases = {kind: write_base(kind, root / "bases" / kind) for kind in CONFIGS}
        self.logits: dict[str, np.ndarray] = {}
        self.tensors: dict[str, dict[str, np.ndarray]] = {}
        self.specs: dict[str, wse.ModelSpec] = {}
        for kind, directory in self.bases.items():
            model = wse.from_pretrained(directory, wafer=self.wafer, cache_dir=root / "first")
            self.specs[kind] = model.spec
            self.logits[kind] = model(IDS).logits
            assert model.verify(IDS).passed
            self.tensors[kind] = {t.name: model.checkpoint.tensors.read(t.name) for t in published_names(model.spec).values()}

    def fresh(self, kind: str) -> Path:
        """A valid checkpoint to damage, beside a directory that nobody may look into."""
        case = self.root / "case"
        shutil.rmtree(case, ignore_errors=True)
        (case / "outside").mkdir(parents=True)
        (case / "cache").mkdir()
        (case / "ids").write_text(" ".join(map(str, IDS)))
        for name in ("secret", "secret.safetensors"):
            (case / "outside" / name).write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        shutil.copytree(self.bases[kind], case / "model")
        return case / "model"


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    made = Field(tmp_path_factory.mktemp("fuzz"))
    yield made
    total = sum(n for name, n in made.outcomes.items() if name.startswith("library"))
    print(f"\n{total} damaged checkpoints:")
    for name, n in sorted(made.outcomes.items()):
        print(f"  {n:6} {name}")


def told(error: BaseException, directory: Path) -> str:
    """Check what an error says; returns its name."""
    text = str(error)
    assert str(directory) in text or directory.name in text, f"no file is named: {text}"
    assert len(text) < MESSAGE_LENGTH, f"{len(text)} characters: {text[:300]}"
    assert "\n" not in text or isinstance(error, wse.SramOverflowError)
    return type(error).__name__


def beyond(stage: str, values: np.ndarray) -> bool:
    """Whether a stage holds values for which float32 is no arithmetic to compare with float64."""
    if values.dtype.kind != "f" or not values.size:
        return False
    return not float(np.abs(values).max()) < (SCORES_BLUR if stage == "attn_max" else SQUARES_OVERFLOW)


def answer(field: Field, kind: str, directory: Path) -> str:
    """Open and run; a right answer has the bits of the undamaged model, or agrees with the reference."""
    model = wse.from_pretrained(directory, wafer=field.wafer, cache_dir=directory.parent / "cache")
    try:
        ids = [i % model.spec.vocab_size for i in IDS][: model.spec.context_length]
        out = model(ids)
        same = model.spec == field.specs[kind] and all(
            np.array_equal(model.checkpoint.tensors.read(name).view(np.uint32), value.view(np.uint32))
            for name, value in field.tensors[kind].items()
        )
        if same:
            np.testing.assert_array_equal(out.logits.view(np.uint32), field.logits[kind].view(np.uint32))
            return "the bits of the undamaged model"
        if model.verify(ids).passed and np.isfinite(out.logits).all():
            return "another model, agrees with the reference"
        assert any(beyond(stage, values) for (_, stage), values in model.record(ids).stages.items()), f"{model.verify(ids)}"
        return BEYOND
    finally:
        model.close()
        model.checkpoint.close()


def command(words: list[str]) -> tuple[int, Any]:
    """Run a command line: its exit code, and the document if it wrote one; an error is one line and nothing on stdout."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = invoke(words)
    said = err.getvalue()
    assert code in CODES, f"{words}: exit code {code}: {said}"
    if code in (Exit.OK, Exit.VERIFICATION_FAILED) or (code == Exit.DOES_NOT_FIT and out.getvalue()):
        assert not said, said
        return code, json.loads(out.getvalue())
    assert out.getvalue() == ""
    assert said.startswith("wse-emu: "), said
    assert said.count("\n") == 1, said
    assert len(said) < MESSAGE_LENGTH, said
    return code, None


def judge(field: Field, kind: str, steps: list[tuple[Any, ...]], told_by: str, prompt: bool) -> None:
    """Damage a checkpoint, open and run it, then plan, run or verify it from the command line."""
    directory = field.fresh(kind)
    apply(directory, steps)
    cache = directory.parent / "cache" / "weights"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "cache_directory", lambda cache_dir=None: cache)
        with watched(directory.parent, cache):
            try:
                outcome = answer(field, kind, directory)
                refused = False
            except wse.WseError as e:
                outcome, refused = told(e, directory), True
        field.outcomes[f"library: {'refused, ' if refused else ''}{outcome}"] += 1
        assert not field.wafer.sram.live
        field.wafer = small_wafer()  # an empty ledger
        start = ["--prompt", PROMPT] if prompt else ["--ids", str(directory.parent / "ids")]
        words = {
            "plan": ["--prompt-tokens", "5", "--new-tokens", "2"],
            "run": [*start, "--max-new-tokens", "2", "--no-verify"],
            "verify": start,
        }[told_by]
        with watched(directory.parent, cache):
            code, _ = command([told_by, str(directory), *words, "--rows", "2", "--cols", "2", "--json"])
        field.outcomes[f"{told_by}: {Exit(code).name}"] += 1
        if told_by != "plan":
            assert not (refused and code in (Exit.OK, Exit.VERIFICATION_FAILED)), "the command took what the library refuses"
            assert outcome == BEYOND or code != Exit.VERIFICATION_FAILED


CASES = 5000 if THOROUGH else 300


@pytest.mark.slow
@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    kind=st.sampled_from(list(CONFIGS)), steps=st.lists(STEPS, min_size=1, max_size=3), told_by=st.sampled_from(["plan", "run", "verify"]),
    prompt=st.booleans(),
)  # fmt: skip
@example(kind="mixtral", steps=[], told_by="run", prompt=True)
@example(kind="llama", steps=[], told_by="verify", prompt=False)
def test_a_damaged_checkpoint_is_refused_by_name_or_answers_rightly(
    field: Field, kind: str, steps: list[tuple[Any, ...]], told_by: str, prompt: bool
) -> None:
    judge(field, kind, steps, told_by, prompt)


@pytest.mark.slow
@settings(max_examples=CASES // 8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(step=LAYOUT_STEPS, during=st.one_of(st.none(), st.integers(0, 6)), kind=st.sampled_from(list(CONFIGS)))
def test_a_damaged_layout_file_is_made_again_or_refused(field: Field, step: tuple[Any, ...], during: int | None, kind: str) -> None:
    """Damaged between two runs it is made again; while it is in use, `during` layers after the start, the run is refused or right."""
    directory = field.fresh(kind)
    cache = directory.parent / "cache"
    model = wse.from_pretrained(directory, wafer=field.wafer, cache_dir=cache)
    if during is None:
        model.close()
        apply_to_layout(model.store.path, step)
    else:
        drop, n = model.store.drop, 0

        def drop_and_damage(names: list[str]) -> None:
            nonlocal n
            drop(names)
            if n == during:
                apply_to_layout(model.store.path, step)
            n += 1

        model.store.drop = drop_and_damage
        with watched_opens(directory.parent):
            try:
                np.testing.assert_array_equal(model(IDS).logits, field.logits[kind])
                outcome = "in use, right all the same"
            except wse.StoreError as e:
                outcome = "in use, refused" if "open the model again" in str(e) else f"in use, {e}"
        assert outcome in ("in use, refused", "in use, right all the same")
        field.outcomes[f"layout file: {outcome}"] += 1
        model.close()
        assert not field.wafer.sram.live
    with watched_opens(directory.parent):
        again = wse.from_pretrained(directory, wafer=field.wafer, cache_dir=cache)
        np.testing.assert_array_equal(again(IDS).logits, field.logits[kind])
        again.close()
    field.outcomes["layout file: opened again, right"] += 1
    assert [p.suffix for p in (cache / "weights").iterdir()] == [".wsew"]
    assert not (directory.parent / "cache" / "weights" / "nothing").exists()
