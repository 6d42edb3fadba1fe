"""Memory of real runs against the recipes' plan, and of one step beyond weights, gradients and state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from am_lightning import AMAdamW, clip_grad_norm_
from tests.device import DEVICE, ON_GPU
from tests.gpu.steps import KERNELS, words_of
from tests.sharding.pool import Pool

# On a GPU 217 million parameters and about 4 to 8 GB; in a rehearsal the small Llama of tests/recipes.
LARGE = {"hidden_size": 1024, "intermediate_size": 2752, "num_heads": 16, "num_layers": 12, "vocab_size": 32000}
RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-mixed, checkpointing, accumulated": {"precision": "bf16-mixed", "checkpointing": True, "accumulate": 2},
}
MIB = 1 << 20
# Memory that stays between steps beside 256 MiB of float32 parameters: a few buckets of 16 MiB, or tables.
MOST = {"Triton": 16 * MIB, "foreach": 192 * MIB}


@pytest.mark.parametrize("name", RUNS)
def test_the_plan(alone: Pool, name: str, record_property: Callable[[str, object], None]) -> None:
    from am_lightning.pretrain.model.shape import LlamaShape
    from tests.recipes.plan_cases import SCRATCH, SHAPE, Case, outcome_of

    shape = LlamaShape(**LARGE, seq_len=512) if ON_GPU else SHAPE
    on_gpu = 0 if words_of("default") == "Triton" else None  # None: what foreach takes
    case = Case("ddp", 1, 8, **RUNS[name])  # one process without DDP
    got = outcome_of(case, alone, shape=shape, scratch=on_gpu if ON_GPU else SCRATCH)
    record_property(f"planned {name}", got.memory)
    record_property(f"measured {name}", got.peaks[0])
    assert got.memory == pytest.approx(got.peaks[0], rel=0.1)


@pytest.mark.parametrize("exp_avg_dtype", [None, torch.bfloat16], ids=["same", "bfloat16"])
@pytest.mark.parametrize("kernel", ["default", "triton", "foreach"])
def test_a_step(kernel: str, exp_avg_dtype: torch.dtype | None, record_property: Callable[[str, object], None]) -> None:
    size = (32 if ON_GPU else 1) * MIB
    params = [torch.nn.Parameter(torch.full((n,), 0.5, device=DEVICE)) for n in (size, size // 2, size // 4, size // 4)]
    optimizer = AMAdamW(params, lr=0.01, exp_avg_dtype=exp_avg_dtype, **KERNELS[kernel])
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    for _ in range(2):
        clip_grad_norm_(optimizer, 1.0, in_step=True)
        optimizer.step()
    extra = 0
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        extra = -torch.cuda.memory_allocated()
    clip_grad_norm_(optimizer, 1.0, in_step=True)
    optimizer.step()
    if ON_GPU:
        torch.cuda.synchronize()
        extra += torch.cuda.max_memory_allocated()
        state = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
        record_property(f"extra {kernel} {exp_avg_dtype}", extra)
        record_property(f"state {kernel} {exp_avg_dtype}", state)
        assert extra <= MOST[words_of(kernel)]
        low = sum(p.numel() for p in params) * (8 if exp_avg_dtype is None else 6)
        assert state == pytest.approx(low, rel=1e-3)
