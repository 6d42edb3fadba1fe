"""Functions that each rank runs: AdamW, then AMAdamW from its checkpoint, and one that torch can load for neither."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from am_lightning import AMAdamW
from tests.sharding.checkpoint_paths import PATHS, Move, load_partly, load_sharded, save_sharded
from tests.sharding.checkpoint_steps import DTYPE, END, STOP, compare
from tests.sharding.layouts import LAYOUTS
from tests.sharding.model import groups_of, interior_share, make_net, raw_betas, train
from tests.sharding.steps import optimizer_of

RATE = 0.2  # half of the betas after the switch lie between the clamps


class PlainAdamW(torch.optim.AdamW):
    """Give AdamW the betas that ``train`` asks for."""

    def momentum(self) -> dict[str, Tensor]:
        return {}


def adamw_of(model: nn.Module) -> PlainAdamW:
    return PlainAdamW(groups_of(model), lr=RATE, betas=(0.9, 0.95))


def loader_of(path: str) -> Move:
    """Return the path's loader, or one that tolerates missing scalars if the path reads into an existing state."""
    return load_partly if PATHS[path].load is load_sharded else PATHS[path].load


@functools.cache
def switched() -> dict[str, Any]:
    """Train in one process: AdamW to STOP, then AMAdamW from its state_dict."""
    net = make_net(DTYPE)
    adamw = adamw_of(net)
    train(net, adamw, range(STOP), DTYPE, rate=RATE)
    optimizer = AMAdamW(groups_of(net), lr=RATE, betas=(0.89, 0.95))
    optimizer.load_state_dict(adamw.state_dict())
    with raw_betas("tensor") as raw:
        seen = train(net, optimizer, range(STOP, END), DTYPE, rate=RATE)
    by_name = [dict(zip(optimizer.parameter_names(), row, strict=True)) for row in raw]
    share = interior_share(seen, "adamw")
    return {"seen": seen, "raw": by_name, "weights": dict(net.named_parameters()), "share": share}


def train_adamw_and_save(path: str, where: str) -> None:
    placed = PATHS[path].writer(DTYPE)
    adamw = adamw_of(placed.model)
    train(placed.model, adamw, range(STOP), DTYPE, share=placed.share, rate=RATE)
    PATHS[path].save(placed.model, adamw, Path(where))


def switch(path: str, where: str) -> dict[str, Any]:
    placed = (PATHS[path].reader or PATHS[path].writer)(DTYPE)
    optimizer = optimizer_of(placed, "adamw", "tensor")
    with torch.no_grad():
        for param in placed.model.parameters():
            param.zero_()
    loader_of(path)(placed.model, optimizer, Path(where))
    return compare(placed, optimizer, "adamw", "tensor", switched(), RATE)


def fsdp1_into_a_template(kind: str, where: str) -> str:
    """Run get_optimizer_state_dict, dcp.save and dcp.load under FSDP1; return torch's error."""
    placed = LAYOUTS["fsdp1_full"][0](DTYPE)
    optimizer = adamw_of(placed.model) if kind == "torch" else optimizer_of(placed, kind, "tensor")
    train(placed.model, optimizer, range(2), DTYPE, share=placed.share)
    refusals: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, refusal_to_save(placed.model))  # all must raise together, or some would hang
    if any(refusals):
        raise NotImplementedError(next(filter(None, refusals)))
    save_sharded(placed.model, optimizer, Path(where))
    try:
        load_sharded(placed.model, optimizer, Path(where))
    except CheckpointException as error:  # this is a BaseException
        return str(error)
    return "loaded"


def refusal_to_save(model: nn.Module) -> str | None:
    """Return torch's error for this rank's shards of the model, or None if it accepts them."""
    try:
        get_model_state_dict(model)
    except NotImplementedError as error:
        return str(error)
    return None
