"""Forked children: refused by name where threads would kill them, the same bits where they can run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from numba import config

SCRIPT = """
import os, sys
import numpy as np
from wse_kernels.errors import ForkError
from wse_kernels.matmul import STORE, mesh_matmul

def product():
    x = w = np.arange(16, dtype=np.float32)
    w.flags.writeable = False
    out, all_, rows = np.zeros(16, np.float32), np.array([0, 4]), np.arange(4)
    mesh_matmul(x.copy(), 4, all_, rows, w, 0, 4, 4, out, 4, all_, rows, np.zeros(1, np.float32), STORE)
    return out

before = product() if sys.argv[1] == "used" else None
pid = os.fork()
if pid == 0:
    try:
        after = product()
        os._exit(0 if before is None or np.array_equal(before, after) else 1)
    except ForkError as e:
        os._exit(10 if "spawn" in str(e) else 2)
    except BaseException:
        os._exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="plain Python starts no threads")
@pytest.mark.skipif(sys.platform != "linux", reason="about fork and GNU OpenMP")
@pytest.mark.parametrize(("layer", "used", "expected"), [("omp", "used", 10), ("omp", "unused", 0), ("workqueue", "used", 0)])
def test_a_forked_child_computes_or_is_told_the_way_out(layer: str, used: str, expected: int) -> None:
    env = {**os.environ, "NUMBA_THREADING_LAYER": layer, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, used], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == expected
