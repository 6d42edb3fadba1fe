"""Part a: what machine this is, and three first steps of everything, up to the first error."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from part import Context, FailedError

from am_lightning import AMSGD, AdaptiveMemory, AMAdamW, clip_grad_norm_
from am_lightning.bench.models import wait_for

STEPS = 3
SHAPES = [(64, 33), (129,), (), (3, 5, 7)]


def run(name: str, context: Context) -> dict[str, Any]:
    """Device, system, and seconds of each first step.

    Raises:
        FailedError: a step did; the text says which and how.
    """
    if context.device == "cuda" and not torch.cuda.is_available():
        raise FailedError(f"torch {torch.__version__} sees no GPU: {_why_no_gpu()}", {})
    device = torch.device(context.device)
    result: dict[str, Any] = {"device": _device(device), "system": _system(device), "steps": {}}
    for step, do in _first_steps(device, context):
        start = time.perf_counter()
        try:
            words = do()
        except Exception as error:
            raise FailedError(f"{step}: {type(error).__name__}: {error}", result) from error
        result["steps"][step] = {"seconds": round(time.perf_counter() - start, 2), "words": words}
    return result


def _why_no_gpu() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error)
    return "torch.cuda.is_available() is False"


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "GiB": round(found.total_memory / 2**30, 1),
        "L2 MiB": round(getattr(found, "L2_cache_size", 0) / 2**20, 1),
        "CUDA": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _system(device: torch.device) -> dict[str, Any]:
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "GiB": round(memory, 1),
        "compilers": [name for name in ("gcc", "g++", "clang", "nvcc", "ninja") if shutil.which(name)],
        "Python.h": header.exists(),
        "copy GB/s": _copy_rate(device),
    }


def _output(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written by a copy of a large tensor, by its time: what memory can do."""
    source = torch.zeros((1 << 30 if device.type == "cuda" else 1 << 24) // 4, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        wait_for(device)
        start = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return round(2 * source.numel() * 4 / best / 1e9, 1)


def _first_steps(device: torch.device, context: Context) -> list[tuple[str, Callable[[], str]]]:
    low = {"fused": True, "exp_avg_dtype": torch.bfloat16}
    kinds: dict[str, dict[str, Any]] = {
        "AMAdamW single_tensor": {"foreach": False, "fused": False},
        "AMAdamW foreach": {"foreach": True},
        "AMAdamW default": {},
        "AMAdamW fused": {"fused": True},
        "AMAdamW fused, bfloat16 exp_avg": low,
    }
    steps: list[tuple[str, Callable[[], str]]] = [("a matrix product", lambda: _product(device))]
    for dtype in (torch.float32, torch.bfloat16):
        for kind, options in kinds.items():
            if dtype != torch.float32 and options is low:
                continue
            name = f"{kind}, {str(dtype).removeprefix('torch.')}"
            steps.append((name, lambda o=options, t=dtype: _steps(AMAdamW, device, t, o)))  # type: ignore[misc]
    steps.append(("AMSGD", lambda: _steps(AMSGD, device, torch.float32, {})))
    steps.append(("the callback in Lightning's Trainer", lambda: _callback(context)))
    steps.append(("a Llama under autocast", lambda: _llama(device)))
    return steps


def _product(device: torch.device) -> str:
    ones = torch.ones(64, 64, device=device)
    return str(float((ones @ ones).sum()))


def _steps(kind: Any, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> str:
    """Three steps on a few tensors; in words which kernels ran."""

    params = [torch.nn.Parameter(torch.linspace(-1, 1, math.prod(s)).reshape(s).to(device, dtype)) for s in SHAPES]
    optimizer = kind(params, lr=1e-2, **options)
    for _ in range(STEPS):
        for p in params:
            p.grad = p.detach() + 0.1
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
    betas = [float(beta) for beta in optimizer.momentum().values()]
    if not all(0 <= beta < 1 for beta in betas) or not all(bool(p.isfinite().all()) for p in params):
        raise RuntimeError(f"beta_t is {betas} after {STEPS} steps, or a weight is not finite")
    return str(optimizer.describe()).rpartition("kernels: ")[2]


def _callback(context: Context) -> str:
    import lightning as L  # here, where what it lacks is one step's error

    class Toy(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(16, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    module, accelerator = Toy(), "gpu" if context.device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=accelerator, devices=1, precision="bf16-mixed", max_steps=STEPS, gradient_clip_val=1.0,
            callbacks=[AdaptiveMemory()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(STEPS * 8, 16), batch_size=8))
    optimizer: Any = trainer.optimizers[0]
    return str(getattr(optimizer, "optimizer", optimizer).describe()).rpartition("kernels: ")[2]


def _llama(device: torch.device) -> str:
    """One forward and backward pass: transformers, its attention, autocast."""
    from am_lightning.pretrain.model.network import build_llama, token_loss
    from am_lightning.pretrain.model.shape import LlamaShape

    with device:
        model = build_llama(LlamaShape(64, 128, 2, 2, 128, 32))
        tokens = torch.randint(0, 128, (2, 32))
    with torch.autocast(device.type, torch.bfloat16):
        loss = token_loss(model(input_ids=tokens).logits, tokens)
    loss.backward()
    return f"loss {float(loss.detach()):.3f}, log(128) is 4.852"
