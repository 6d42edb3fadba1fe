"""Peak extra memory of one eager step on the CPU: scratch buffers, not copies of the model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.python import COLD, PYTHON

LIMIT_MIB = 8.0
ROOT = Path(__file__).resolve().parents[2]

# A small optimizer runs first, so that code pages and torch's pools are allocated. Then everything that the first steps
# add to the state is counted: temporaries of a step, and scratch buffers that the optimizer keeps.
PROGRAM = """
import json
import sys
import torch
from am_lightning import AMSGD, AMAdamW

kind, dtype, options = sys.argv[1], getattr(torch, sys.argv[2]), json.loads(sys.argv[3])
if "exp_avg_dtype" in options:
    options["exp_avg_dtype"] = getattr(torch, options["exp_avg_dtype"])
torch.set_num_threads(1)
n = 200 * 2**20 // torch.empty((), dtype=dtype).element_size()


def make(*shapes):
    params = [torch.nn.Parameter(torch.full(s, 0.5, dtype=dtype)) for s in shapes]
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    return {"adamw": AMAdamW, "sgd": AMSGD}[kind](params, lr=0.1, weight_decay=0.1, **options)


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
elements = sum(p.numel() for p in params)
state = (sum(p.nbytes for p in params) * len(optimizer.moments) - 2 * elements * ("exp_avg_dtype" in options)) / 2**20
print(extra(lambda: two_steps(optimizer), state), extra(optimizer.step), extra(lambda: params[0].grad.clone()))
"""


# All kernels of the CPU; the default is the C++ loop for AMAdamW and chunked for AMSGD.
KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("adamw", {}),
    "chunked": ("adamw", {"fused": False}),
    "foreach": ("adamw", {"foreach": True}),
    "bfloat16 exp_avg": ("adamw", {"exp_avg_dtype": "bfloat16"}),
    "chunked, bfloat16 exp_avg": ("adamw", {"fused": False, "maximize": True, "exp_avg_dtype": "bfloat16"}),
    "single_tensor": ("adamw", {"foreach": False}),
    "sgd": ("sgd", {}),
    "sgd, foreach": ("sgd", {"foreach": True}),
}


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_needs_less_than_8_mib(kernel: str, dtype: str) -> None:
    kind, options = KERNELS[kernel]
    if "exp_avg_dtype" in options and dtype != "float32":
        pytest.skip("exp_avg_dtype needs float32 parameters")
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [COLD, "-c", PROGRAM, kind, dtype, json.dumps(options)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, later, copy = map(float, done.stdout.split())
    assert copy > 40, f"the watermark does not work here: a large copy reads {copy} MiB"
    assert first > 0, f"scratch must show: {first} MiB"
    assert max(first, later) < LIMIT_MIB, f"{first:.1f}, then {later:.1f} MiB beyond parameters, gradients and state"


GROWTH = """
import json
import sys
import torch
from am_lightning import AMAdamW, AMSGD

kind, options = sys.argv[1], json.loads(sys.argv[2])
if "exp_avg_dtype" in options:
    options["exp_avg_dtype"] = getattr(torch, options["exp_avg_dtype"])
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((300, 100), *[(40,)] * 20)]
optimizer = {"adamw": AMAdamW, "sgd": AMSGD}[kind](params, lr=1e-3, weight_decay=0.1, **options)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def steps(first, last):
    for step in range(first, last):
        for i, param in enumerate(params):
            param.grad = None if i == step % 7 else torch.full_like(param, 0.1)  # a new plan for the kernels
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
        optimizer.step()


steps(0, 500)
before = resident()
steps(500, 2500)
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/statm", os.R_OK), reason="needs Linux's /proc/self/statm")
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_grows_over_2000_steps(kernel: str) -> None:
    kind, options = KERNELS[kernel]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [PYTHON, "-c", GROWTH, kind, json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0, f"{done.stdout.strip()} MiB more than 2,000 steps before"  # malloc: up to 1.5
