"""``fused=True`` on a real GPU: equal to the plain kernels, no host sync, and inside a CUDA graph.

tests/run.sh tests/gpu -v          # all skipped without a GPU and Triton
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from am_lightning import AMAdamW
from tests.optim.harness import SCOPES, assert_bitwise, assert_close, params_of, snapshot, to_numpy

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(1000, 77), (1,), (), (0,), (8192,), (8193,), (3, 5, 7), (300_001,)]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make(dtype: torch.dtype, *, seed: int = 0, **options: Any) -> AMAdamW:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to("cuda", dtype)) for s in SHAPES]
    groups = [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.0}]
    return AMAdamW(groups, **({"lr": 0.05, "fused": True} | options))


def give(optimizer: AMAdamW, step: int) -> None:
    """New gradients at new addresses."""
    # Made there: a copy from pageable memory waits for the device.
    generator = torch.Generator("cuda").manual_seed(step)
    for p in params_of(optimizer):
        noise = torch.randn(p.shape, generator=generator, device="cuda").to(p.device)
        p.grad = (noise + 0.5 * p.detach().float()).to(p.dtype)


def assert_alike(ours: AMAdamW, plain: AMAdamW, tol: float, beta: float = 1e-6) -> None:
    """``beta``: how far beta_t may be off; one step from equal states leaves it within 1e-6 in every dtype."""
    for a, b in zip(ours.momentum().values(), plain.momentum().values(), strict=True):
        assert_close(float(a), float(b), beta, "beta")
    for p, q in zip(params_of(ours), params_of(plain), strict=True):
        for name, a, b in [("weights", p, q), *((k, v, plain.state[q][k]) for k, v in ours.state[p].items())]:
            assert_close(to_numpy(a), to_numpy(b), tol, name)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_to_the_plain_kernels(dtype: torch.dtype, scope: str) -> None:
    """One step from the same state, after three: to one rounding of what is stored."""
    ours = make(dtype, scope=scope)
    for step in range(3):
        give(ours, step)
        ours.step()
    assert f"Triton for {len(SHAPES)}" in ours.describe()
    plain = make(dtype, scope=scope, fused=False, foreach=False)
    with torch.no_grad():
        for p, q in zip(params_of(plain), params_of(ours), strict=True):
            p.copy_(q)
    plain.load_state_dict(ours.state_dict())
    for group in plain.param_groups:
        group.update(fused=False, foreach=False)
    for optimizer in (ours, plain):
        give(optimizer, 9)
        optimizer.step()
    assert_alike(ours, plain, {torch.float64: 1e-11}.get(dtype, 2 * ROUNDING.get(dtype, 5e-7)))


def test_nothing_waits_for_the_device() -> None:
    ours = make(torch.float32, scope="tensor")
    give(ours, 0)
    ours.step()  # compiles
    for step in range(1, 4):
        give(ours, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_many_steps_in_flight() -> None:
    """The host runs ahead of the device with new addresses each step: no table is overwritten before it is read."""
    ours, plain = make(torch.float32), make(torch.float32, fused=False, foreach=True)
    for optimizer in (ours, plain):
        for step in range(30):
            torch.cuda._sleep(2_000_000)  # the device falls behind
            give(optimizer, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert_alike(ours, plain, 1e-4, beta=1e-3)  # roundings of 30 steps add up


def test_runs_repeat_to_the_bit() -> None:
    runs = [make(torch.float32, exp_avg_dtype=torch.bfloat16) for _ in range(2)]
    for optimizer in runs:
        for step in range(5):
            give(optimizer, step)
            optimizer.step()
    assert_bitwise(snapshot(runs[0]), snapshot(runs[1]))


def test_a_bad_step_leaves_no_trace() -> None:
    ours = make(torch.float32)
    give(ours, 0)
    ours.step()
    before = snapshot(ours)
    give(ours, 1)
    params_of(ours)[-1].grad[300_000] = float("nan")
    ours.step()
    assert bool(ours.last_step_skipped)
    assert_bitwise(before, snapshot(ours))


@pytest.mark.parametrize("scope", SCOPES)
def test_cuda_graph(scope: str) -> None:
    """A captured step replays with other gradients and another lr, a bad one is dropped, and eager steps go on."""
    lrs = [torch.tensor(0.05, device="cuda"), torch.tensor(0.05, device="cuda")]
    captured, plain = (make(torch.float32, lr=lr, capturable=True, scope=scope) for lr in lrs)
    static = [torch.zeros_like(p) for p in params_of(captured)]

    def feed(step: int) -> None:
        give(plain, step)
        for target, p in zip(static, params_of(plain), strict=True):
            target.copy_(p.grad)

    def eager(optimizer: AMAdamW, gradients: list[torch.Tensor]) -> None:
        for p, gradient in zip(params_of(optimizer), gradients, strict=True):
            p.grad = gradient
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            feed(step)
            eager(captured, static)
            plain.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for p, gradient in zip(params_of(captured), static, strict=True):
        p.grad = gradient
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(3, 8):
        feed(step)
        for lr in lrs:
            lr.fill_(0.05 / step)
        if step == 5:
            static[0][3, 3] = float("nan")
            before = snapshot(captured)
            graph.replay()
            assert_bitwise(before, snapshot(captured))
            continue
        graph.replay()
        plain.step()
        if step == 6:  # an eager step between replays, on gradients elsewhere
            feed(20)
            eager(captured, [gradient.clone() for gradient in static])
            plain.step()
    torch.cuda.synchronize()
    assert_alike(captured, plain, 1e-5, beta=1e-5)


def test_a_capture_before_any_step_is_refused() -> None:
    ours = make(torch.float32, lr=torch.tensor(0.05, device="cuda"), capturable=True)
    give(ours, 0)
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ours.step()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_devices() -> None:
    both = []
    for fused in (True, False):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 9000).to(f"cuda:{i % 2}")) for i in range(4)]
        optimizer = AMAdamW(params, fused=fused, scope="global")
        for step in range(3):
            give(optimizer, step)
            optimizer.step()
        both.append(optimizer)
    assert_alike(*both, 1e-5, beta=1e-5)
