"""Where the programs of the tests compute: the CPU, or the GPU for tests/gpu, which can be rehearsed on a CPU."""

from __future__ import annotations

import os

import torch

from tests.gates import DEVICE_VARIABLE

DEVICE = torch.device(os.environ.get(DEVICE_VARIABLE) or "cpu")
ON_GPU = DEVICE.type == "cuda"
BACKEND = "nccl" if ON_GPU else "gloo"
ACCELERATOR = "gpu" if ON_GPU else "cpu"  # as Lightning calls it
