"""Functions that a process with TRITON_INTERPRET=1 runs: whole steps of AMAdamW(fused=True) through Triton kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from am_lightning import AMAdamW, clip_grad_norm_
from am_lightning.optim.kernels.triton import check as triton_check
from am_lightning.optim.kernels.triton import kernels as triton_kernels
from tests.optim import huge
from tests.optim.harness import (
    Bowl,
    assert_bitwise,
    assert_close,
    named_params,
    params_of,
    run_bowl,
    snapshot,
    to_numpy,
    triton_on_cpu,
)
from tests.optim.test_every_step import SHAPES as EVERY_STEP_SHAPES
from tests.optim.test_every_step import drop_some, make_twin, schedule

triton_on_cpu(pytest.MonkeyPatch())  # until the process ends
SHAPES = [(33, 31), (7,), (), (0,), (1100,)]
TRITON = "Triton"


def make(groups: Any, **options: Any) -> AMAdamW:
    return AMAdamW(groups, **({"fused": True} | options))


def two_groups(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    named = named_params(SHAPES, dtype, seed)
    return [{"params": named[:2]}, {"params": named[2:], "weight_decay": 0.2, "betas": (0.8, 0.99)}]


def beside_oracle(variant: str, scope: str, dtype: str) -> None:
    """Make ten steps with two groups of different options and rates, absent gradients, and one that is not finite."""
    twin = make_twin("adamw", variant, scope, foreach=None, dtype=getattr(torch, dtype), fused=True)

    def edit(step: int, grads: list[Any]) -> None:
        drop_some(step, grads)
        if step == 5:
            grads[0][2, 2] = float("nan")

    run_bowl(twin, Bowl.around(EVERY_STEP_SHAPES, seed=7), schedule("adamw")[:10], edit)
    twin.assert_not_vacuous(0.1)
    assert f"{TRITON} for 6" in twin.optimizer.describe(), twin.optimizer.describe()


def _train(optimizer: AMAdamW, steps: int, *, start: int = 0, edit: Callable[[int, Any], None] | None = None) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for p in params_of(optimizer):
            p.grad = (torch.randn(p.shape, generator=generator) + 0.5 * p.detach().float()).to(p.dtype)
        if edit is not None:
            edit(step, params_of(optimizer))
        optimizer.step()


def beside_reference(scope: str) -> None:
    """Mixed dtypes and a tensor with its own strides agree to one rounding of the stored values."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]

    def groups() -> list[dict[str, Any]]:
        params = [
            torch.nn.Parameter(p.detach().to(dtype))
            for (_, p), dtype in zip(named_params(SHAPES, torch.float32), dtypes, strict=True)
        ]
        params.append(torch.nn.Parameter(torch.ones(4, 6, 2, 2).to(memory_format=torch.channels_last)))
        return [{"params": params[:3]}, {"params": params[3:], "lr": 0.04}]

    def edit(step: int, params: list[torch.Tensor]) -> None:
        params[-1].grad = params[-1].grad.contiguous()

    ours, plain = make(groups(), lr=0.05, scope=scope), make(groups(), lr=0.05, scope=scope, fused=False, foreach=False)
    for optimizer in (ours, plain):
        _train(optimizer, 3, edit=edit)
    assert f"{TRITON} for 6" in ours.describe(), ours.describe()
    for a, b in zip(ours.momentum().values(), plain.momentum().values(), strict=True):
        assert_close(float(a), float(b), 1e-2, "beta")  # the interpreter truncates bfloat16
    for p, q in zip(params_of(ours), params_of(plain), strict=True):
        tol = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(p.dtype, 1e-3)
        assert_close(to_numpy(p), to_numpy(q), tol, f"weights {p.dtype}")
        for key, value in ours.state[p].items():
            assert_close(to_numpy(value), to_numpy(plain.state[q][key]), tol, f"{key} of {p.dtype}")


def a_bad_step_leaves_no_trace() -> None:
    """A nan in one gradient changes no bit of any weight or state, and training continues."""
    optimizer = make(two_groups(), scope="tensor")
    _train(optimizer, 2)
    before = snapshot(optimizer)

    def spoil(step: int, params: list[torch.Tensor]) -> None:
        params[4].grad[1000] = float("nan")

    _train(optimizer, 1, start=2, edit=spoil)
    assert bool(optimizer.last_step_skipped)
    assert_bitwise(before, snapshot(optimizer))
    _train(optimizer, 1, start=3)
    assert not bool(optimizer.last_step_skipped)
    assert not torch.equal(before[0], params_of(optimizer)[0])


def again_and_resumed(exp_avg_dtype: str | None) -> None:
    """A second run, and one that a checkpoint interrupted, have the same bits."""
    low = None if exp_avg_dtype is None else getattr(torch, exp_avg_dtype)
    runs = [make(two_groups(), scope="global", exp_avg_dtype=low) for _ in range(2)]
    for optimizer in runs:
        _train(optimizer, 4)
    assert_bitwise(snapshot(runs[0]), snapshot(runs[1]))
    first = make(two_groups(), scope="global", exp_avg_dtype=low)
    _train(first, 2)
    second = make(two_groups(), scope="global", exp_avg_dtype=low)
    with torch.no_grad():
        for p, q in zip(params_of(second), params_of(first), strict=True):
            p.copy_(q)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _train(second, 2, start=2)
    assert_bitwise(snapshot(runs[0]), snapshot(second))


KINDS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]


