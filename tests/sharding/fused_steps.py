"""Functions that each rank runs with fused kernels and with a direction in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from am_lightning.distributed.strategies.dtensor import local
from am_lightning.optim.kernels.cpu import build as compiler
from tests.device import DEVICE
from tests.optim.harness import triton_on_cpu
from tests.sharding.layouts import LAYOUTS, Placed, everyone, make_net, mesh, shard
from tests.sharding.model import RATES, train
from tests.sharding.steps import optimizer_of

DTYPE = torch.float32


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    """Return all of this rank's weights and states."""
    tensors = []
    for param in model.parameters():
        state = optimizer.state[param]
        tensors += [param, *(state[key] for key in sorted(state))]
    return [local(tensor.detach()).double().flatten().tolist() for tensor in tensors]


def go(placed: Placed, optimizer: Any, steps: range, scope: str = "tensor") -> None:
    train(placed.model, optimizer, steps, DTYPE, share=placed.share, device=DEVICE, rate=RATES["adamw"][scope])


def start(layout: str, **options: Any) -> tuple[Placed, Any]:
    placed = LAYOUTS[layout][0](DTYPE)
    return placed, optimizer_of(placed, "adamw", "tensor", **options)


def low_precision(layout: str, where: str, **options: Any) -> dict[str, Any]:
    """Make four steps, and two steps with a distributed checkpoint and two more."""
    options["exp_avg_dtype"] = torch.bfloat16
    placed, optimizer = start(layout, **options)
    go(placed, optimizer, range(2))
    dcp.save(get_optimizer_state_dict(placed.model, optimizer), checkpoint_id=where)
    resumed, other = start(layout, **options)
    with torch.no_grad():
        for p, q in zip(resumed.model.parameters(), placed.model.parameters(), strict=True):
            p.copy_(q)
    blank = get_optimizer_state_dict(resumed.model, other)
    dcp.load(blank, checkpoint_id=where)
    set_optimizer_state_dict(resumed.model, other, optim_state_dict=blank)
    go(placed, optimizer, range(2, 4))
    go(resumed, other, range(2, 4))
    saved = dcp.FileSystemReader(where).read_metadata().state_dict_metadata
    return {
        "saved": {str(entry.properties.dtype) for key, entry in saved.items() if key.endswith(".exp_avg")},
        "kept": {str(state["exp_avg"].dtype) for state in other.state.values()},
        "whole": bits(placed.model, optimizer),
        "resumed": bits(resumed.model, other),
    }


def offloaded() -> dict[str, Any]:
    """Train FSDP2 with its shards on the CPU between steps, without an option, beside one without offload."""
    optimizers = []
    for policy in (CPUOffloadPolicy(pin_memory=False), OffloadPolicy()):
        net = shard(make_net(DTYPE), mesh=mesh(dist.get_world_size()), offload_policy=policy)
        placed = Placed(net, everyone())
        optimizers.append((placed, optimizer_of(placed, "adamw", "tensor")))
        go(*optimizers[-1], range(4))
    (there, first), (here, second) = optimizers
    return {"described": first.describe(), "same": bits(there.model, first) == bits(here.model, second)}


def refused_direction(layout: str) -> str:
    """Return the error, and whether nothing has moved."""
    placed, optimizer = start(layout, exp_avg_dtype=torch.bfloat16)
    before = [p.detach().clone() for p in placed.model.parameters()]
    with pytest.raises(ValueError, match="exp_avg_dtype") as caught:
        go(placed, optimizer, range(1))
    assert all(torch.equal(p, q) for p, q in zip(placed.model.parameters(), before, strict=True))
    return str(caught.value)


def without_compiler(rank: int, layout: str) -> dict[str, Any]:
    """Make a step with ``fused=True`` while this rank has no C++ compiler."""
    placed, optimizer = start(layout, fused=True)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(compiler, "find_compiler", lambda: None)
        compiler.load_library.cache_clear()
        try:
            with pytest.raises(RuntimeError) as caught:
                go(placed, optimizer, range(1))
        finally:
            compiler.load_library.cache_clear()
    return {"error": str(caught.value), "state": len(optimizer.state)}


def triton_on_some(reasons: dict[int, str], layout: str, **options: Any) -> dict[str, Any]:
    """Make two steps on a CPU that passes for a GPU; ``reasons``: why Triton fails on each rank ("": it works)."""
    placed, optimizer = start(layout, **options)
    with pytest.MonkeyPatch.context() as patch:
        triton_on_cpu(patch, why_not=lambda kind: reasons[dist.get_rank()])
        try:
            go(placed, optimizer, range(2))
        except RuntimeError as error:
            return {"error": str(error), "state": len(optimizer.state)}
    return {"bits": bits(placed.model, optimizer), "described": optimizer.describe()}
