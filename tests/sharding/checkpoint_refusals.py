"""Functions that each rank runs: they load states that are placed unlike the parameters or are another model's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from am_lightning import AMAdamW
from tests.sharding.layouts import everyone, mesh

FULL = StateDictOptions(full_state_dict=True)
Pair = tuple[nn.Module, AMAdamW]


def model_of(inputs: int, outputs: int, sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(inputs, outputs).double()
    return fully_shard(model, mesh=mesh(everyone()[1])) if sharded else model


def stepped(model: nn.Module, steps: int = 2) -> Pair:
    optimizer = AMAdamW(model.named_parameters(), lr=0.1)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: AMAdamW, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, model.in_features, dtype=torch.float64)).square().sum().backward()
        optimizer.step()


def replaced(state_dict: dict[str, Any], place: Callable[[Tensor], DTensor]) -> dict[str, Any]:
    """Return the same values with another placement."""
    result = copy.deepcopy(state_dict)
    for state in result["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = place(state[key].full_tensor())
    return result


def whole_into_shards(sharded: Pair) -> None:
    sharded[1].load_state_dict(get_optimizer_state_dict(*stepped(model_of(6, 4, True)), options=FULL))


def whole_by_id_into_shards(sharded: Pair) -> None:
    sharded[1].load_state_dict(stepped(model_of(6, 4, False))[1].state_dict())


def other_dimension(sharded: Pair) -> None:
    state_dict = sharded[1].state_dict()
    grid = sharded[0].weight.device_mesh
    state_dict["state"] = {0: state_dict["state"][0]}
    sharded[1].load_state_dict(replaced(state_dict, lambda whole: distribute_tensor(whole, grid, [Shard(1)])))


def other_mesh(sharded: Pair) -> None:
    """Return the same placement over the ranks in the opposite order."""
    grid = DeviceMesh("cpu", list(reversed(range(everyone()[1]))))
    sharded[1].load_state_dict(
        replaced(sharded[1].state_dict(), lambda whole: distribute_tensor(whole, grid, [Shard(0)]))
    )


def other_model(sharded: Pair) -> None:
    sharded[1].load_state_dict(stepped(model_of(5, 8, True))[1].state_dict())


def other_model_by_dcp(sharded: Pair) -> None:
    other = get_optimizer_state_dict(*stepped(model_of(5, 8, True)), options=FULL)
    set_optimizer_state_dict(*sharded, other, options=FULL)


CASES = {
    "whole": whole_into_shards,
    "whole by id": whole_by_id_into_shards,
    "dimension": other_dimension,
    "mesh": other_mesh,
    "model": other_model,
    "model by dcp": other_model_by_dcp,
}


def snapshot(pair: Pair) -> list[Any]:
    model, optimizer = pair
    tensors = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    values = [(t.to_local() if isinstance(t, DTensor) else t).tolist() for t in tensors]
    return [values, [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]]


def attempted(pair: Pair, load: Callable[[Pair], None]) -> dict[str, Any]:
    """Return the error, and whether nothing has changed."""
    before = snapshot(pair)
    try:
        load(pair)
    except ValueError as error:
        return {"text": str(error), "untouched": snapshot(pair) == before}
    return {"text": "loaded", "untouched": False}


def refused(case: str) -> dict[str, Any]:
    return attempted(stepped(model_of(6, 4, True)), CASES[case])


def shards_into_whole() -> dict[str, Any]:
    states = stepped(model_of(6, 4, True))[1].state_dict()
    return attempted(stepped(model_of(6, 4, False)), lambda pair: pair[1].load_state_dict(states))


def partly_by_dcp(missing: list[str]) -> dict[str, Any]:
    """Load a full state dict that lacks a scalar, of which torch.distributed.checkpoint keeps the fresh value."""
    states = get_optimizer_state_dict(*stepped(model_of(6, 4, True)), options=FULL)
    for state in states["state"].values():
        for key in missing:
            del state[key]
    model = model_of(6, 4, True)
    fresh = AMAdamW(model.named_parameters(), lr=0.1)
    get_optimizer_state_dict(model, fresh)  # creates the state to compare with
    return attempted((model, fresh), lambda pair: set_optimizer_state_dict(*pair, states, options=FULL))


def spoiled_on_one_rank(key: str, value: float) -> dict[str, Any]:
    """Spoil the last rank's shard in a state dict."""
    pair = stepped(model_of(6, 4, True))
    states = copy.deepcopy(pair[1].state_dict())
    rank, world = everyone()
    if rank == world - 1:
        states["state"][0][key].to_local().view(-1)[-1] = value
    return attempted(pair, lambda loaded: loaded[1].load_state_dict(states))


def own_shards_through_a_file() -> bool:
    """Save each rank's own state_dict by torch.save and load it: other mesh objects, the same placement."""
    model, optimizer = stepped(model_of(6, 4, True))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, 3)
    file.seek(0)
    weights, states = torch.load(file, weights_only=False)
    other = model_of(6, 4, True)
    resumed = AMAdamW(other.named_parameters(), lr=0.1)
    other.load_state_dict(weights)
    resumed.load_state_dict(states)
    train(other, resumed, 3)
    return snapshot((model, optimizer)) == snapshot((other, resumed))
