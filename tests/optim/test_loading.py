"""Foreign checkpoints: which ones load, and that a refusal changes nothing. Names, copies, small devices."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from am_lightning.optim import param_state
from tests.optim.harness import params_of


def param(value: float = 1.0) -> torch.nn.Parameter:
    result = torch.nn.Parameter(torch.full((3,), value))
    result.grad = torch.tensor([0.1, -0.2, 0.3])
    return result


def stepped(**options) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([param()], lr=0.1, **options)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"betas": (torch.tensor(0.8), torch.tensor(0.9))}]
)
def test_any_adamw_checkpoint_loads(options) -> None:
    saved = stepped(**options).state_dict()
    optimizer = AMAdamW([param()], betas=(0.7, 0.99))
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert group["fused"] is None and group["betas"][0] == group["beta1_max"] == 0.7
    assert isinstance(group["betas"][1], float)
    state = optimizer.state[group["params"][0]]
    assert float(state["beta_prod"]) == pytest.approx(float(saved["param_groups"][0]["betas"][0]))
    optimizer.step()


def test_keys_that_a_checkpoint_lacks_keep_the_optimizers_values() -> None:
    saved = stepped().state_dict()
    optimizer = AMAdamW([{"params": [param()], "lambd": 0.7}])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lambd"] == 0.7


def test_the_cap_of_a_checkpoint_is_not_taken() -> None:
    """A run keeps its own cap; the decay of the second moment comes from the checkpoint."""
    saved = AMAdamW([param()], betas=(0.6, 0.9))
    saved.step()
    optimizer = AMAdamW([param()], betas=(0.8, 0.99))
    optimizer.load_state_dict(saved.state_dict())
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.8, 0.9) and group["beta1_max"] == 0.8
    sgd = AMSGD([param()], beta_max=0.5)
    sgd.load_state_dict(AMSGD([param()], beta_max=0.9).state_dict())
    assert sgd.param_groups[0]["beta_max"] == 0.5


def test_a_state_that_somebody_replaces_is_read() -> None:
    """The scalars are packed behind the states, but a value put into a state takes effect."""
    optimizer = AMAdamW([param()])
    optimizer.step()
    (state,) = optimizer.state.values()
    state["step"] = torch.tensor(41.0)
    optimizer.step()
    assert float(state["step"]) == 42.0
    optimizer.step()
    assert float(state["step"]) == 43.0


def test_moments_of_another_shape_are_refused_though_they_have_as_many_elements() -> None:
    wide, tall = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3, 2)))
    wide.grad = torch.ones_like(wide)
    optimizer = torch.optim.AdamW([wide])
    optimizer.step()
    with pytest.raises(ValueError, match=r"'exp_avg' of shape \(2, 3\) .* which has shape \(3, 2\)"):
        AMAdamW([tall]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("bad", ["amsgrad", "lr", "shape"])
def test_what_does_not_load_changes_nothing(bad: str) -> None:
    saved = copy.deepcopy(stepped(amsgrad=bad == "amsgrad").state_dict())
    if bad == "lr":
        saved["param_groups"][0]["lr"] = float("nan")
    if bad == "shape":
        saved["state"][0]["exp_avg"] = torch.zeros(4)
    optimizer = AMAdamW([param()])
    before = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match={"amsgrad": "amsgrad", "lr": "learning rate", "shape": "shape"}[bad]):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0] == before
    assert not optimizer.state


def two_steps(optimizer_class=AMAdamW) -> dict:
    """Return a state_dict of two named parameters."""
    optimizer = named(optimizer_class)
    optimizer.step()
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def refuses(optimizer: torch.optim.Optimizer, saved: dict, words: str) -> None:
    """Require that ``saved`` is refused and nothing changes."""
    optimizer.step()
    before, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params_of(optimizer)]
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())
    assert all(torch.equal(a, b) for a, b in zip(weights, params_of(optimizer), strict=True))


def named(optimizer_class=AMAdamW) -> torch.optim.Optimizer:
    return optimizer_class([("head.weight", param()), ("head.bias", param(2.0))], lr=0.1)


SUBSETS = [s for n in (1, 2) for s in itertools.combinations(param_state.SCALARS, n)]


@pytest.mark.parametrize("missing", SUBSETS, ids="+".join)
@pytest.mark.parametrize("optimizer_class", [AMAdamW, AMSGD])
def test_scalars_that_are_partly_missing_are_refused(optimizer_class, missing: tuple[str, ...]) -> None:
    saved = two_steps(optimizer_class)
    for key in missing:
        del saved["state"][1][key]
    words = f"lacks {' and '.join(map(repr, missing))} for parameter 'head.bias'.*remove 'beta_prod', 'beta'"
    refuses(named(optimizer_class), saved, words)


@pytest.mark.parametrize("bare", [0, 1])
def test_scalars_of_some_parameters_only_are_refused(bare: int) -> None:
    saved = two_steps()
    for key in param_state.SCALARS:
        del saved["state"][bare][key]
    names = ["head.weight", "head.bias"]
    refuses(named(), saved, f"for parameter '{names[1 - bare]}' but not for '{names[bare]}'")


def test_a_parameter_that_never_stepped_may_lack_scalars() -> None:
    """Such a parameter has no state, or a state of step 0 that was made for a checkpoint."""
    for absent in (True, False):
        saved = two_steps()
        state = saved["state"].pop(1)
        if not absent:
            saved["state"][1] = {key: torch.zeros_like(state[key]) for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer = named()
        optimizer.load_state_dict(saved)
        assert float(optimizer.state[params_of(optimizer)[0]]["step"]) == 2.0
        optimizer.step()


@pytest.mark.parametrize("unset", [param_state.NO_BETA, float("nan")])
def test_scalars_that_nothing_was_loaded_into_are_those_of_adamw(unset: float) -> None:
    """torch.distributed.checkpoint loads AdamW's checkpoint into a part of a fresh AMAdamW's state."""
    saved = two_steps(torch.optim.AdamW)
    for state in saved["state"].values():
        state |= {"beta_prod": torch.tensor(1.0), "beta": torch.tensor(unset), "prev_lr": torch.tensor(0.0)}
    optimizer = named()
    optimizer.load_state_dict(saved)
    for p in params_of(optimizer):
        state = optimizer.state[p]
        assert float(state["beta_prod"]) == pytest.approx(0.9**2) and float(state["prev_lr"]) == pytest.approx(0.1)
        assert float(state["beta"]) == pytest.approx(0.89)


def test_a_state_in_which_no_step_was_made_stays_one() -> None:
    saved = two_steps(torch.optim.AdamW)
    for state in saved["state"].values():
        state |= {"beta_prod": torch.tensor(1.0), "beta": torch.tensor(param_state.NO_BETA)}
        state |= {"prev_lr": torch.tensor(0.0), "step": torch.tensor(0.0)}
    optimizer = named()
    optimizer.load_state_dict(saved)
    assert all(torch.isnan(beta) for beta in optimizer.momentum().values())
    assert all(float(optimizer.state[p]["beta_prod"]) == 1.0 for p in params_of(optimizer))


def test_a_message_has_the_name_that_name_parameters_gave() -> None:
    saved = two_steps()
    saved["state"][1]["exp_avg"] = torch.zeros(4)
    optimizer = AMAdamW([param(), param()])
    optimizer.name_parameters(zip(["a", "module.b"], params_of(optimizer), strict=True))
    with pytest.raises(ValueError, match="for parameter 'b', which has shape"):
        optimizer.load_state_dict(saved)


def line() -> tuple[torch.nn.Linear, AMSGD]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    return model, AMSGD(model.named_parameters(), lr=0.3, loss_gap="exact")


def descend(model: torch.nn.Linear, optimizer: AMSGD) -> list[float]:
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3) ** 3

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    betas = []
    for _ in range(3):
        optimizer.step(closure)
        betas.append(float(optimizer.momentum()["weight"]))
    return betas


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_loss_of_the_exact_gap_goes_through_a_sharded_checkpoint(tmp_path) -> None:
    """torch.distributed.checkpoint reads only the keys of a fresh optimizer; the loss keeps all its digits."""
    model, optimizer = line()
    descend(model, optimizer)
    parts = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(parts, checkpoint_id=tmp_path)
    straight = descend(model, optimizer)
    other, resumed = line()
    parts = {"model": get_model_state_dict(other), "optim": get_optimizer_state_dict(other, resumed)}
    dcp.load(parts, checkpoint_id=tmp_path)
    set_model_state_dict(other, parts["model"])
    set_optimizer_state_dict(other, resumed, parts["optim"])
    assert descend(other, resumed) == straight and 0 < straight[0] < 0.9


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_names_survive_a_copy(clone) -> None:
    optimizer = AMAdamW([param()])
    optimizer.name_parameters([("module.w", optimizer.param_groups[0]["params"][0])])
    assert list(clone(optimizer).momentum()) == ["w"]


def test_sgd_takes_a_tensor_lr_with_foreach() -> None:
    optimizer = AMSGD([param()], lr=torch.tensor(0.1), foreach=True)
    optimizer.step()
    torch.testing.assert_close(optimizer.param_groups[0]["params"][0].detach(), 1 - 0.1 * param().grad)


def test_the_exact_gap_wants_one_lr_tensor() -> None:
    groups = [{"params": [param()], "lr": torch.tensor(0.1)}, {"params": [param()], "lr": torch.tensor(0.1)}]
    with pytest.raises(ValueError, match="one lr"):
        AMSGD(groups, loss_gap="exact").step(lambda: 1.0)


class NoFloat64(TorchDispatchMode):
    """A device without float64, such as mps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, func
        return result


@pytest.mark.parametrize("optimizer_class", [AMAdamW, AMSGD])
def test_a_device_without_float64(monkeypatch, optimizer_class) -> None:
    monkeypatch.setattr(param_state, "widest_dtype", lambda device: torch.float32)
    with NoFloat64():
        optimizer = optimizer_class([param()], foreach=True)
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        optimizer.report()
        optimizer.momentum()
        if optimizer_class is AMAdamW:
            optimizer.load_state_dict(stepped().state_dict())
            optimizer.step()
