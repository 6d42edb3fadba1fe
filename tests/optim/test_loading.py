"""Foreign checkpoints: what loads, and that what does not leaves everything as it was. Names, copies, small devices."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from am_lightning.optim import state as row_state


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


@pytest.mark.parametrize("bad", ["amsgrad", "lr", "shape"])
def test_what_does_not_load_changes_nothing(bad: str) -> None:
    saved = copy.deepcopy(stepped(amsgrad=bad == "amsgrad").state_dict())
    if bad == "lr":
        saved["param_groups"][0]["lr"] = -1.0
    if bad == "shape":
        saved["state"][0]["exp_avg"] = torch.zeros(4)
    optimizer = AMAdamW([param()])
    before = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match={"amsgrad": "amsgrad", "lr": "learning rate", "shape": "shape"}[bad]):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0] == before
    assert not optimizer.state


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
    monkeypatch.setattr(row_state, "widest_dtype", lambda device: torch.float32)
    with NoFloat64():
        optimizer = optimizer_class([param()], foreach=True)
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        optimizer.report()
        optimizer.momentum()
        if optimizer_class is AMAdamW:
            optimizer.load_state_dict(stepped().state_dict())
            optimizer.step()


def test_bench_prints_a_row_for_each_optimizer() -> None:
    command = [sys.executable, "-m", "am_lightning.bench", "--model", "many-tiny", "--repeats", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    rows = json.loads(done.stdout)["rows"]
    assert {row["optimizer"] for row in rows} >= {"AdamW foreach", "AdamW fused", "AMAdamW eager", "AMAdamW foreach"}
    assert all(row["ms"] > 0 and row["x foreach"] > 0 for row in rows)
    refused = subprocess.run([*command[:-3], "--repeats", "0"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "--repeats must be >= 1" in refused.stderr
