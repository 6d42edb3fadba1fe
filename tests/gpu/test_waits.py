"""The host never waits for the device in a step, in clipping or in the callback's steps; launches are counted.

In a rehearsal the same code runs, but nothing is waited for, and the profiler sees no launches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from am_lightning.bench.host import outer_operators
from am_lightning.optim import squares
from tests.device import DEVICE, ON_GPU
from tests.gpu.steps import DTYPES, KERNELS, give, make, no_sync, only_cuda, words_of
from tests.optim.harness import SCOPES, params_of
from tests.optim.launches import FREE

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
TENSORS = 300
# Calls of CUDA's runtime in which the host waits.
DEVICE_SIDE = "device: "
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@only_cuda
def test_the_mode_sees_a_wait() -> None:
    """The mode detects the reading of a number, and a copy from memory that is not page-locked."""
    flag = torch.ones((), device=DEVICE)
    for wait in (lambda: float(flag), lambda: torch.tensor([1.0, 2.0], device=DEVICE)):
        with pytest.raises(RuntimeError, match="synchroniz"), no_sync():
            wait()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtypes", ["float32", "mixed"])
@each_kernel
def test_a_step_waits_for_nothing(kernel: str, dtypes: str, scope: str) -> None:
    """The steps include clipping, an absent gradient at times, and a dropped step."""
    optimizer = make(kernel, DTYPES[dtypes], scope=scope)
    for step in range(9):
        give(optimizer, step)
        if step % 3 == 2:
            params_of(optimizer)[0].grad = None
        if step == 7:
            params_of(optimizer)[5].grad.fill_(float("nan"))
        if step < 3:  # these build kernels and tables
            clip_grad_norm_(optimizer, 1.0, in_step=True)
            optimizer.step()
            continue
        with no_sync():
            clip_grad_norm_(optimizer, 1.0, in_step=step % 2 == 0)
            optimizer.step()
            report = optimizer.report()
            optimizer.momentum()
            skipped = optimizer.last_step_skipped
            optimizer.zero_grad()
        assert bool(skipped) == (step == 7)
        assert float(report[-4]) == (step >= 7)


@each_kernel
def test_a_changing_lr_waits_for_nothing(kernel: str) -> None:
    """lr is a number, or a tensor on the device."""
    for lr in (0.05, torch.tensor(0.05, device=DEVICE)):
        optimizer = make(kernel, lr=lr, capturable=True)
        for step in range(5):
            give(optimizer, step)
            with no_sync() if step > 1 else torch.no_grad():
                for group in optimizer.param_groups:
                    if isinstance(lr, torch.Tensor):
                        group["lr"].fill_(0.05 / (1 + step))
                    else:
                        group["lr"] = 0.05 / (1 + step)
                optimizer.step()


@pytest.mark.parametrize("foreach", [True, False])
def test_amsgd_waits_for_nothing(foreach: bool) -> None:
    params = [torch.nn.Parameter(torch.ones(n, device=DEVICE)) for n in (1000, 7)]
    optimizer = AMSGD(params, lr=0.1, scope="tensor", foreach=foreach)
    for step in range(4):
        give(optimizer, step)
        with no_sync() if step > 1 else torch.no_grad():
            clip_grad_norm_(optimizer, 1.0)
            optimizer.step()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_callback_waits_at_its_log_interval_only(precision: str) -> None:
    """This covers everything after backward: clipping, the step, the schedule, and the callbacks after the batch."""
    import lightning.pytorch as pl

    from am_lightning import AdaptiveMemory
    from tests.lightning.model import Regression, quiet

    class Guard(pl.Callback):
        watched = 0

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.inside = no_sync() if 2 < trainer.global_step < 8 else None
            if self.inside is not None:
                self.inside.__enter__()

        def on_train_batch_end(self, *arguments: Any) -> None:
            if self.inside is not None:
                self.inside.__exit__(None, None, None)
                self.watched += 1

    guard = Guard()
    try:
        trainer = pl.Trainer(
            **quiet(
                precision=precision,
                max_steps=10,
                gradient_clip_val=0.5,
                log_every_n_steps=1000,
                callbacks=[AdaptiveMemory(), guard],  # the guard ends after our callback
            )
        )
        trainer.fit(Regression())
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert guard.watched == 5


def profiled(action: Callable[[], Any]) -> tuple[Counter[str], int]:
    """Return CUDA's runtime calls and the device's work by name, and the host's outermost operators without views."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with profile(activities=activities) as profiler:
        action()
        if ON_GPU:
            torch.cuda.synchronize()
    events = profiler.events()
    names = Counter(e.name for e in events if e.device_type == DeviceType.CPU and e.name.startswith("cuda"))
    for e in events:
        if e.device_type == DeviceType.CUDA and not e.name.startswith("Optimizer."):  # a range, not a launch
            names[f"{DEVICE_SIDE}{e.name}"] += 1
    return names, sum(name not in FREE for name in outer_operators(events))


def launches_of(names: Counter[str]) -> int:
    return sum(count for name, count in names.items() if name.startswith(DEVICE_SIDE))


# Largest numbers of device launches in a step with clipping, and of operators that the host calls for it. A CPU counts
# fewer (tests/optim/test_launches.py, test_triton_steps.py), because some operators are several launches on a device.
LIMITS = {"default": (500, 350), "triton": (40, 100) if ON_GPU else (0, 200), "foreach": (500, 350)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", LIMITS)
def test_launches_of_a_step(
    kernel: str, dtype: str, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 aligned tensors, half of them decayed, with clipping; the counts are recorded in the report."""
    monkeypatch.setattr(squares, "_in_blocks", lambda device: False)  # in a rehearsal, too
    shapes = [(8 + i % 5, 6) if i % 3 else (7 + i % 4,) for i in range(TENSORS)]
    optimizer = make(kernel, DTYPES[dtype], shapes=shapes, weight_decay=0.1, offset=0)

    def step() -> None:
        clip_grad_norm_(optimizer, 1.0, in_step=True)
        optimizer.step()

    for i in range(4):
        give(optimizer, i, offset=0)
        step()
    give(optimizer, 4, offset=0)
    names, operators = profiled(step)
    launches = launches_of(names)
    record_property(f"launches {kernel} {dtype}", launches)
    record_property(f"host operations {kernel} {dtype}", operators)
    most_launches, most_operators = LIMITS["triton" if words_of(kernel) == "Triton" else kernel]
    if ON_GPU:
        if not names:
            pytest.skip("the profiler sees nothing of CUDA here")
        waits = {name: count for name, count in names.items() if name in WAITS}
        assert waits.get("cudaDeviceSynchronize", 0) <= 3, waits  # this test's own, and the profiler's
        assert waits.keys() <= {"cudaDeviceSynchronize"}, waits
        assert 0 < launches <= most_launches, names
        ours = [any(name.startswith(DEVICE_SIDE + own) for name in names) for own in ("sums_ker", "update_ker")]
        assert ours == [words_of(kernel) == "Triton"] * 2, names
    assert 0 < operators <= most_operators or (kernel == "default" and not ON_GPU), operators


def test_more_tensors_launch_nothing_more() -> None:
    """The fused step launches as much for 30 tensors as for 90."""
    counts = []
    for tensors in (30, 90):
        params = [torch.nn.Parameter(torch.ones(100, device=DEVICE)) for _ in range(tensors)]
        optimizer = AMAdamW(params, fused=True)
        for step in range(3):
            give(optimizer, step)
            optimizer.step()
        give(optimizer, 3)
        names, operators = profiled(optimizer.step)
        counts.append((launches_of(names), operators))
    assert counts[0] == counts[1] or not ON_GPU
