"""Steps in CUDA graphs: replays equal the oracle's steps. A rehearsal runs the same code without a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from am_lightning import AMAdamW, clip_grad_norm_
from tests.device import DEVICE, ON_GPU
from tests.gpu.steps import KERNELS, give, make, only_cuda, side_stream
from tests.optim.harness import SCOPES, assert_bitwise, assert_close, make_oracle, params_of, snapshot, to_numpy
from tests.sharding.model import batch_of, make_net

FAST = ("default", "triton", "foreach")  # the plain kernels are for reading
each_kernel = pytest.mark.parametrize("kernel", FAST)


def captured(action: Callable[[], Any]) -> Callable[[], Any]:
    """Capture the launches of ``action`` without running them, and return a function that replays them."""
    if not ON_GPU:
        return action
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def warm_up(action: Callable[[int], Any]) -> None:
    """Run ``action`` three times on another stream, as torch's documentation does."""
    with side_stream():
        for step in range(3):
            action(step)


class Run:
    """An optimizer with gradients at fixed addresses, its oracle, and the learning rate of both."""

    def __init__(self, kernel: str, scope: str) -> None:
        self.lr = torch.tensor(0.05, device=DEVICE)
        self.optimizer = make(kernel, lr=self.lr, capturable=True, scope=scope, weight_decay=0.1)
        self.oracle = make_oracle(self.optimizer, scope=scope)
        self.static = [torch.zeros_like(p) for p in params_of(self.optimizer)]
        self.betas: list[list[float]] = []  # one entry for every step that was not dropped
        self.optimizer.begin_interval(self)

    def feed(self, step: int) -> None:
        """Give the optimizer and the oracle new gradients and a new rate."""
        self.lr.fill_(0.05 / (1 + step))
        for group in self.oracle.groups:
            group["lr"] = float(self.lr)
        give(self.optimizer, step)
        for target, p in zip(self.static, params_of(self.optimizer), strict=True):
            target.copy_(p.grad)
        self.use(self.static)

    def use(self, gradients: list[torch.Tensor]) -> None:
        for p, gradient in zip(params_of(self.optimizer), gradients, strict=True):
            p.grad = gradient

    def step(self, how: Callable[[], Any]) -> None:
        self.oracle.step([to_numpy(g) for g in self.static])
        if all(bool(g.isfinite().all()) for g in self.static):
            self.betas.append([slot.beta for slot in self.oracle.slots])
        how()

    def check(self) -> None:
        total, _, _, steps, lowest, highest = self.optimizer.interval(self).cpu()
        betas = torch.tensor(self.betas, dtype=torch.float64)
        assert steps.tolist() == [len(betas)] * betas.shape[1]
        for found, expected in ((total, betas.sum(0)), (lowest, betas.amin(0)), (highest, betas.amax(0))):
            assert_close(found.numpy(), expected.numpy(), 1e-5, "the interval")
        for beta, slot in zip(self.optimizer.momentum().values(), self.oracle.slots, strict=True):
            assert_close(float(beta), slot.beta, 1e-5, "beta")
        for p, slot in zip(params_of(self.optimizer), self.oracle.slots, strict=True):
            state = self.optimizer.state[p]
            assert float(state["step"]) == slot.step
            for stored, expected in ((p, slot.x), (state["exp_avg"], slot.d), (state["exp_avg_sq"], slot.v)):
                assert_close(to_numpy(stored), expected, 2e-5, "weights or moments")


@pytest.mark.parametrize("scope", SCOPES)
@each_kernel
def test_replays_are_steps(kernel: str, scope: str) -> None:
    """Gradients and lr change between replays; a bad step is dropped; eager steps in between are safe."""
    run = Run(kernel, scope)

    def eager(step: int) -> None:
        run.feed(step)
        run.step(run.optimizer.step)

    warm_up(eager)
    run.feed(3)
    replay = captured(run.optimizer.step)
    for step in range(3, 8):
        run.feed(step)
        if step == 5:
            run.static[0][3, 3] = float("nan")
            before = snapshot(run.optimizer)
            run.step(replay)
            assert bool(run.optimizer.last_step_skipped)
            assert_bitwise(before, snapshot(run.optimizer))
            continue
        run.step(replay)
        if step == 6:  # an eager step on gradients at other addresses
            run.feed(20)
            run.use([gradient.clone() for gradient in run.static])
            run.step(run.optimizer.step)
    run.check()


@each_kernel
def test_a_whole_training_step(kernel: str) -> None:
    """One graph with forward, backward, clipping and step equals the same without a graph."""
    runs = []
    for graphed in (True, False):
        net = make_net(torch.float32).to(DEVICE)
        lr = torch.tensor(0.05, device=DEVICE)
        optimizer = AMAdamW(net.parameters(), lr=lr, capturable=True, **KERNELS[kernel])
        x, y = (part.to(DEVICE) for part in batch_of(0, torch.float32))

        def train(net: Any = net, optimizer: Any = optimizer, x: Any = x, y: Any = y) -> None:
            optimizer.zero_grad(set_to_none=True)
            F.mse_loss(net(x), y).backward()
            clip_grad_norm_(optimizer, 0.5, in_step=True)
            optimizer.step()

        def advance(step: int, how: Callable[[], Any], x: Any = x, y: Any = y) -> None:
            for target, part in zip((x, y), batch_of(step, torch.float32), strict=True):
                target.copy_(part)
            how()

        warm_up(lambda step, train=train, advance=advance: advance(step, train))
        optimizer.zero_grad(set_to_none=True)
        replay = captured(train) if graphed else train
        for step in range(3, 9):
            lr.fill_(0.05 / step)
            advance(step, replay)
        runs.append((optimizer, [to_numpy(p) for p in net.parameters()]))
    for a, b in zip(*(weights for _, weights in runs), strict=True):
        assert_close(a, b, 1e-4, "weights")  # addresses differ in a graph, and with them the order of sums
    assert {float(state["step"]) for state in runs[0][0].state.values()} == {9.0}


@only_cuda
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_capture_before_any_step_is_refused_and_leaves_nothing(kernel: str) -> None:
    refused, expected = (make(kernel, lr=torch.tensor(0.05, device=DEVICE), capturable=True) for _ in range(2))
    give(refused, 0)
    with pytest.raises(RuntimeError, match="make a step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        refused.step()
    torch.cuda.synchronize()
    assert not refused.state
    for step in range(3):
        for optimizer in (refused, expected):
            give(optimizer, step)
            optimizer.step()
    assert_bitwise(snapshot(refused), snapshot(expected))


@only_cuda
def test_without_capturable_a_capture_is_refused() -> None:
    """torch.optim also refuses such a capture."""
    optimizer = make("default")
    give(optimizer, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
