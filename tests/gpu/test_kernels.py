"""Every kernel against the float64 oracle, step by step, with repeatable bits; a bad step leaves no trace.

tests/run.sh tests/gpu -v                               # on a GPU
AM_GPU_TESTS_DEVICE=cpu tests/run.sh tests/gpu          # a rehearsal
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from am_lightning import AMAdamW, clip_grad_norm_
from tests.device import ON_GPU
from tests.gpu.steps import (
    DTYPES,
    KERNELS,
    SHAPES,
    delay,
    give,
    make,
    make_params,
    placed,
    side_stream,
    words_of,
)
from tests.optim.harness import (
    Bowl,
    Twin,
    assert_bitwise,
    assert_close,
    build,
    make_oracle,
    params_of,
    run_bowl,
    snapshot,
    to_numpy,
)
from tests.optim.test_every_step import RATES
from tests.optim.test_low_precision_state import Rounded

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
EAGER = ("foreach", "plain")


class OnDevice(Twin):
    """Compare float64 to 1e-10, because powers and roots come from another library."""

    def beta_tol(self, p: torch.Tensor) -> float:
        return max(1e-10, super().beta_tol(p))


def unaligned(step: int, grads: list[Any]) -> None:
    """Return gradients at new addresses in each step, as in the buckets of DDP and FSDP; one is sometimes absent."""
    grads[:] = [placed(g, (i + step) % 3) for i, g in enumerate(grads)]
    if step in (2, 5) and len(grads) > 4:
        grads[4] = None


def beside_oracle(
    kind: str, kernel: str, dtypes: list[torch.dtype], scope: str, *, steps: int = 8, **more: Any
) -> Twin:
    """Run two groups with their own rates and options; the oracle gets the rounded state."""
    twin_type, shapes = more.pop("twin_type", OnDevice), more.pop("shapes", SHAPES)
    params = make_params(dtypes, shapes=shapes)
    half = len(params) // 2
    options = {k: v for k, v in KERNELS[kernel].items() if kind == "adamw" or k != "fused"} | more
    groups = [{"params": params[:half], "weight_decay": 0.1}, {"params": params[half:], "weight_decay": 0.0}]
    optimizer = build(kind, groups, lr=0.1, scope=scope, **options)
    twin: Twin = twin_type(optimizer, make_oracle(optimizer, scope=scope), sync=True)
    high = 1 if scope == "tensor" and len(shapes) > 4 else 2  # large tensors need more to overshoot
    rates = [(high * rate, 0.7 * high * rate) for rate in (RATES[kind] * 3)[:steps]]
    run_bowl(twin, Bowl.around(shapes, seed=7), rates, unaligned)
    twin.assert_not_vacuous(0.1)
    return twin


@pytest.mark.parametrize("dtypes", DTYPES)
@each_kernel
def test_every_step_is_the_oracles(kernel: str, dtypes: str) -> None:
    twin = beside_oracle("adamw", kernel, DTYPES[dtypes], "tensor")
    described = twin.optimizer.describe()
    assert f"kernels: {words_of(kernel)}" in described, described
    assert kernel != "triton" or f" for {len(SHAPES)}" in described, described


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("scope", ["group", "global"])
@each_kernel
def test_shared_scopes(kernel: str, scope: str, dtypes: str) -> None:
    beside_oracle("adamw", kernel, DTYPES[dtypes], scope)


@pytest.mark.parametrize(
    "options", [{"maximize": True, "lambd": 0.0}, {"capturable": True}], ids=["maximize", "capturable"]
)
@each_kernel
def test_options(kernel: str, options: dict[str, Any]) -> None:
    beside_oracle("adamw", kernel, DTYPES["float32"], "tensor", steps=5, **options)


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("kernel", EAGER)
def test_amsgd(kernel: str, scope: str) -> None:
    beside_oracle("sgd", kernel, DTYPES["float32"], scope)


@each_kernel
def test_a_direction_in_bfloat16(kernel: str) -> None:
    """With float32 parameters the stored d is one of the two bfloat16 neighbours of the oracle's d."""
    twin = beside_oracle("adamw", kernel, DTYPES["float32"], "tensor", twin_type=Rounded, exp_avg_dtype=torch.bfloat16)
    assert {state["exp_avg"].dtype for state in twin.optimizer.state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kernel", ["triton", "foreach"])
def test_many_chunks(kernel: str) -> None:
    """The tensor has more chunks than one program, or one level of a tree, can add."""
    beside_oracle("adamw", kernel, DTYPES["float32"], "tensor", steps=6, shapes=[(2_200_003,), (65_537,), (77,)])


@each_kernel
def test_other_strides(kernel: str, device: torch.device) -> None:
    """Use channels_last weights whose gradients have other strides, and a transposed weight."""
    torch.manual_seed(0)
    weights = torch.randn(8, 6, 3, 3).to(device).to(memory_format=torch.channels_last)
    params = [("conv", torch.nn.Parameter(weights)), ("turned", torch.nn.Parameter(torch.randn(70, 30).to(device).t()))]
    optimizer = build("adamw", params, lr=0.1, **KERNELS[kernel])
    twin = Twin(optimizer, make_oracle(optimizer), sync=True)
    run_bowl(twin, Bowl.around([tuple(p.shape) for _, p in params], seed=3), [(r,) for r in RATES["adamw"]])
    assert params[0][1].is_contiguous(memory_format=torch.channels_last) and params[1][1].stride() == (1, 30)


@pytest.mark.parametrize("exp_avg_dtype", [None, torch.bfloat16], ids=["same", "bfloat16"])
@each_kernel
def test_runs_repeat_to_the_bit(kernel: str, exp_avg_dtype: torch.dtype | None) -> None:
    runs = [make(kernel, DTYPES["mixed"], exp_avg_dtype=exp_avg_dtype, scope="group") for _ in range(2)]
    for optimizer in runs:
        for step in range(5):
            give(optimizer, step)
            clip_grad_norm_(optimizer, 1.0, in_step=True)
            optimizer.step()
    assert_bitwise(snapshot(runs[0]), snapshot(runs[1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_kernel
def test_a_bad_step_leaves_no_trace(kernel: str, bad: float) -> None:
    optimizer = make(kernel)
    give(optimizer, 0)
    optimizer.step()
    before = snapshot(optimizer)
    give(optimizer, 1)
    params_of(optimizer)[-1].grad[100_000] = bad
    optimizer.step()
    assert bool(optimizer.last_step_skipped)
    assert_bitwise(before, snapshot(optimizer))


@pytest.mark.parametrize("in_step", [False, True], ids=["before", "in-step"])
@each_kernel
def test_clipping(kernel: str, in_step: bool, device: torch.device) -> None:
    """The norm is a float64 one, and the step is the oracle's on clipped gradients."""
    optimizer = make(kernel, weight_decay=0.1)
    oracle = make_oracle(optimizer)
    for step in range(4):
        give(optimizer, step)
        grads = [to_numpy(p.grad) for p in params_of(optimizer)]
        norm = float(sum((g**2).sum() for g in grads)) ** 0.5
        limit = 0.3 * norm if step != 2 else 1e6  # a step is invariant under a constant scale
        found = clip_grad_norm_(optimizer, limit, in_step=in_step)
        assert found.device.type == device.type and float(found) == pytest.approx(norm, rel=1e-6)
        oracle.step([g * min(1.0, limit / (norm + 1e-6)) for g in grads])
        optimizer.step()
    for p, slot in zip(params_of(optimizer), oracle.slots, strict=True):
        assert_close(to_numpy(p), slot.x, 2e-5, "weights")
        assert_close(to_numpy(optimizer.state[p]["exp_avg"]), slot.d, 2e-5, "direction")


def test_an_index_beyond_32_bits(device: torch.device) -> None:
    """2^31 + 8,195 equal bfloat16 elements change as those of a small tensor. A rehearsal has 2^20."""
    if ON_GPU and torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of free GPU memory")
    sizes = (8195, (2**31 if ON_GPU else 2**20) + 8195)
    params = [torch.nn.Parameter(torch.full((n,), 0.5, dtype=torch.bfloat16, device=device)) for n in sizes]
    optimizer = AMAdamW(params, lr=0.05, fused=True)
    for value in (0.25, -0.5, 1.0):
        for p in params:
            p.grad = None
            p.grad = torch.full_like(p, value)
        optimizer.step()
        betas = [float(beta) for beta in optimizer.momentum().values()]
        assert betas[0] == pytest.approx(betas[1], abs=1e-6)
    small, large = ([p.detach(), *(optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq"))] for p in params)
    for a, b in zip(small, large, strict=True):
        assert float(a.min()) == float(a.max()) and float(b.min()) == float(b.max()) == float(b[-1])
        assert float(b[-1]) == pytest.approx(float(a[0]), rel=2.0**-7)


@pytest.mark.parametrize("kernel", ["default", "triton", "foreach"])
def test_many_steps_in_flight(kernel: str) -> None:
    """The host runs ahead of the device with new addresses at each step: no table is overwritten before it is read."""
    ahead, waiting = make(kernel), make(kernel)
    for step in range(30):
        delay()
        give(ahead, step)
        ahead.step()
        ahead.zero_grad(set_to_none=True)
    for step in range(30):
        give(waiting, step)
        waiting.step()
        assert not bool(waiting.last_step_skipped)  # waits for the device
    assert_bitwise(snapshot(ahead), snapshot(waiting))


@pytest.mark.parametrize("kernel", ["default", "triton", "foreach"])
def test_steps_on_another_stream(kernel: str) -> None:
    """All of a step uses the current stream, tables and copies included."""
    here, there = make(kernel), make(kernel)
    for step in range(5):
        give(here, step)
        here.step()
    with side_stream():
        for step in range(5):
            delay()
            give(there, step)
            there.step()
    assert_bitwise(snapshot(here), snapshot(there))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tensor_without_elements_comes_last(kernel: str) -> None:
    """Lists whose last tensor is empty have been launched wrongly before."""
    twin = beside_oracle("adamw", kernel, DTYPES["float32"], "tensor", shapes=[(700,), (33,), (5, 5), (0,)])
    grads = [p.grad.double() for p in twin.params]
    norm = float(torch.stack([g.norm() for g in grads]).norm())
    assert float(clip_grad_norm_(twin.optimizer, 1.0)) == pytest.approx(norm, rel=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kernel", ["default", "triton", "foreach"])
def test_a_model_on_two_devices(kernel: str) -> None:
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 9000 + i).to(f"cuda:{i % 2}")) for i in range(4)]
    optimizer = AMAdamW(params, scope="global", **KERNELS[kernel])
    twin = Twin(optimizer, make_oracle(optimizer, scope="global"), sync=True)
    run_bowl(twin, Bowl.around([tuple(p.shape) for p in params], seed=3), [(r,) for r in RATES["adamw"]])
