"""Peak extra memory of one eager step on the CPU: scratch, not copies of the model."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.python import COLD

LIMIT_MIB = 8.0
ROOT = Path(__file__).resolve().parents[2]

# A small optimizer runs first, so that code pages and torch's own pools are there. Then all that the first steps add
# beyond the state is counted: what a step allocates and gives back, and scratch that the optimizer keeps.
PROGRAM = """
import sys
import torch
from am_lightning import AMSGD, AMAdamW

kind, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.set_num_threads(1)
n = 200 * 2**20 // torch.empty((), dtype=dtype).element_size()


def make(*shapes):
    params = [torch.nn.Parameter(torch.full(s, 0.5, dtype=dtype)) for s in shapes]
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    return {"adamw": AMAdamW, "sgd": AMSGD}[kind](params, lr=0.1, weight_decay=0.1)


def status(key):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1]) / 1024


def extra(action, owed=0.0):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    action()
    return status("VmHWM") - before - owed


def two_steps(optimizer):
    optimizer.step()
    optimizer.step()


two_steps(make((300_001,), (1000,)))
optimizer = make((n // 2,), (n // 8192, 2048), (n // 4,), (1000,))
params = optimizer.param_groups[0]["params"]
state = sum(p.nbytes for p in params) * len(optimizer.moments) / 2**20
print(extra(lambda: two_steps(optimizer), state), extra(optimizer.step), extra(lambda: params[0].grad.clone()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_needs_less_than_8_mib(kind: str, dtype: str) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [COLD, "-c", PROGRAM, kind, dtype], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, later, copy = map(float, done.stdout.split())
    assert copy > 40, f"the watermark does not work here: a large copy reads {copy} MiB"
    assert first > 0, f"scratch must show: {first} MiB"
    assert max(first, later) < LIMIT_MIB, f"{first:.1f}, then {later:.1f} MiB beyond parameters, gradients and state"
