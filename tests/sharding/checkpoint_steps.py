"""Functions that each rank runs: train and save; load elsewhere and train on beside an unbroken run of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from tests.sharding.checkpoint_paths import PATHS
from tests.sharding.model import CAPS, RATES, lr_of, raw_betas, train
from tests.sharding.steps import alone, optimizer_of, raw_error, whole_weights

STOP, END = 4, 8
DTYPE = torch.float64


@functools.cache
def unbroken(kind: str, scope: str, flat: bool) -> dict[str, Any]:
    return alone(kind, scope, DTYPE, flat, END)


def train_and_save(path: str, kind: str, scope: str, where: str) -> None:
    torch.manual_seed(0)
    placed = PATHS[path].writer(DTYPE)
    optimizer = optimizer_of(placed, kind, scope)
    train(placed.model, optimizer, range(STOP), DTYPE, share=placed.share, rate=RATES[kind][scope])
    for group in optimizer.param_groups:  # a scheduler sets it after the step: it is no longer eta_{t-1}
        group["lr"] = lr_of(STOP, RATES[kind][scope])
    PATHS[path].save(placed.model, optimizer, Path(where))


def load_and_train(path: str, kind: str, scope: str, where: str) -> dict[str, Any]:
    """Return an entry of the table: largest relative errors of raw beta_t and of the weights after the resume."""
    torch.manual_seed(1)
    builder = PATHS[path].reader or PATHS[path].writer
    placed = builder(DTYPE)
    optimizer = optimizer_of(placed, kind, scope)
    with torch.no_grad():
        for param in placed.model.parameters():
            param.zero_()  # everything must come from the checkpoint
    PATHS[path].load(placed.model, optimizer, Path(where))
    return compare(placed, optimizer, kind, scope, unbroken(kind, scope, "flat" in path), RATES[kind][scope])


def compare(placed: Any, optimizer: Any, kind: str, scope: str, single: dict[str, Any], rate: float) -> dict[str, Any]:
    """Train from STOP to END and compare with ``single``, a run of one process over the same steps."""
    with raw_betas(scope) as raw:
        seen = train(placed.model, optimizer, range(STOP, END), DTYPE, share=placed.share, rate=rate)
    names = optimizer.parameter_names()
    errors = [
        raw_error(ours, theirs[name])
        for row, theirs in zip(raw, single["raw"][-len(raw) :], strict=True)
        for name, ours in zip(names, row, strict=True)
    ]
    weights = whole_weights(placed.model)
    off = [float((weights[n] - w).abs().max() / w.abs().max()) for n, w in single["weights"].items()]
    betas = [beta for step in seen for beta in step.values()]
    return {
        "raw": max(errors),
        "weights": max(off),
        "bits": [{n: b.hex() for n, b in step.items()} for step in seen],
        "share": sum(1e-6 < beta < CAPS[kind] - 1e-6 for beta in betas) / len(betas),
        "names": sorted(names) == sorted(single["weights"]),
    }
