"""Which mistakes the golden files catch: transformers run with one mistake at a time, its answers held against the files.

A file catches a mistake if greedy tokens or chosen experts change, or if some logit moves by more than `CAUGHT`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from golden_mistakes import MISTAKES, Mistake, Subject
from golden_models import CHECKPOINTS, Config
from golden_oracle import consult, load
from numpy.typing import NDArray

CAUGHT = 2e-4
"""In standard deviations of the logits: twice the tolerance of the tests, for an implementation with the mistake may itself lie one
tolerance away from transformers with the mistake."""
SAME = 1e-5
"""Likewise: what the rounding of another processor may do to transformers without a mistake."""
FILES = ("config.json", "model.safetensors", "golden.npz")

Golden = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Measured:
    """What a mistake does to one golden file."""

    error: float
    """Largest of any case: difference of a logit in standard deviations of the case's logits."""
    tokens: int
    """Greedy tokens that differ."""
    choices: int | None
    """Tokens times layers whose chosen experts differ; None without experts."""

    @property
    def caught(self) -> bool:
        """Whether tests that compare with the file fail."""
        return not self.error <= CAUGHT or bool(self.tokens) or bool(self.choices)

    def __str__(self) -> str:
        counts = "" if self.choices is None else f" / {self.choices}"
        text = f"{self.error:.1e} / {self.tokens}{counts}"
        return text if self.caught else f"**missed** {text}"


@torch.no_grad()
def measure(model: Any, golden: Golden) -> Measured:
    """Hold a model's answers to every case against a golden file."""
    error, tokens, choices = 0.0, 0, 0
    for case in sorted({key.partition(".")[0] for key in golden if "." in key}):
        ids, mask, logits, generated = (golden[f"{case}.{name}"] for name in ("input_ids", "attention_mask", "logits", "generated"))
        oracle = consult(model, torch.from_numpy(ids), torch.from_numpy(mask), new_tokens=generated.shape[1] - ids.shape[1])
        real = mask.astype(bool)
        difference = np.abs(oracle.logits.numpy()[real] - logits[real]).max() / logits[real].std(dtype=np.float64)
        error = max(error, float(difference) if np.isfinite(difference) else float("inf"))
        tokens += int((oracle.generated.numpy() != generated).sum())
        if oracle.topk_ids is not None:
            choices += int((oracle.topk_ids.numpy() != golden[f"{case}.topk_ids"]).any(-1)[:, real].sum())
    return Measured(error, tokens, choices if "t1.topk_ids" in golden else None)


def measure_mistake(wrong: Mistake, directory: Path, config: Config, golden: Golden) -> Measured:
    """Make a mistake in a checkpoint, and measure it."""
    with ExitStack() as undo, torch.no_grad():
        model = load(directory, wrong.changes(config))
        wrong.spoil(Subject(model, config, undo))
        return measure(model, golden)


def fingerprint(directory: Path) -> str:
    """Sixteen hexadecimal digits that change with the files of a checkpoint."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(hashlib.sha256((directory / name).read_bytes()).digest())
    return digest.hexdigest()[:16]


def rows(names: list[str], out: Path) -> list[str]:
    """Lines of the table of one family; fails if a right model does not give the files, or no file catches a mistake."""
    configs = {name: json.loads((out / name / "config.json").read_text(encoding="utf-8")) for name in names}
    golden: dict[str, Golden] = {}
    for name in names:
        with np.load(out / name / "golden.npz", allow_pickle=False) as file:
            golden[name] = dict(file)
        nothing = measure(load(out / name), golden[name])
        if nothing.error > SAME or nothing.tokens or nothing.choices:
            raise SystemExit(f"{name}: transformers without a mistake does not give what the file holds: {nothing}")
    family = configs[names[0]]["model_type"]
    short = [name.removeprefix(f"{family}-") for name in names]
    lines = [f"## {family}", "", "| mistake | " + " | ".join(short) + " |", "|---" * (len(names) + 1) + "|"]
    lines.append("| *files* | " + " | ".join(f"`{fingerprint(out / name)}`" for name in names) + " |")
    for wrong in MISTAKES:
        found = {n: measure_mistake(wrong, out / n, c, golden[n]) for n, c in configs.items() if wrong.applies(c)}
        if found and not any(m.caught for m in found.values()):
            raise SystemExit(f"{family}: no file catches {wrong.name!r}: {', '.join(f'{n} {m}' for n, m in found.items())}")
        if found:
            lines.append(f"| {wrong.name} | " + " | ".join(str(found.get(name, "not applicable")) for name in names) + " |")
    return lines


def head() -> str:
    """What stands above the tables."""
    return f"""# What the golden files catch

Made by `python tools/make_golden.py` (`tools/golden_mistakes/`), with transformers {transformers.__version__}: each row is
transformers with one mistake, run on what the files hold. A cell gives the largest difference of a logit in standard deviations of its
case's logits / how many greedy tokens differ / for how many tokens and layers other experts are chosen. Two numbers: the model has no
experts. A file catches a mistake if either count is not zero or the difference is above {CAUGHT:.0e}, twice the tolerance of
`tests/test_golden.py`; **missed** marks those that it does not catch. *files* is a fingerprint of `config.json`, `model.safetensors` and
`golden.npz`.
"""


def sections(out: Path) -> dict[str, list[str]]:
    """Lines of MISTAKES.md under each family, as it stands."""
    found: dict[str, list[str]] = {}
    family = ""
    for line in (out / "MISTAKES.md").read_text(encoding="utf-8").splitlines() if (out / "MISTAKES.md").exists() else []:
        family = line.removeprefix("## ") if line.startswith("## ") else family
        if family:
            found.setdefault(family, []).append(line)
    return found


def write_table(out: Path, only: Collection[str] = ()) -> None:
    """Write MISTAKES.md for all checkpoints under `out`; with `only`, measure these families and keep the other sections."""
    families: dict[str, list[str]] = {}
    for name, config in CHECKPOINTS.items():
        families.setdefault(config["model_type"], []).append(name)
    lines, kept = [head()], sections(out)
    for family, names in families.items():
        if only and family not in only:
            lines += kept[family]
            continue
        lines += [*rows(names, out), ""]
        print(f"{family}: mistakes measured", flush=True)
    (out / "MISTAKES.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
