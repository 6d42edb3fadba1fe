"""Functions that each rank runs around the step by which torch.distributed.checkpoint creates an optimizer's state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.fsdp import StateDictType

from am_lightning import AMAdamW
from tests.sharding.layouts import LAYOUTS
from tests.sharding.model import RATES, groups_of, interior_share, make_net, make_optimizer, train
from tests.sharding.steps import optimizer_of, whole_weights

DTYPE = torch.float64
RATE = 0.3


def bits(seen: list[dict[str, float]]) -> list[dict[str, str]]:
    return [{name: beta.hex() for name, beta in step.items()} for step in seen]


def train_after_looking(layout: str, kind: str, scope: str, look: bool) -> dict[str, Any]:
    """Train. With ``look``, first ask for the state of the optimizer before it has any."""
    torch.manual_seed(0)
    placed = LAYOUTS[layout][0](DTYPE)
    optimizer = optimizer_of(placed, kind, scope)
    created: dict[str, Any] = {}
    if look:
        get_optimizer_state_dict(placed.model, optimizer)
        created = {key: sorted({float(s[key]) for s in optimizer.state.values()}) for key in ("step", "beta_prod")}
        created["momentum"] = [float(beta) for beta in optimizer.momentum().values()]
    seen = train(placed.model, optimizer, range(4), DTYPE, share=placed.share, rate=RATES[kind][scope])
    weights = {name: weight.tolist() for name, weight in whole_weights(placed.model).items()}
    return {"created": created, "bits": bits(seen), "weights": weights}


def first_step_at_lr_zero(layout: str) -> dict[str, Any]:
    """Start a warmup at lr 0 after torch's own step has been made, and compare with one process."""
    placed = LAYOUTS[layout][0](DTYPE)
    optimizer = optimizer_of(placed, "adamw", "tensor")
    get_optimizer_state_dict(placed.model, optimizer)
    before = whole_weights(placed.model)
    train(placed.model, optimizer, range(1), DTYPE, share=placed.share, rate=0.0)
    after = whole_weights(placed.model)
    train(placed.model, optimizer, range(1, 5), DTYPE, share=placed.share, rate=RATE)
    net = make_net(DTYPE)
    alone = make_optimizer("adamw", groups_of(net), "tensor")
    train(net, alone, range(1), DTYPE, rate=0.0)
    seen = train(net, alone, range(1, 5), DTYPE, rate=RATE)
    found = whole_weights(placed.model)
    return {
        "moved": any(not torch.equal(before[name], after[name]) for name in before),
        "steps": sorted({float(state["step"]) for state in optimizer.state.values()}),
        "off": max(float((found[name] - weight).abs().max()) for name, weight in net.named_parameters()),
        "share": interior_share(seen, "adamw"),
    }


class Three(nn.Module):
    """One tensor of three elements: over four ranks, one rank holds none."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.4, 0.5], dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :3] * self.w


def three(weights: Tensor | None = None) -> tuple[nn.Module, AMAdamW]:
    net: nn.Module = Three()
    if weights is not None:
        net.w.data.copy_(weights)
    net = FSDP(net, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = AMAdamW(net.named_parameters(), lr=RATE, betas=(0.89, 0.95))
    optimizer.bind_model(net)
    return net, optimizer


def save_where_a_rank_holds_nothing(full: bool) -> dict[str, Any]:
    """Save during a run, load into a new optimizer, save that one before it has made a step, and train."""
    model, optimizer = three()
    share = (dist.get_rank(), dist.get_world_size())
    options = StateDictOptions(full_state_dict=full)
    seen = train(model, optimizer, range(3), DTYPE, share=share, rate=RATE)
    holds, empty = sum(p.numel() for p in model.parameters()), not optimizer.state
    get_optimizer_state_dict(model, optimizer, options=options)
    seen += train(model, optimizer, range(3, 5), DTYPE, share=share, rate=RATE)
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    other, resumed = three(whole_weights(model)["w"])
    if full:
        set_optimizer_state_dict(other, resumed, saved, options=options)
    else:
        with FSDP.state_dict_type(other, StateDictType.FULL_STATE_DICT):
            resumed.load_state_dict(FSDP.optim_state_dict_to_load(other, resumed, saved))
        empty = empty and not resumed.state
    get_optimizer_state_dict(other, resumed, options=options)
    seen += train(other, resumed, range(5, 8), DTYPE, share=share, rate=RATE)
    single = Three()
    alone = AMAdamW(single.named_parameters(), lr=RATE, betas=(0.89, 0.95))
    expected = train(single, alone, range(8), DTYPE, rate=RATE)
    off = max(abs(a["w"] - b["w"]) for a, b in zip(seen, expected, strict=True))
    return {"holds": holds, "empty": empty, "off": off, "bits": bits(seen), "share": interior_share(expected, "adamw")}
