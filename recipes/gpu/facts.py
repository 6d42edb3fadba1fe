"""Part a: facts about the machine, and three first steps of everything, up to the first error."""

from __future__ import annotations

import math
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from part import Context, FailedError
from torch.utils import collect_env
from torch.utils.benchmark import Timer

from am_lightning import AMSGD, AdaptiveMemory, AMAdamW, clip_grad_norm_

STEPS = 3
SHAPES = [(64, 33), (129,), (), (3, 5, 7)]


def run(name: str, context: Context) -> dict[str, Any]:
    """Return the device, the system, and the seconds of each first step.

    Raises:
        FailedError: if there is no GPU or a step fails. The text names the step.
    """
    if context.device == "cuda" and not torch.cuda.is_available():
        try:
            torch.cuda.init()
            why: object = "torch.cuda.is_available() is False"
        except Exception as error:
            why = error
        raise FailedError(f"torch {torch.__version__} sees no GPU: {why}", {})
    device = torch.device(context.device)
    result: dict[str, Any] = {"device": _device(device), "system": _system(device), "steps": {}}
    for step, do in _first_steps(device).items():
        start = time.perf_counter()
        try:
            words = do()
        except Exception as error:
            raise FailedError(f"{step}: {type(error).__name__}: {error}", result) from error
        result["steps"][step] = {"seconds": round(time.perf_counter() - start, 2), "words": words}
    return result


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
        "driver": collect_env.get_nvidia_driver_version(collect_env.run),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _system(device: torch.device) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "GiB": round(memory, 1),
        "compilers": [name for name in ("gcc", "g++", "clang", "nvcc", "ninja") if shutil.which(name)],
        "Python.h": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        "copy GB/s": _copy_rate(device),
    }


def _copy_rate(device: torch.device) -> float:
    """Return the bytes that a copy of a large tensor reads and writes in a second, in GB."""
    source = torch.zeros((1 << 30 if device.type == "cuda" else 1 << 24) // 4, device=device)
    names = {"source": source, "target": torch.empty_like(source)}
    seconds = Timer("target.copy_(source)", globals=names).blocked_autorange(min_run_time=0.2).median
    return round(2 * source.numel() * 4 / seconds / 1e9, 1)


def _first_steps(device: torch.device) -> dict[str, Callable[[], str]]:
    kinds: dict[str, dict[str, Any]] = {
        "single_tensor": {"foreach": False, "fused": False},
        "foreach": {"foreach": True},
        "default": {},
        "fused": {"fused": True},
    }
    steps: dict[str, Callable[[], str]] = {"a matrix product": partial(_product, device)}
    for dtype in (torch.float32, torch.bfloat16):
        for kind, options in kinds.items():
            name = f"AMAdamW {kind}, {str(dtype).removeprefix('torch.')}"
            steps[name] = partial(_steps, AMAdamW, device, dtype, **options)
    low: dict[str, Any] = {"fused": True, "exp_avg_dtype": torch.bfloat16}
    steps["AMAdamW fused, bfloat16 exp_avg, float32"] = partial(_steps, AMAdamW, device, torch.float32, **low)
    steps["AMSGD"] = partial(_steps, AMSGD, device, torch.float32)
    steps["the callback in Lightning's Trainer"] = partial(_callback, device)
    steps["a Llama under autocast"] = partial(_llama, device)
    return steps


def _product(device: torch.device) -> str:
    ones = torch.ones(64, 64, device=device)
    return str(float((ones @ ones).sum()))


def _steps(kind: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> str:
    """Take three steps on a few tensors, and return which kernels ran."""
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
    return _kernels(optimizer)


def _kernels(optimizer: Any) -> str:
    return str(optimizer.describe()).rpartition("kernels: ")[2]


def _callback(device: torch.device) -> str:
    import lightning as L  # here, so that an import error fails this step only
    from lightning.pytorch.demos.boring_classes import BoringModel

    class Toy(BoringModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, precision="bf16-mixed", max_steps=STEPS,
            gradient_clip_val=1.0, limit_val_batches=0, callbacks=[AdaptiveMemory()], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Toy())
    optimizer: Any = trainer.optimizers[0]
    return _kernels(getattr(optimizer, "optimizer", optimizer))


def _llama(device: torch.device) -> str:
    """Run a forward and backward pass of transformers, its attention and autocast."""
    from am_lightning.pretrain.model.network import build_llama, token_loss
    from am_lightning.pretrain.model.shape import LlamaShape

    with device:
        model = build_llama(LlamaShape(64, 128, 2, 2, 128, 32))
        tokens = torch.randint(0, 128, (2, 32))
    with torch.autocast(device.type, torch.bfloat16):
        loss = token_loss(model(input_ids=tokens).logits, tokens)
    loss.backward()
    return f"loss {float(loss.detach()):.3f}, log(128) is 4.852"
