"""Functions that each rank runs: the last rank's gradient is finite in two steps, but its square overflows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from am_lightning.deepspeed import attach
from tests.deepspeed.runs import batch_of, config_of, groups_of, make_net, start, train, whole_weights
from tests.optim.every_size import chunked_for_every_size

BAD, STEPS = (0, 3), 16


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return this rank's partitions and the tensors kept beside them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return params + [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def loss_of(engine: Any) -> float:
    x, y = batch_of(0, 0)
    with torch.no_grad():
        return float((engine(x.to(engine.device).to(next(engine.module.parameters()).dtype)) - y).square().mean())


def engine_of_adamw(stage: int, config: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = make_net().float()
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups_of(net, "tensor")]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    return engine, optimizer


def huge_gradient(
    stage: int,
    scope: str = "tensor",
    dtype: str = "float32",
    adamw: bool = False,
    value: float = 1e30,
    chunked: bool = False,
    **options: Any,
) -> dict[str, Any]:
    with chunked_for_every_size() if chunked else nullcontext():
        return _huge_gradient(stage, scope, dtype, adamw, value, options)


def _huge_gradient(
    stage: int, scope: str, dtype: str, adamw: bool, value: float, options: dict[str, Any]
) -> dict[str, Any]:
    config = config_of(stage, dtype, clip=0.0, **options.pop("zero", {}))
    engine, optimizer = engine_of_adamw(stage, config) if adamw else start(stage, scope, config, **options)
    if not adamw:
        attach(engine)
        attach(engine)  # again, which must not count twice
    bad = False

    def spoil(gradient: Tensor) -> Tensor | None:
        if not bad or dist.get_rank() != dist.get_world_size() - 1:
            return None
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    list(engine.module.parameters())[2].register_hook(spoil)
    at_first, kept = loss_of(engine), []
    for step in range(STEPS):
        bad = step in BAD
        before = whole_weights(engine, stage, dtype)
        train(engine, optimizer, scope, range(step, step + 1))
        after = whole_weights(engine, stage, dtype)
        kept.append({name for name, weight in after.items() if torch.equal(weight, before[name])})
    return {
        "kept": kept,
        "dropped": {"engine": engine.skipped_steps, "ours": 0 if adamw else int(optimizer.report()[-4])},
        "finite": all(bool(tensor.isfinite().all()) for tensor in states_of(optimizer)),
        "weights": {name: weight.flatten().tolist() for name, weight in after.items()},
        "loss": (at_first, loss_of(engine)),
    }
