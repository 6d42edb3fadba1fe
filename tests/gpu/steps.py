"""Helpers of tests/gpu: kernels by name, parameters at any address, gradients made on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from am_lightning import AMAdamW
from am_lightning.optim.kernels.registry import require_fused
from tests.device import DEVICE, ON_GPU
from tests.optim.harness import params_of

KERNELS: dict[str, dict[str, Any]] = {
    "default": {},
    "triton": {"fused": True},  # the C++ loop in a rehearsal
    "foreach": {"foreach": True},
    "plain": {"foreach": False, "fused": False},
}
SHAPES = [(1000, 77), (1,), (), (0,), (8192,), (8193,), (3, 5, 7), (100_003,)]
DTYPES = {
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "float16": [torch.float16],
    "float64": [torch.float64],
    "mixed": [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.float64],
}
only_cuda = pytest.mark.skipif(not ON_GPU, reason="a CPU has no CUDA graphs and no waits for a device")


def words_of(kernel: str) -> str:
    """Return the name of a kernel in ``describe`` on this device."""
    if kernel in ("foreach", "plain"):
        return {"foreach": "foreach", "plain": "single_tensor"}[kernel]
    if not ON_GPU:
        return {"triton": "C++ loop", "default": ""}[kernel]
    try:
        require_fused(DEVICE)
    except RuntimeError:
        assert kernel == "default", "Triton can neither build nor launch here"
        return "foreach"
    return "Triton"


def placed(values: torch.Tensor, offset: int) -> torch.Tensor:
    """Return the values on the device, ``offset`` elements after an aligned address."""
    room = torch.empty(values.numel() + offset, dtype=values.dtype, device=DEVICE)
    return room[offset:].view(values.shape).copy_(values)


def make_params(
    dtypes: Sequence[torch.dtype], *, shapes: Any = SHAPES, seed: int = 0, offset: int = 1
) -> list[tuple[str, Any]]:
    """Return parameters; every other one starts ``offset`` elements off alignment."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]
    return [(f"w{i}", torch.nn.Parameter(placed(t, i % 2 * offset))) for i, t in enumerate(values)]


def make(kernel: str, dtypes: Sequence[torch.dtype] = (torch.float32,), **options: Any) -> AMAdamW:
    """Build two groups, with and without decay."""
    params = make_params(dtypes, shapes=options.pop("shapes", SHAPES), offset=options.pop("offset", 1))
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "weight_decay": 0.0}]
    return AMAdamW(groups, **({"lr": 0.05} | KERNELS[kernel] | options))


def give(optimizer: torch.optim.Optimizer, step: int, offset: int = 1) -> None:
    """Set new gradients at new addresses, every third ``offset`` elements off alignment, without any wait."""
    generator = torch.Generator(DEVICE.type).manual_seed(step)
    for i, p in enumerate(params_of(optimizer)):
        start = offset if (i + step) % 3 == 0 else 0
        room = torch.empty(p.numel() + start, dtype=p.dtype, device=p.device)
        noise = torch.randn(p.shape, generator=generator, device=p.device)
        p.grad = room[start:].view(p.shape).copy_(noise.add_(p.detach(), alpha=0.5))


def delay() -> None:
    """Delay the device by a few milliseconds behind the host."""
    if ON_GPU:
        torch.cuda._sleep(5_000_000)


@contextmanager
def side_stream() -> Iterator[None]:
    """Use another stream, which runs after all earlier work and before all later work."""
    if not ON_GPU:
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


@contextmanager
def no_sync() -> Iterator[None]:
    """Raise if the host waits for the device. A rehearsal has nothing to wait for and runs the same code."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
