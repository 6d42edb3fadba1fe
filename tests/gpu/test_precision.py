"""Half precision: a GradScaler's overflow makes no step, in torch.amp and in Lightning's Trainer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from am_lightning import AMAdamW, clip_grad_norm_
from tests.device import DEVICE
from tests.gpu.steps import DTYPES, KERNELS, give, make, words_of
from tests.optim.harness import Twin, assert_bitwise, make_oracle, params_of, snapshot, to_numpy
from tests.sharding.model import batch_of, make_net

each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def backward(net: torch.nn.Module, step: int, scaler: Any, half: torch.dtype) -> None:
    x, y = (part.to(DEVICE) for part in batch_of(step, torch.float32))
    with torch.autocast(DEVICE.type, half):
        loss = F.mse_loss(net(x), y)
    (loss if scaler is None else scaler.scale(loss)).backward()


@each_kernel
def test_a_scaler_drops_overflows(kernel: str) -> None:
    """The first scale is far too high: some steps are skipped and not counted, and the others equal the oracle's."""
    net = make_net(torch.float32).to(DEVICE)
    optimizer = AMAdamW(net.parameters(), lr=0.05, weight_decay=0.1, **KERNELS[kernel])
    twin = Twin(optimizer, make_oracle(optimizer), sync=True)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40, backoff_factor=2.0**-12, growth_interval=1000)
    made = 0
    for step in range(8):
        optimizer.zero_grad()
        backward(net, step, scaler, torch.float16)
        scaler.unscale_(optimizer)
        overflow = not all(bool(p.grad.isfinite().all()) for p in twin.params)
        before = snapshot(optimizer)
        if not overflow:
            clip_grad_norm_(optimizer, 0.5)
            arrays = [to_numpy(p.grad) for p in twin.params]
            twin.pull_state()
            twin.oracle.step(arrays)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert_bitwise(before, snapshot(optimizer))
        else:
            twin.compare(arrays)
        made += not overflow
    assert 0 < made < 8
    assert {float(state["step"]) for state in optimizer.state.values()} == {float(made)}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_trains(half: torch.dtype, clip: float | None) -> None:
    """The default kernel trains float32 weights as close to float32 on the CPU as half precision permits."""
    losses = []
    for where, scaler in ((DEVICE, torch.amp.GradScaler(DEVICE.type, init_scale=256.0)), (torch.device("cpu"), None)):
        net = make_net(torch.float32).to(where)
        optimizer = AMAdamW(net.parameters(), lr=0.02)
        for step in range(10):
            optimizer.zero_grad()
            if scaler is not None:
                backward(net, step, scaler, half)
                scaler.unscale_(optimizer)
            else:
                F.mse_loss(*(net(batch_of(step, torch.float32)[0]), batch_of(step, torch.float32)[1])).backward()
            if clip is not None:
                clip_grad_norm_(optimizer, clip, in_step=True)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        x, y = batch_of(0, torch.float32)
        losses.append(float(F.mse_loss(net.cpu()(x), y)))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def fit(precision: str, plugins: Any = (), **options: Any) -> tuple[Any, Any]:
    import lightning.pytorch as pl

    from am_lightning import AdaptiveMemory
    from tests.lightning.model import Regression, quiet

    class Watched(Regression):
        def on_train_end(self) -> None:  # Lightning moves all to the CPU after it
            self.device_of_training = self.trainer.optimizers[0].momentum()["net.0.weight"].device

    module = Watched()
    named = {} if plugins else {"precision": precision}
    trainer = pl.Trainer(
        **quiet(
            plugins=list(plugins),
            max_steps=10,
            gradient_clip_val=0.5,
            log_every_n_steps=1000,
            callbacks=[AdaptiveMemory()],
            **named,
            **options,
        )
    )
    trainer.fit(module)
    return trainer, module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true"])
