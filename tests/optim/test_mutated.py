"""Broken state dicts and groups: refused by name with nothing changed, or loaded, and steps work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from am_lightning import AMSGD, AMAdamW
from am_lightning.optim import checkpointing
from tests.optim import mutated
from tests.optim.mutated_values import same

BATCH = 200
BATCHES = [pytest.param(n, marks=[] if n == 0 else pytest.mark.nightly("mutated state dicts")) for n in range(50)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", BATCHES)
def test_mutated_state_dicts(batch: int) -> None:
    ends = [mutated.load_case(seed) for seed in range(batch * BATCH, (batch + 1) * BATCH)]
    assert not [end for end in ends if end[0] == "wrong"]
    assert {end for end, _ in ends} == {"refused", "loaded"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "batch", [n if n == 0 else pytest.param(n, marks=pytest.mark.nightly("mutated groups")) for n in range(5)]
)
def test_mutated_groups(batch: int) -> None:
    ends = [mutated.group_case(seed) for seed in range(batch * 100, (batch + 1) * 100)]
    assert not [end for end in ends if end[0] == "wrong"]
    assert {end for end, _ in ends} == {"refused", "stepped"}


def trained(kind: Any = AMAdamW, **options: Any) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    optimizer = kind(model.named_parameters(), lr=0.1, **options)
    return model, step(model, optimizer)


def step(model: torch.nn.Module, optimizer: Any) -> Any:
    model(torch.ones(3)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq", "beta_prod", "beta", "prev_lr"])
def test_a_flat_dict_that_lacks_an_entry_is_refused_by_name(key: str) -> None:
    """torch.distributed.checkpoint inserts an empty dict (2.6 refuses it), and AdamW's next step fails."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = trained()
    saved: Any = get_optimizer_state_dict(model, optimizer, options=flat)
    del saved[f"state.1.weight.{key}"]
    before = copy.deepcopy(optimizer.state_dict())
    named = rf"{key!r}.* for parameter '1.weight'|'state\.1\.weight\.{key}'"
    with pytest.raises((ValueError, KeyError), match=named):
        set_optimizer_state_dict(model, optimizer, saved, options=flat)
    assert same(optimizer.state_dict(), before)


def broken(**changes: Any) -> dict[str, Any]:
    """Return a state dict with changes to the state of its last parameter."""
    saved = copy.deepcopy(trained()[1].state_dict())
    saved["state"][3] |= changes
    return saved


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "3"}, r"a str as 'step' for parameter '1.bias' \(step must be a finite number >= 0\)"),
        ({"step": -1.0}, "'step' = -1.0 for parameter '1.bias'"),
        ({"step": torch.tensor([1.0, 2.0])}, r"a torch.float32 tensor of shape \(2,\) as 'step'"),
        ({"exp_avg": 0.5}, "a float as 'exp_avg' for parameter '1.bias', not a tensor"),
        ({"exp_avg": torch.tensor([float("nan"), 0.0])}, "nan or inf in 'exp_avg' for parameter '1.bias'"),
        ({"exp_avg": torch.tensor([1e30, 0.0])}, r"1e\+30 in 'exp_avg' for parameter '1.bias', whose square overflows"),
        ({"exp_avg_sq": torch.tensor([-1.0, 0.0])}, "-1 in 'exp_avg_sq' for parameter '1.bias'"),
        ({"beta_prod": 1.5}, r"'beta_prod' = 1.5 for parameter '1.bias' \(beta_prod must be a number in \[0, 1\]\)"),
        ({"prev_lr": float("inf")}, "'prev_lr' = inf for parameter '1.bias'"),
        ({"extra": torch.empty(2, device="meta")}, "device meta.* as 'extra' for parameter '1.bias'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_fail_or_poison_the_next_step_is_named(changes: dict[str, Any], words: str) -> None:
    _, optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words) as caught:
        optimizer.load_state_dict(broken(**changes))
    assert "rank" not in str(caught.value)  # only one rank
    assert same(optimizer.state_dict(), before)


