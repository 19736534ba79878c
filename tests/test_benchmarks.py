"""The benchmarks work at tiny sizes, race every kernel and every mesh layer, and say what they measured."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import wse_emu as wse
from benchmarks import bench_kernels, bench_large, bench_layers, profile_stages
from benchmarks.bench_models import CONFIGS, work_of
from benchmarks.peaks import Machine, Peak
from benchmarks.processes import ROOT, environment
from benchmarks.racing import Case, Row, Work, table

IN_EVERY_LAUNCH = {"locate"}
"""Kernels that other kernels call and that are no use alone."""
NOT_MESH_PROGRAMS = {
    "attend_on_cores", "choose_on_cores", "vocabulary_passes", "gate_and_up", "hidden", "output", "combine", "run_selected",
    "on_selected",
    "run_only",
}  # fmt: skip
"""Functions of layers that take a wafer: of attention and of indexers the part for one core at a time, one that runs nothing, and the steps
of an expert with biases, which `experts_ffn` takes, and how one kernel runs on some of the tokens (two ways)."""


def kernels() -> Iterator[str]:
    """Public functions of `wse_kernels` that are compiled, and the plain functions that call a private one."""
    for path in sorted((ROOT / "kernels" / "wse_kernels").glob("*.py")):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        compiled = {f.name for f in functions if any(ast.unparse(d).startswith("kernel(") for d in f.decorator_list)}
        yield from (name for name in compiled if not name.startswith("_"))
        yield from (f.name for f in functions if f"_{f.name}" in compiled)


def mesh_programs() -> Iterator[str]:
    """Public functions of `wse_emu.layers` that run on a wafer."""
    for path in sorted((ROOT / "wse_emu" / "layers").glob("*.py")):
        module = importlib.import_module(f"wse_emu.layers.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_") and "wafer" in inspect.signature(function).parameters:
                yield name


def raced(words: str) -> set[str]:
    """Names in a benchmark file's table of cases, and in its text."""
    return {word.strip("(),") for name in words for word in name.split()}


def test_every_kernel_is_raced() -> None:
    names = set(kernels()) - IN_EVERY_LAUNCH
    assert {"exp_array", "partial_matmul", "mesh_matmul", "mesh_attention"} <= names
    matmul = (ROOT / "benchmarks" / "bench_mesh_matmul.py").read_text()
    missing = names - raced(bench_kernels.CASES) - raced(bench_layers.CASES)
    assert {name for name in missing if f" {name}(" not in matmul} == set()


def test_every_mesh_program_is_raced() -> None:
    programs = set(mesh_programs()) - NOT_MESH_PROGRAMS
    assert {"matmul", "attention", "route", "experts_ffn", "logits"} <= programs
    text = Path(bench_layers.__file__).read_text()
    assert {name for name in programs if f"{name}(wafer" not in text} == set()


