"""torch.compile, Accelerate and transformers' Trainer around the optimizer, beside one process on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from am_lightning import AMAdamW, clip_grad_norm_
from tests.device import DEVICE, ON_GPU
from tests.gpu.steps import KERNELS, only_cuda
from tests.sharding.model import batch_of, make_net
from tests.sharding.pool import Pool

WORKER = "tests.huggingface.accelerate_worker:"
KINDS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp", "scope": "tensor", "clip": True},
    "accumulated": {"kind": "ddp", "scope": "global", "clip": True, "parts": 2},
    "fsdp1": {"kind": "fsdp1", "scope": "tensor", "clip": True},
    "fsdp2": {"kind": "fsdp2", "scope": "tensor", "clip": True},
}


# ---------------------------------------------------------------------- torch.compile of the model
def trained(net: torch.nn.Module, kernel: str, *, steps: int = 8) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    optimizer = AMAdamW(net.named_parameters(), lr=0.1, betas=(0.89, 0.95), **KERNELS[kernel])
    seen = []
    for step in range(steps):
        x, y = (part.to(DEVICE) for part in batch_of(step, torch.float32))
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        clip_grad_norm_(optimizer, 0.5, in_step=True)
        optimizer.step()
        seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
    return seen, [p.detach().cpu() for p in net.parameters()]


@pytest.mark.parametrize("mode", ["default", pytest.param("reduce-overhead", marks=only_cuda)])
@pytest.mark.parametrize("kernel", ["default", "foreach"])
def test_a_compiled_model(kernel: str, mode: str) -> None:
    """With reduce-overhead, gradients live in the memory of CUDA graphs. A rehearsal traces, and builds nothing."""
    net = make_net(torch.float32).to(DEVICE)
    how: dict[str, Any] = {"mode": mode} if ON_GPU else {"backend": "eager"}
    seen, weights = trained(torch.compile(copy.deepcopy(net), **how), kernel)
    expected, expected_weights = trained(net, kernel)
    assert sorted(seen[0]) == sorted(expected[0])  # without the wrapper's prefix
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    for a, b in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_compiled_net_in_the_trainer() -> None:
    import lightning.pytorch as pl

    from am_lightning import AdaptiveMemory
    from tests.lightning.model import Regression, quiet

    runs = []
    for compiled in (True, False):
        module = Regression()
        trainer = pl.Trainer(**quiet(max_steps=6, gradient_clip_val=0.5, callbacks=[AdaptiveMemory()]))
        if compiled:
            module.net.compile(**({} if ON_GPU else {"backend": "eager"}))
        trainer.fit(module)
        runs.append(module.seen)
    for ours, theirs in zip(*runs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-2)  # it overshoots, so roundings grow


# ---------------------------------------------------------------------- Accelerate
@pytest.mark.parametrize("name", KINDS)
def test_accelerate(alone: Pool, name: str) -> None:
    """Compare beta_t, before it is clipped if that is collected, and both norms."""
    (found,) = alone.run(f"{WORKER}layout", **KINDS[name])
    single = found["alone"]
    assert single["share"] > 0.2
    key = "raw" if found["raw"] else "seen"  # as in tests.sharding.model.beside
    for row, theirs in zip(found[key], single[key], strict=True):
        for given, beta in row.items():
            expected = theirs[given.removeprefix("mine.")]
            assert beta == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True), given
    for norm, theirs in found["norms"]:
        assert norm == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_accelerate_resumes_to_the_bit(alone: Pool, kind: str, tmp_path: Path) -> None:
    (found,) = alone.run(f"{WORKER}resumed", kind=kind, folder=str(tmp_path))
    assert found["resumed"]["seen"] == found["unbroken"]["seen"][4:]
    assert found["resumed"]["norms"] == found["unbroken"]["norms"][4:]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_accelerate_in_mixed_precision(precision: str) -> None:
    """With fp16 the prepared optimizer has a GradScaler: an overflow makes no step."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import GradScalerKwargs

    from am_lightning.huggingface import attach

    if precision == "fp16" and not ON_GPU:
        pytest.skip("Accelerate has fp16 on accelerators only")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    scaler = GradScalerKwargs(init_scale=2.0**40, backoff_factor=2.0**-12)
    accelerator = Accelerator(cpu=not ON_GPU, mixed_precision=precision, kwargs_handlers=[scaler])
    net = make_net(torch.float32)
    model, optimizer = accelerator.prepare(net, AMAdamW(net.named_parameters(), lr=0.05))
    attach(accelerator, optimizer)
    made, losses = 0, []
    for step in range(10):
        x, y = (part.to(accelerator.device) for part in batch_of(step, torch.float32))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x).float(), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        made += not optimizer.step_was_skipped
        losses.append(float(loss))
    assert {float(state["step"]) for state in optimizer.optimizer.state.values()} == {float(made)}
    assert made == 10 if precision == "bf16" else 0 < made < 10
    assert losses[-1] < losses[0] and all(bool(p.isfinite().all()) for p in net.parameters())


# ---------------------------------------------------------------------- transformers' Trainer
@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Reset Accelerate, which keeps the device of the first Trainer of a process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize("form", ["class", "factory"])
def test_the_hf_trainer(form: str, fresh_state: None, tmp_path: Path) -> None:
    """The result equals that of the CPU."""
    from accelerate.state import AcceleratorState

    from tests.huggingface.trainer_runs import run

    here = run(tmp_path / "here", form, batch=4)
    assert DEVICE.type in str(AcceleratorState().device)
    AcceleratorState._reset_state(reset_partial_state=True)
    there = run(tmp_path / "cpu", form, batch=4, use_cpu=True)
    assert len(here["seen"]) == len(there["seen"]) == 8
    for ours, theirs in zip(here["seen"][:4], there["seen"][:4], strict=True):  # rounding errors grow later
        assert ours == pytest.approx(theirs, abs=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_hf_trainer_in_mixed_precision(precision: str, fresh_state: None, tmp_path: Path) -> None:
    from tests.huggingface.trainer_runs import run

    if precision == "fp16" and not ON_GPU:
        pytest.skip("transformers has fp16 on accelerators only")
    found = run(tmp_path, "class", batch=4, **{precision: True})
    losses = [record["loss"] for record in found["history"] if "loss" in record]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert any(1e-6 < beta < 0.89 - 1e-6 for step in found["seen"] for beta in step.values())


def test_the_hf_trainer_resumes_to_the_bit(fresh_state: None, tmp_path: Path) -> None:
    from tests.huggingface.trainer_runs import SAVE, run

    whole = run(tmp_path / "whole", "class", batch=4)
    rest = run(tmp_path / "rest", "class", batch=4, resume=tmp_path / "whole")
    assert rest["seen"] == whole["seen"][SAVE:]
