"""Groups added during a run, learning-rate schedulers, and momentum()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from am_lightning import AMSGD, AMAdamW
from tests.optim.harness import (
    KERNELS,
    SCOPES,
    Bowl,
    Twin,
    as_grads,
    build,
    make_oracle,
    named_params,
    oracle_options,
    params_of,
    run_bowl,
    to_numpy,
)
from tests.optim.test_every_step import RATES

SHAPES = [(6, 4), (9,), ()]
LATE = [(5, 2), (3,)]


def bowl_step(twin: Twin, bowl: Bowl) -> None:
    """Make one step at the lr that a scheduler has set."""
    for group, mirror in zip(twin.optimizer.param_groups, twin.oracle.groups, strict=True):
        mirror["lr"] = float(group["lr"])
    twin.step(as_grads(bowl.grads([s.x for s in twin.oracle.slots]), twin.params))


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_group_added_in_mid_run(kind: str, scope: str, foreach: bool | None) -> None:
    """The new tensor adds nothing to the shared sums of its first step; its t and prod beta are its own."""
    optimizer = build(kind, named_params(SHAPES, torch.float64), lr=0.1, scope=scope, foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer, scope=scope))
    run_bowl(twin, Bowl.around(SHAPES, seed=1), [(r,) for r in RATES[kind]])
    late = [(f"late{i}", p) for i, (_, p) in enumerate(named_params(LATE, torch.float64, seed=9))]
    cap = {"betas": (0.6, 0.9)} if kind == "adamw" else {"beta_max": 0.5}
    before = optimizer.describe()
    optimizer.add_param_group({"params": late, "lr": 0.3, "weight_decay": 0.05, **cap})
    assert optimizer.layout is not None and optimizer.describe() == before != "no step made yet"  # the steps so far
    group = optimizer.param_groups[-1]
    twin.oracle.add_group({"params": [to_numpy(p) for _, p in late], **oracle_options(optimizer, group)})
    assert list(optimizer.momentum()) == ["w0", "w1", "w2", "late0", "late1"]
    run_bowl(twin, Bowl.around(SHAPES + LATE, seed=2), [(r, 0.7 * r) for r in RATES[kind] * 2])
    twin.assert_not_vacuous()
    assert [float(optimizer.state[p]["step"]) for p in twin.params] == [15.0] * 3 + [10.0] * 2


@pytest.mark.filterwarnings("ignore:the learning rate scheduler cycles betas")
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_schedulers_are_followed_every_step(kind: str) -> None:
    makers: dict[str, Any] = {
        "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: [1.0, 0.2, 0.7, 0.0, 0.9][i % 5]),
        "warmup from zero": lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LambdaLR(o, lambda i: i / 4), lr_scheduler.CosineAnnealingLR(o, 8)],
            milestones=[4],
        ),
        "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
        "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=14, cycle_momentum=kind == "adamw"),
    }
    for name, maker in makers.items():
        optimizer = build(kind, named_params(SHAPES, torch.float64), lr=0.9)
        twin = Twin(optimizer, make_oracle(optimizer, scope="tensor" if kind == "adamw" else "global"))
        scheduler, bowl = maker(optimizer), Bowl.around(SHAPES, seed=3)
        for _ in range(12):
            bowl_step(twin, bowl)
            scheduler.step()
        assert twin.interior > 0, name


def test_one_cycle_moves_betas_but_not_the_cap() -> None:
    """OneCycleLR overwrites betas[0] at once and at every step; the cap is kept in beta1_max."""
    optimizer = AMAdamW(named_params(SHAPES, torch.float64), lr=0.5, betas=(0.3, 0.99))
    oracle = make_oracle(optimizer)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=12)
    assert optimizer.param_groups[0]["betas"][0] == 0.95
    twin, bowl = Twin(optimizer, oracle), Bowl.around(SHAPES, seed=3)
    with pytest.warns(UserWarning, match="cycles betas.0., which adaptive memory does not use") as told:
        for _ in range(10):
            bowl_step(twin, bowl)
            scheduler.step()
    assert len(told) == 1
    assert optimizer.param_groups[0]["beta1_max"] == 0.3
    assert max(twin.betas) <= 0.3 + 1e-15
    fresh = AMAdamW(named_params(SHAPES, torch.float64), betas=(0.3, 0.5))
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["beta1_max"] == 0.3 and fresh.param_groups[0]["betas"] == (0.3, 0.99)


def step_with(optimizer: torch.optim.Optimizer, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    for p in params_of(optimizer):
        p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_momentum_before_the_first_step_is_nan(kind: str) -> None:
    optimizer = build(kind, named_params(SHAPES, torch.float32))
    momentum = optimizer.momentum()
    assert list(momentum) == ["w0", "w1", "w2"]
    assert all(torch.isnan(b) and b.dim() == 0 for b in momentum.values())
    assert not optimizer.state, "reading momentum() must not create state"


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_momentum_is_a_snapshot(kind: str) -> None:
    optimizer = build(kind, named_params(SHAPES, torch.float64), lr=0.5, lambd=0.0)
    step_with(optimizer, 0)
    early = optimizer.momentum()
    kept = {name: float(b) for name, b in early.items()}
    for seed in range(1, 6):
        step_with(optimizer, seed)
    assert {name: float(b) for name, b in early.items()} == kept
    assert {name: float(b) for name, b in optimizer.momentum().items()} != kept
    optimizer.momentum()["w0"].fill_(123.0)
    assert float(optimizer.momentum()["w0"]) != 123.0
    flag = optimizer.last_step_skipped
    params_of(optimizer)[0].grad = torch.full_like(params_of(optimizer)[0], float("nan"))
    optimizer.step()
    assert not bool(flag) and bool(optimizer.last_step_skipped)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_unnamed_parameters_get_distinct_keys(kind: str) -> None:
    params = [p for _, p in named_params([(2,), (3,), (4,)], torch.float32)]
    optimizer = build(kind, [{"params": params[:2]}, {"params": params[2:]}])
    assert list(optimizer.momentum()) == ["0.0", "0.1", "1.0"]
    step_with(optimizer, 0)
    assert list(optimizer.momentum()) == ["0.0", "0.1", "1.0"]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_wrapper_prefixes_are_stripped(kind: str) -> None:
    names = [
        "module.layers.0.weight",
        "_orig_mod.layers.1.weight",
        "_forward_module.module._fsdp_wrapped_module.layers.2._checkpoint_wrapped_module.weight",
        "submodule.weight",
        "layers.module_list.weight",
    ]
    params = [(n, torch.nn.Parameter(torch.ones(2))) for n in names]
    expected = [
        "layers.0.weight",
        "layers.1.weight",
        "layers.2.weight",
        "submodule.weight",
        "layers.module_list.weight",
    ]
    assert list(build(kind, params).momentum()) == expected


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_absent_parameter_keeps_its_last_beta(kind: str) -> None:
    optimizer = build(kind, named_params(SHAPES, torch.float64), lr=0.5, scope="tensor")
    for seed in range(3):
        step_with(optimizer, seed)
    before = {n: float(b) for n, b in optimizer.momentum().items()}
    params = params_of(optimizer)
    params[0].grad = None
    optimizer.param_groups[0]["lr"] = 0.01  # a large eta_{t-1} / eta_t and a reversed gradient make beta 0
    for p in params[1:]:
        p.grad = -3.0 * optimizer.state[p]["exp_avg" if kind == "adamw" else "momentum_buffer"]
    frozen = [params[0].detach().clone(), *(v.clone() for v in optimizer.state[params[0]].values())]
    optimizer.step()
    after = {n: float(b) for n, b in optimizer.momentum().items()}
    assert after["w0"] == before["w0"] and after["w1"] != before["w1"]
    now = [params[0].detach(), *optimizer.state[params[0]].values()]
    assert all(torch.equal(a, b) for a, b in zip(frozen, now, strict=True))


@pytest.mark.parametrize("scope", SCOPES)
def test_what_a_scope_shares(scope: str) -> None:
    """ "tensor": all differ; "group": equal inside a group; "global": one value for the model."""
    params = named_params([(6,), (7,), (8,), (9,)], torch.float64)
    optimizer = AMSGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.5, scope=scope, beta_max=1.0, lambd=0.0)
    twin = Twin(optimizer, make_oracle(optimizer, scope=scope))
    run_bowl(twin, Bowl.around([(6,), (7,), (8,), (9,)], seed=2), [(r, r) for r in (1.9, 1.5, 1.2, 1.7)])
    betas = [float(b) for b in optimizer.momentum().values()]
    assert all(0.0 < b < 1.0 for b in betas)
    assert len(set(betas)) == {"tensor": 4, "group": 2, "global": 1}[scope]


def test_closure_runs_first_with_gradients_enabled_and_its_value_is_returned() -> None:
    """Lightning runs forward, backward and clipping inside the closure."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AMAdamW([p], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss.detach()) == 3.0 and not torch.equal(p.detach(), torch.ones(3))
    assert float(optimizer.state[p]["step"]) == 1.0
