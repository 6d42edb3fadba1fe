"""Cases that every rank must refuse, and the attributes of DeepSpeed that the package reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from am_lightning import AMAdamW, clip_grad_norm_
from am_lightning.deepspeed import attach
from tests.deepspeed.runs import advance, config_of, groups_of, make_net, start, whole_weights
from tests.package.private_deepspeed import names_of


def missing(stage: int) -> list[str]:
    """Return the names that the package reads and this DeepSpeed does not have."""
    engine, _ = start(stage, "tensor", config_of(stage))
    ours, theirs = names_of(stage)
    param = next(engine.module.parameters())
    lost = [name for name in ours if not hasattr(engine.optimizer, name)]
    lost += [name for name in theirs if not hasattr(param, name)]
    return lost if hasattr(engine, "data_parallel_group") else [*lost, "data_parallel_group"]


def refuse(case: str) -> dict[str, Any]:
    """Return the error of the first step (or of attach), and whether a weight had moved by then."""
    engine, optimizer, act = CASES[case]()
    stage = engine.zero_optimization_stage()
    before = whole_weights(engine, stage, "float32")
    text = ""
    try:
        act()
        advance(engine, optimizer, "tensor", range(1))
    except (ValueError, TypeError) as error:
        text = f"{type(error).__name__}: {error}"
    after = whole_weights(engine, stage, "float32")
    return {"text": text, "moved": any(not torch.equal(before[name], after[name]) for name in before)}


def _nothing() -> None:
    return None


def elastic() -> tuple[Any, AMAdamW, Callable[[], None]]:
    return *start(1, "tensor", config_of(1, elastic_checkpoint=True)), _nothing


def with_attribute(name: str) -> Callable[[], tuple[Any, AMAdamW, Callable[[], None]]]:
    """Set an attribute by which DeepSpeed's optimizer shows a feature that needs hardware or libraries of its own."""
    return lambda: just_before_step(3, lambda engine: setattr(engine.optimizer, name, True))


def just_before_step(stage: int, mark: Callable[[Any], None]) -> tuple[Any, AMAdamW, Callable[[], None]]:
    """Set it just before the step, because the engine reads the mark, too."""
    engine, optimizer = start(stage, "tensor", config_of(stage))

    def step(part: int) -> None:
        mark(engine)
        optimizer.step()

    engine.optimizer._optimizer_step = step
    return engine, optimizer, _nothing


def with_mark(name: str, value: bool) -> Callable[[], tuple[Any, AMAdamW, Callable[[], None]]]:
    """Set what DeepSpeed and Megatron write on a parameter."""
    return lambda: just_before_step(2, lambda engine: setattr(next(engine.module.parameters()), name, value))


def unknown_partitions(stage: int) -> Callable[[], tuple[Any, AMAdamW, Callable[[], None]]]:
    """Act as a DeepSpeed that no longer puts its marks on the parameters."""

    def build() -> tuple[Any, AMAdamW, Callable[[], None]]:
        engine, optimizer = start(stage, "tensor", config_of(stage))

        def strip() -> None:
            for param in engine.module.parameters():
                param.__dict__.pop("_dp_group", None)
                param.__dict__.pop("_z3_optimizer", None)

        return engine, optimizer, strip

    return build


def global_without_attach() -> tuple[Any, AMAdamW, Callable[[], None]]:
    return *start(2, "global", config_of(2)), _nothing


def clipping() -> tuple[Any, AMAdamW, Callable[[], None]]:
    engine, optimizer = start(2, "tensor", config_of(2))

    def clip() -> None:
        advance(engine, optimizer, "tensor", range(0))
        clip_grad_norm_(optimizer, 1.0)

    return engine, optimizer, clip


def named_in_config() -> tuple[Any, Any, Callable[[], None]]:
    config = config_of(1)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    net = make_net().float()
    engine, *_ = deepspeed.initialize(model=net, model_parameters=groups_of(net, "tensor"), config=config)
    return engine, engine.optimizer, lambda: attach(engine)


CASES: dict[str, Callable[[], tuple[Any, Any, Callable[[], None]]]] = {
    "elastic": elastic,
    "zenflow": with_attribute("zenflow"),
    "nvme": with_attribute("swap_optimizer"),
    "autocast": with_attribute("torch_autocast_gradscaler"),
    "tensor_parallel": with_mark("tensor_model_parallel", True),
    "experts": with_mark("allreduce", False),
    "unknown_stage_1": unknown_partitions(1),
    "unknown_stage_2": unknown_partitions(2),
    "unknown_stage_3": unknown_partitions(3),
    "group_without_attach": lambda: (*start(3, "group", config_of(3)), _nothing),
    "global_without_attach": global_without_attach,
    "clipping": clipping,
    "named_in_config": named_in_config,
}