def test_the_trainer(precision: str) -> None:
    trainer, module = fit(precision)
    (optimizer,) = trainer.optimizers
    assert f"kernels: {words_of('default')}" in optimizer.describe()
    assert module.device_of_training.type == DEVICE.type and all(bool(p.isfinite().all()) for p in module.parameters())
    assert len(module.seen) == 10 and any(1e-6 < beta < 0.89 - 1e-6 for beta in module.seen[-1].values())
    assert {float(state["step"]) for state in optimizer.state.values()} == {10.0}
    assert 0 < float(optimizer.report()[-1]) < 100  # the norm before clipping


@pytest.mark.parametrize("scale", [2.0**10, 2.0**40])
def test_the_trainer_in_16_mixed(scale: float) -> None:
    """A scale that is far too high makes the first steps overflow: they write nothing and are not counted."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale, backoff_factor=2.0**-12)
    trainer, module = fit("16-mixed", [MixedPrecision("16-mixed", DEVICE.type, scaler)])
    (optimizer,) = trainer.optimizers
    (made,) = {float(state["step"]) for state in optimizer.state.values()}
    assert trainer.global_step == 10
    assert made == 10 if scale == 2.0**10 else 0 < made < 10, made
    assert module.losses[-1] < module.losses[0]
    norm = float(optimizer.report()[-1])
    assert 0 < norm < 100 and all(bool(p.isfinite().all()) for p in module.parameters())
    never = [all(beta != beta for beta in step.values()) for step in module.seen]
    assert sum(never) == 10 - made  # no beta_t before the first step that was made


@pytest.mark.parametrize("exp_avg_dtype", [None, torch.bfloat16], ids=["same", "bfloat16"])
@pytest.mark.parametrize("dtypes", ["float32", "mixed"])
@each_kernel
def test_a_resumed_run_continues_to_the_bit(kernel: str, dtypes: str, exp_avg_dtype: torch.dtype | None) -> None:
    """The state goes through torch.save and is loaded to the CPU and to the device."""
    whole = make(kernel, DTYPES[dtypes], exp_avg_dtype=exp_avg_dtype, scope="global")
    half = make(kernel, DTYPES[dtypes], exp_avg_dtype=exp_avg_dtype, scope="global")
    for step in range(6):
        give(whole, step)
        whole.step()
    for step in range(3):
        give(half, step)
        half.step()
    file = io.BytesIO()
    torch.save({"optimizer": half.state_dict(), "weights": [p.detach() for p in params_of(half)]}, file)
    for where in ("cpu", str(DEVICE)):
        file.seek(0)
        saved = torch.load(file, map_location=where, weights_only=True)
        resumed = make(kernel, DTYPES[dtypes], exp_avg_dtype=exp_avg_dtype, scope="global")
        with torch.no_grad():
            for p, weights in zip(params_of(resumed), saved["weights"], strict=True):
                p.copy_(weights)
        resumed.load_state_dict(saved["optimizer"])
        assert {v.device.type for state in resumed.state.values() for v in state.values()} == {DEVICE.type}
        for step in range(3, 6):
            give(resumed, step)
            resumed.step()
        assert_bitwise(snapshot(resumed), snapshot(whole))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_trainer_resumes_to_the_bit(tmp_path: Path, clip: float | None) -> None:
    import lightning.pytorch as pl

    from am_lightning import AdaptiveMemory
    from tests.lightning.model import Regression, quiet

    def run(steps: int, resume: Path | None = None) -> tuple[Any, Any]:
        options = quiet(max_steps=steps, callbacks=[AdaptiveMemory()], gradient_clip_val=clip)
        module, trainer = Regression(), pl.Trainer(**options)
        trainer.fit(module, ckpt_path=resume, weights_only=True if resume else None)
        return module, trainer

    whole, _ = run(10)
    _, trainer = run(5)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = run(10, tmp_path / "half.ckpt")
    assert rest.seen == whole.seen[5:]
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))
