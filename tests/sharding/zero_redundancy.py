"""Functions that each rank runs: ZeroRedundancyOptimizer around AMAdamW and AMSGD, beside one process."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from am_lightning.distributed.names import strip_wrappers
from tests.sharding.frames import count_frames
from tests.sharding.layouts import everyone
from tests.sharding.model import RATES, groups_of, make_net, raw_betas, train
from tests.sharding.steps import STEPS, raw_error, reference

DTYPE = torch.float64
STOP = 4
OPTIONS = {"adamw": {"betas": (0.89, 0.95)}, "sgd": {"beta_max": 0.9}}
CLASSES = {"adamw": AMAdamW, "sgd": AMSGD}


class Redundancy(ZeroRedundancyOptimizer):
    """Return the betas of this rank's tensors, which ``train`` asks for."""

    def momentum(self) -> dict[str, Tensor]:
        return self.optim.momentum()


def unnamed_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{**group, "params": [param for _, param in group["params"]]} for group in groups_of(model)]


def wrapped(net: nn.Module, kind: str, scope: str) -> tuple[nn.Module, Redundancy]:
    model = DistributedDataParallel(net)
    rate = RATES[kind]["tensor"]
    optimizer = Redundancy(unnamed_groups(model), optimizer_class=CLASSES[kind], lr=rate, scope=scope, **OPTIONS[kind])
    optimizer.optim.name_parameters(model.named_parameters())
    return model, optimizer


def against_one_process(
    model: nn.Module, optimizer: Redundancy | AMAdamW | AMSGD, kind: str, steps: range
) -> dict[str, Any]:
    """Train on, and compare raw beta_t of this rank's tensors, and all weights."""
    inner = getattr(optimizer, "optim", optimizer)
    share = (0, 1) if inner is optimizer else everyone()
    with raw_betas("tensor") as raw, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        seen = train(model, optimizer, steps, DTYPE, share=share, rate=RATES[kind]["tensor"])
    single = reference(kind, "tensor", DTYPE, False)
    names = inner.parameter_names()
    rows = zip(raw, single["raw"][steps.start : steps.stop], strict=True)
    pairs = [(ours, theirs[name]) for row, theirs in rows for name, ours in zip(names, row, strict=True)]
    betas = zip(seen, single["seen"][steps.start : steps.stop], strict=True)
    pairs += [(beta, theirs[name]) for ours, theirs in betas for name, beta in ours.items()]
    found = {"error": max(raw_error(ours, theirs) for ours, theirs in pairs), "names": sorted(names)}
    found["warned"] = [str(w.message) for w in warned if "replica_group" in str(w.message)]
    if steps.stop == STEPS:
        weights = {strip_wrappers(n): p.detach() for n, p in model.named_parameters()}
        off = [float((weights[n] - w).abs().max() / w.abs().max()) for n, w in single["weights"].items()]
        found["weights"], found["share"], found["all"] = max(off), single["share"], sorted(single["weights"])
    return found


def run(kind: str) -> dict[str, Any]:
    model, optimizer = wrapped(make_net(DTYPE), kind, "tensor")
    return against_one_process(model, optimizer, kind, range(STEPS))


def refused(kind: str, scope: str) -> dict[str, Any]:
    model, optimizer = wrapped(make_net(DTYPE), kind, scope)
    before = [param.detach().clone() for param in model.parameters()]
    text = None
    try:
        train(model, optimizer, range(1), DTYPE, share=everyone())
    except ValueError as error:
        text = str(error)
    same = all(torch.equal(param, b) for param, b in zip(model.parameters(), before, strict=True))
    return {"text": text, "moved": not same, "states": len(optimizer.optim.state)}


def clip_the_inner_optimizer() -> str | None:
    """Clip the inner optimizer: the norm of this rank's tensors is not the model's."""
    model, optimizer = wrapped(make_net(DTYPE), "adamw", "tensor")
    train(model, optimizer, range(1), DTYPE, share=everyone())
    try:
        clip_grad_norm_(optimizer.optim, 1.0)
    except ValueError as error:
        return str(error)
    return None


def frames_walked(kind: str) -> list[int]:
    """Return how many frames of the call stack each of five steps looks at."""
    model, optimizer = wrapped(make_net(DTYPE), kind, "tensor")
    found = []
    for number in range(5):
        with count_frames() as counter:
            train(model, optimizer, range(number, number + 1), DTYPE, share=everyone())
        found.append(counter[0])
    return found


# ---------------------------------------------------------------- checkpoints
def consolidated(optimizer: Redundancy) -> dict[str, Any]:
    """Return the whole state dict from rank 0 on every rank."""
    optimizer.consolidate_state_dict(to=0)
    box = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def resume(kind: str, start: str, end: str) -> dict[str, Any]:
    """Make STOP steps with ``start`` and the others with ``end``: each is "many" ranks or one "alone"."""
    net = make_net(DTYPE)
    model, optimizer = wrapped(net, kind, "tensor") if start == "many" else alone(net, kind)
    first = against_one_process(model, optimizer, kind, range(STOP))
    saved = consolidated(optimizer) if start == "many" else optimizer.state_dict()
    fresh = make_net(DTYPE)
    fresh.load_state_dict(net.state_dict())
    model, optimizer = wrapped(fresh, kind, "tensor") if end == "many" else alone(fresh, kind)
    optimizer.load_state_dict(copy.deepcopy(saved))
    found = against_one_process(model, optimizer, kind, range(STOP, STEPS))
    options = {key for group in optimizer.param_groups for key in group}
    return {"before": first["error"], "options": options, **found}


def alone(net: nn.Module, kind: str) -> tuple[nn.Module, AMAdamW | AMSGD]:
    rate = RATES[kind]["tensor"]
    optimizer = CLASSES[kind](unnamed_groups(net), lr=rate, scope="tensor", **OPTIONS[kind])
    optimizer.name_parameters(net.named_parameters())
    return net, optimizer


def low_precision() -> dict[str, Any]:
    """Train bfloat16 parameters: dtypes and values of the scalars after a load and after the next step."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(5, 3, generator=generator).to(torch.bfloat16) for _ in range(5 * 4)]

    def build() -> tuple[list[nn.Parameter], Redundancy]:
        params = [nn.Parameter(torch.ones(5, 3, dtype=torch.bfloat16)) for _ in range(4)]
        return params, Redundancy(params, optimizer_class=AMAdamW, lr=0.1, scope="tensor")

    def step(params: list[nn.Parameter], optimizer: Redundancy, number: int) -> None:
        for i, param in enumerate(params):
            param.grad = grads[4 * number + i].clone()
        optimizer.step()

    params, optimizer = build()
    for number in range(4):
        step(params, optimizer, number)
    saved = consolidated(optimizer)
    other_params, other = build()
    with torch.no_grad():
        for target, source in zip(other_params, params, strict=True):
            target.copy_(source)
    other.load_state_dict(copy.deepcopy(saved))
    betas = [float(beta) for beta in optimizer.optim.momentum().values()]
    step(params, optimizer, 4)
    step(other_params, other, 4)
    states = [other.optim.state[param] for param in other_params if param in other.optim.state]
    pairs = zip(optimizer.optim.momentum().values(), other.optim.momentum().values(), strict=True)
    return {
        "dtypes": sorted({str(state[key].dtype) for state in states for key in ("beta", "beta_prod", "prev_lr")}),
        "same": all(torch.equal(a, b) for a, b in pairs)
        and all(torch.equal(a, b) for a, b in zip(params, other_params, strict=True)),
        "betas": betas + [float(beta) for beta in other.optim.momentum().values()],
    }
