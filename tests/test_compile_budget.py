"""Compile time is the scarce resource: the path of ``wse-emu run`` may not grow specialisations of drivers unnoticed."""

from __future__ import annotations

import os
import subprocess
import sys

BUDGET = 25

CODE = """
import sys
from wse_emu.cli.entry import main
sys.argv = ["wse-emu", "run", "--max-new-tokens", "2", "--json"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
from wse_kernels._jit import compile_count, compile_log
drivers = [record.function for record in compile_log() if record.driver]
assert not [name for name in drivers if "rounded" in name], "a level of precision that is off compiles nothing"
print(compile_count().drivers, len(set(drivers)), file=sys.stderr)
"""


def test_run_needs_few_drivers_and_one_specialisation_of_each() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True, env=environment)
    n_specialisations, n_drivers = (int(word) for word in done.stderr.split()[-2:])
    assert 0 < n_specialisations <= BUDGET
    assert n_specialisations == n_drivers, "a driver was compiled twice: two argument types for one parameter"
