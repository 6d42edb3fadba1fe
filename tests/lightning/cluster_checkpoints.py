"""Functions that each rank of a pool runs: fit and save, then resume at another world size beside an unbroken run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from am_lightning import AdaptiveMemory, AMAdamW
from tests.lightning.cluster import STEPS, alone, compared, optimizer_and_schedule, run
from tests.loggers.intervals import numbers_of
from tests.sharding.model import RATES, batch_of, lr_of, make_net, raw_betas

STOP = 4


def fit_and_save(placed: str, where: str, **how: Any) -> None:
    run(placed, steps=STOP, save=where, **how)


def resume(placed: str, where: str, switched: bool = False, optimizer: str = "adamw", **how: Any) -> dict[str, Any]:
    """Resume at ``STOP`` and fit to the end. If ``switched``, the checkpoint is of AdamW."""
    trainer, module, watch, _, raw = run(placed, resume=where, optimizer=optimizer, **how)
    (ours,) = trainer.optimizers
    single = switched_alone() if switched else alone(optimizer=optimizer)
    assert len(raw) == STEPS - STOP
    return {
        **compared(ours, module, watch, raw, single),
        "steps": sorted({float(state["step"]) for state in ours.state.values()}),
        "kind": type(ours).__name__,
    }


def skipped_after_resume(placed: str, where: str) -> float:
    """Return the callback's count of skipped steps at the end of a resumed run; rank zero must have logged the same."""
    trainer, _, _, logged, _ = run(placed, resume=where)
    (callback,) = (c for c in trainer.callbacks if isinstance(c, AdaptiveMemory))
    (skipped,) = callback.state_dict()["skipped_steps"]
    assert all(entry.get("am/skipped_steps", skipped) == skipped for entry in logged)
    return float(skipped)


def switched_alone() -> dict[str, Any]:
    """Train in one process without Lightning: AdamW up to ``STOP``, then AMAdamW from its state_dict.

    A scheduler has set the next step's lr by the time a checkpoint is saved.
    """
    net, rate = make_net(torch.float64), RATES["adamw"]["tensor"]
    first = optimizer_and_schedule("adamw", rate, net, net)["optimizer"]
    steps(net, first, range(STOP), rate)
    for group in first.param_groups:
        group["lr"] = rate * lr_of(STOP, 1.0)
    second = AMAdamW([{"params": g["params"]} for g in first.param_groups], lr=rate, betas=(0.89, 0.95))
    second.load_state_dict(first.state_dict())
    second.bind_model(net)
    with raw_betas("tensor") as raw:
        steps(net, second, range(STOP, STEPS), rate)
    by_name = [dict(zip(second.parameter_names(), row, strict=True)) for row in raw]
    return {"raw": by_name, "weights": dict(net.named_parameters())}


def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, which: range, rate: float) -> None:
    for step in which:
        for group in optimizer.param_groups:
            group["lr"] = rate * lr_of(step, 1.0)
        x, y = batch_of(step, torch.float64)
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()


def interval_after_resume(placed: str, where: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return the first point that a resumed run logs and the expected one, of steps before and after the checkpoint."""
    every = STOP - 1
    _, _, _, logged, _ = run(placed, resume=where, of_callback={"log_every_n_steps": every})
    expected = numbers_of(alone()["seen"][every : 2 * every])
    found = next((entry for entry in logged if "am/beta/mean" in entry), expected)  # only rank zero logs
    return {tag: found[tag] for tag in expected}, expected
