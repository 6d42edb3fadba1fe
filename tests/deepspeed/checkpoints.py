"""What each rank runs for checkpoints: train and save, then load into a new engine and go on."""

from __future__ import annotations

from typing import Any

from tests.deepspeed.runs import advance, alone, config_of, start, whole_weights

HALF, END = 4, 8


def save(folder: str, stage: int, scope: str = "tensor", dtype: str = "float32") -> None:
    engine, optimizer = start(stage, scope, config_of(stage, dtype))
    attach(engine, scope)
    advance(engine, optimizer, scope, range(HALF))
    engine.save_checkpoint(folder, tag="half")


def attach(engine: Any, scope: str) -> None:
    if scope != "tensor":
        from am_lightning.deepspeed import attach as attach_engine

        attach_engine(engine)


def resume(folder: str, stage: int, scope: str = "tensor", dtype: str = "float32", universal: bool = False) -> Any:
    """Largest errors of beta_t and weights after four more steps, against one process that was never interrupted."""
    config = config_of(stage, dtype)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    engine, optimizer = start(stage, scope, config)
    attach(engine, scope)
    engine.load_checkpoint(folder, tag="universal" if universal else "half")
    seen = advance(engine, optimizer, scope, range(HALF, END))
    single = alone(scope, steps=END)
    pairs = zip(seen, single["seen"][HALF:], strict=True)
    weights = whole_weights(engine, stage, dtype)
    return {
        "beta": max(abs(ours[n] - b) for ours, theirs in pairs for n, b in theirs.items()),
        "weights": max(float((weights[n] - w).abs().max()) for n, w in single["weights"].items()),
        "bits": [{n: b.hex() for n, b in step.items()} for step in seen],
        "decays": [group["weight_decay"] for group in optimizer.param_groups],
        "keys": sorted({key for group in optimizer.param_groups for key in group}),
    }