def test_moments_that_are_not_finite_load_where_steps_may_be() -> None:
    """``nonfinite="propagate"`` does what AdamW does."""
    _, optimizer = trained(nonfinite="propagate")
    optimizer.load_state_dict(broken(exp_avg=torch.tensor([float("nan"), 0.0])))


def test_keys_that_became_strings_are_refused() -> None:
    """A JSON file turns keys into strings. AdamW loads them and loses all moments."""
    _, optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"] = {str(key): state for key, state in saved["state"].items()}
    with pytest.raises(ValueError, match=r"no state of parameter '0.weight' .*but one of '0', which no group lists"):
        optimizer.load_state_dict(saved)
    saved["state"] = {int(key): state for key, state in saved["state"].items()} | {"9": saved["state"]["0"], "note": 1}
    optimizer.load_state_dict(saved)  # states of no parameter are kept, as AdamW does


def test_one_id_for_two_parameters_is_refused() -> None:
    """AdamW gives the state to the last parameter and drops the other states."""
    saved = broken()
    saved["param_groups"][0]["params"] = [0, 1, 1, 3]
    with pytest.raises(ValueError, match=r"lists 1 for parameter '0.bias' and for '1.weight'"):
        trained()[1].load_state_dict(saved)


def test_one_step_in_a_list_is_a_step() -> None:
    model, optimizer = trained()
    optimizer.load_state_dict(broken(step=torch.tensor([1.0])))
    assert step(model, optimizer).state[model[1].bias]["step"].shape == ()


def test_a_load_that_fails_in_the_middle_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out after torch.optim has replaced the states."""
    model, optimizer = trained()
    saved, before = broken(step=torch.tensor(5.0)), copy.deepcopy(optimizer.state_dict())

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(checkpointing, "take_tables", fail)
    with pytest.raises(MemoryError):
        optimizer.load_state_dict(saved)
    monkeypatch.undo()
    assert same(optimizer.state_dict(), before)
    step(model, optimizer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": "0.1"}, "parameter group 0: Invalid learning rate: '0.1'"),
        ({"lr": float("nan")}, "parameter group 0: Invalid learning rate: nan"),
        ({"lr": 1e300}, r"parameter group 0: Invalid lr: 1e\+300 \(lr must be a number within float32"),
        ({"betas": (0.9, 1.5)}, "parameter group 0: Invalid beta parameter at index 1: 1.5"),
        ({"beta1_max": None}, "parameter group 0: Invalid beta1_max: None"),
        ({"params": torch.ones(2)}, r"parameter group 0 has a torch.float32 tensor of shape \(2,\) as 'params'"),
        ({"params": [0.5]}, "parameter group 0: an optimizer can only optimize Tensors, but .* a float"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_step_names_the_group_and_its_option_before_it_moves(changes: dict[str, Any], words: str) -> None:
    model, optimizer = trained()
    before = [p.detach().clone() for p in model.parameters()]
    kept = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(changes)
    with pytest.raises((TypeError, ValueError), match=words):
        step(model, optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.param_groups[0].update(kept)
    step(model, optimizer)
    assert not torch.equal(before[0], model[0].weight)


def test_the_last_lr_of_a_schedule_may_be_below_zero() -> None:
    """``LambdaLR(lambda t: 1 - t / n)`` falls slightly below zero one step too late; AdamW takes it, too."""
    model, optimizer = trained()
    for lr in (-1e-12, torch.tensor(-1e-12)):
        optimizer.param_groups[0]["lr"] = lr
        step(model, optimizer)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_parameter_in_two_groups_is_refused() -> None:
    model, optimizer = trained(AMSGD)
    optimizer.param_groups.append({"params": [model[0].weight]})
    with pytest.raises(ValueError, match="parameter groups 0 and 1: some parameters appear in more than one"):
        step(model, optimizer)
