"""Compile time is the scarce resource: the path of ``wse-emu run`` may not grow parallel specialisations unnoticed."""

from __future__ import annotations

import os
import subprocess
import sys

BUDGET = 25

CODE = """
import sys
from wse_emu.cli.app import main
sys.argv = ["wse-emu", "run", "--max-new-tokens", "2", "--json"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
from wse_kernels._jit import compile_count, compile_log
parallel = [record.function for record in compile_log() if record.parallel]
print(compile_count().parallel, len(set(parallel)), file=sys.stderr)
"""


def test_run_needs_few_parallel_specialisations_and_one_for_each_driver() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True, env=environment)
    n_specialisations, n_drivers = (int(word) for word in done.stderr.split()[-2:])
    assert 0 < n_specialisations <= BUDGET
    assert n_specialisations == n_drivers, "a driver was compiled twice: two argument types for one parameter"