def default_where_it_agrees() -> None:
    """The check of the first step finds the kernels right for every dtype, and the default becomes fused=True."""
    for dtypes in KINDS:
        assert triton_check.why_not(triton_check.Kind(torch.device("cpu"), *dtypes)) == "", dtypes
    pair = [make(two_groups(), fused=fused) for fused in (None, True)]
    for optimizer in pair:
        _train(optimizer, 2)
        assert f"{TRITON} for 5" in optimizer.describe(), optimizer.describe()
    assert_bitwise(snapshot(pair[0]), snapshot(pair[1]))


class Spoiled:
    """A kernel of which one input vector is off by a thousandth."""

    def __init__(self, kernel: Any, place: int) -> None:
        self._kernel, self._place = kernel, place

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            changed = [a * 1.001 if i == self._place else a for i, a in enumerate(args)]
            self._kernel[grid](*changed, **kwargs)

        return launch


def no_default_where_it_differs() -> None:
    """The check reads each number that a kernel reads, and a row that must not be written."""
    for name, places in (("sums_kernel", (4, 5)), ("update_kernel", (4, 6, 7, 8))):
        kernel = getattr(triton_kernels, name)
        for place in places:
            setattr(triton_kernels, name, Spoiled(kernel, place))
            try:
                reason = triton_check._difference(triton_check.Kind(torch.device("cpu")))
            finally:
                setattr(triton_kernels, name, kernel)
            assert "differ from the plain kernels" in reason, (name, place)


def low_precision_direction() -> None:
    """exp_avg in bfloat16 is rounded as by the plain kernels."""
    pair = [
        make(two_groups(), exp_avg_dtype=torch.bfloat16, **more) for more in ({}, {"fused": False, "foreach": False})
    ]
    for optimizer in pair:
        _train(optimizer, 1)
    same = total = 0
    for p, q in zip(*map(params_of, pair), strict=True):
        ours, plain = (optimizer.state[t]["exp_avg"] for optimizer, t in zip(pair, (p, q), strict=True))
        assert ours.dtype == torch.bfloat16
        same, total = same + int((ours == plain).sum()), total + ours.numel()
        assert_close(to_numpy(p), to_numpy(q), 1e-6, "weights")
    assert same >= 0.99 * total, f"{same} of {total}"  # float32's rounding of d' moves a few across a border


def tensor_lr() -> None:
    """With capturable=True and a tensor lr, changing the tensor alone takes effect."""
    lrs = [torch.tensor(0.1), 0.1]
    ours = make(two_groups(), lr=lrs[0], capturable=True)
    plain = make(two_groups(), lr=lrs[1])
    for step in range(3):
        lrs[0].fill_(0.1 / (1 + step))
        for group in plain.param_groups:
            group["lr"] = 0.1 / (1 + step)
        for optimizer in (ours, plain):
            _train(optimizer, 1, start=step)
    for p, q in zip(params_of(ours), params_of(plain), strict=True):
        assert_close(to_numpy(p), to_numpy(q), 1e-6, "weights")


def clipping_in_registers() -> None:
    """The weights equal those of clipping before the step, and the gradients are not written.

    They are equal to the bit, except for 0-dim tensors, which torch multiplies in float64.
    """
    pair = [make(two_groups(), lr=0.05) for _ in range(2)]
    for in_step, optimizer in enumerate(pair):
        for step in range(3):
            kept = _clip_and_step(optimizer, step, in_step=bool(in_step))
            same = [torch.equal(p.grad, grad) for p, grad in zip(params_of(optimizer), kept, strict=True) if p.numel()]
            assert all(same) if in_step else not any(same)
    for a, b in zip(*map(params_of, pair), strict=True):
        assert_close(to_numpy(a), to_numpy(b), 0 if a.dim() else 1e-6, "weights")


def _clip_and_step(optimizer: AMAdamW, step: int, *, in_step: bool) -> list[torch.Tensor]:
    """Clip the gradients before the step."""
    kept: list[torch.Tensor] = []

    def clip(_: int, params: list[torch.Tensor]) -> None:
        kept.extend(p.grad.clone() for p in params)
        clip_grad_norm_(optimizer, 0.3, in_step=in_step)

    _train(optimizer, 1, start=step, edit=clip)
    return kept


def huge_gradient(dtype: str, value: float, taken: bool) -> None:
    """The rule of the other kernels holds (test_huge_gradients.py), also if the gradient is scaled in registers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huge, "SHAPES", [(33, 3), (5,), (1100,)])
        if taken:
            huge.taken("adamw", dtype, value, fused=True)
            return
        huge.dropped("adamw", dtype, value, f"{TRITON} for 3", 2, fused=True)
        if dtype == "float32":
            huge.dropped("adamw", dtype, 1e30, f"{TRITON} for 3", clip=1e25, fused=True)
            huge.dropped("adamw", dtype, 1e30, f"{TRITON} for 3", exp_avg_dtype=torch.bfloat16, fused=True)


def under_another_default_device() -> None:
    """The bits are the same, also in a first step, which tries the kernels."""
    ends = []
    for device in ("cpu", "meta"):
        triton_check.why_not.cache_clear()
        optimizer = make(two_groups(), scope="group", lr=0.05, fused=None)
        for step in range(3):
            _train(optimizer, 1, start=step)
            params = params_of(optimizer)
            for p in params:
                p.grad = torch.full_like(p, 0.1 * step)
            with torch.device(device):
                clip_grad_norm_(optimizer, 1.0, in_step=True)
                optimizer.step()
                optimizer.report()
        assert TRITON in optimizer.describe(), optimizer.describe()
        ends.append(snapshot(optimizer))
    assert_bitwise(*ends)