def test_every_benchmark_runs_at_a_tiny_size(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--smoke", "-q", "-p", "no:cacheprovider"]
    one_thread = environment(NUMBA_NUM_THREADS="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    one_thread.pop("PYTEST_XDIST_WORKER", None)  # this run of pytest has no others beside it, whatever ran us
    places = [f"--basetemp={tmp_path / 'runs'}", f"--benchmark-json={tmp_path / 'out.json'}"]
    done = subprocess.run([*command, *places], cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("kernels: exp_array beside numpy", "layers: attention, prompt beside numpy", "models: Qwen3-MoE token beside"):
        assert line in done.stdout
    assert "Smoke run: tiny sizes" in done.stdout
    kept = {one["name"]: one["extra_info"] for one in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    product = kept["test_kernel[partial_matmul]"]
    assert (product["macs"], product["bytes"]) == (4 * 8 * 8, 4 * (4 * 8 + 8 * 8 + 4 * 8))
    assert product["ratio_to_numpy"] > 0
    assert kept["test_layer[matmul, prompt]"]["tokens"] == 6
    assert kept["test_model[Mixtral]"]["tokens prompt"] == 6


@pytest.mark.slow
def test_a_model_larger_than_its_memory_at_a_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_large.main(["--gigabytes", "0.02", "--new-tokens", "2", "--prompt-tokens", "3", "--directory", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["save", "build", "run"]
    assert sum("bytes streamed" in line for line in lines) == 2


@pytest.mark.slow
def test_profile_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    profile_stages.main(["--smoke", "--turns", "1"])
    out = capsys.readouterr().out
    for stage in ("embedding", "qkv", "head_norm", "attention", "router", "experts", "lm_head", profile_stages.OUTSIDE, "all"):
        assert out.count(f"\n  {stage} ") == 2, stage


def test_the_page_says_what_there_is_to_do() -> None:
    config = CONFIGS["Qwen3-MoE"]
    wafer = wse.Wafer(wse.WSE3, rows=32, cols=32, executor="dry")
    wse.from_config(config, wafer=wafer).generate(np.zeros(512, np.int64), max_new_tokens=2)
    prompt, token = wafer.ledger.passes()
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(): cells[2:4] for cells in (line.split("|") for line in page.splitlines()) if len(cells) == 5}
    for column, one in enumerate((prompt, token)):
        work = work_of(wafer, one)
        says = {name: cells[column].strip() for name, cells in rows.items()}
        macs = f"{work.macs / 1e9:.1f} billion" if one is prompt else f"{work.macs / 1e6:.0f} million"
        assert says["multiply-adds"] == macs
        assert says["weights read, float32 in MemoryX"].startswith(f"{work.bytes / 1e6:.0f} MB: ")
        assert float(says["multiply-adds for each weight"]) == float(f"{4 * work.macs / work.bytes:.2g}")
        assert says["kinds of launches and moves, one entry in the ledger each"] == str(one.stop - one.start)


# ---- the tools


def case(**changes: object) -> Case:
    """Two sides that agree with the expected result."""
    x = np.arange(4.0)
    good = Case(lambda: x + 1, {"numpy": lambda: 1 + x}, (np.arange(1, 5),), (0,), Work(bytes=32))
    return replace(good, **changes)  # type: ignore[arg-type]


def test_a_case_that_agrees_passes() -> None:
    case().check()
    case(ours=lambda: None, look=lambda _: np.arange(1, 5)).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ours": lambda: np.arange(1, 5) + 0.5}, "wse-emu: result 0 is off by 0.5"),
        ({"peers": {"numpy": lambda: np.arange(4)}}, "numpy: result 0 is off by 1"),
        ({"ours": lambda: np.arange(1, 4)}, r"wse-emu: result 0 has shape \(3,\)"),
        ({"ours": lambda: (np.arange(1, 5), np.arange(3))}, "wse-emu: 2 results, 1 expected"),
        ({"ours": lambda: np.array([1, 2, 3, np.nan])}, "wse-emu: result 0 is off by nan"),
    ],
)
def test_a_wrong_result_is_not_timed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        case(**changes).check()


def test_the_longer_of_two_least_times_bounds() -> None:
    peak = Peak(flops=100.0, bytes=10.0)
    assert peak.least_seconds(macs=100, n_bytes=10) == (2.0, "flops")
    assert peak.least_seconds(macs=10, n_bytes=10) == (1.0, "bytes")
    assert peak.least_seconds(macs=0, n_bytes=0) == (0.0, "")
    assert peak.better(Peak(50.0, 20.0)) == Peak(100.0, 20.0)


def test_the_table_says_ratio_peer_and_fraction_of_the_right_peak() -> None:
    machine = Machine(core=Peak(1e9, 1e9), whole=Peak(2e9, 4e9))
    rows = [
        Row("parallel", 0.5, Work(macs=10**8), {"numpy": 1.0, "torch": 0.25}),
        Row("of one core", 1e-3, Work(bytes=10**5), {"numpy": 2e-3}, parallel=False),
        Row("alone", 2e-6, Work(tokens=1)),
    ]
    lines = [line.split() for line in table(rows, machine)[: len(rows) + 2]]
    assert lines[0] == ["benchmark", "ours", "peer", "ratio", "against", "of", "peak"]
    assert lines[1] == ["parallel", "500", "ms", "1", "s", "2.00", "numpy", "20.0%", "flops"]
    assert lines[2] == ["250", "ms", "0.50", "torch"]
    assert lines[3] == ["of", "one", "core", "1", "ms", "2", "ms", "2.00", "numpy", "10.0%", "bytes"]
    assert lines[4] == ["alone", "2", "us"]


def test_no_emulated_quantity_stands_in_the_table() -> None:
    text = "\n".join(table([Row("x", 1.0, Work(1, 1, 1), {"numpy": 1.0})], Machine(Peak(1, 1), Peak(1, 1))))
    assert not any(word in text for word in ("wavelet", "hop", "cycle"))
