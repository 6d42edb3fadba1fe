"""The device on which the tests' programs compute: the CPU, or for tests/gpu the GPU, or a CPU in a rehearsal."""

from __future__ import annotations

import os

import torch

from tests.gates import DEVICE_VARIABLE

DEVICE = torch.device(os.environ.get(DEVICE_VARIABLE) or "cpu")
ON_GPU = DEVICE.type == "cuda"
BACKEND = "nccl" if ON_GPU else "gloo"
ACCELERATOR = "gpu" if ON_GPU else "cpu"  # Lightning's name
