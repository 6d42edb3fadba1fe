"""A default device that is not the parameters': every path has the same bits, as AdamW's paths have."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from am_lightning.loggers.reader import StatsReader
from am_lightning.optim.convert import convert_adamw
from tests.optim.harness import assert_bitwise, compile_on_cpu, named_params, params_of, snapshot
from tests.sharding.pool import Pool

SHAPES = [(6, 4), (), (70_001,), (0,)]
KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "chunked": (AMAdamW, {}),
    "single_tensor": (AMAdamW, {"foreach": False}),
    "foreach": (AMAdamW, {"foreach": True}),
    "cpp": (AMAdamW, {"fused": True}),
    "compile": (AMAdamW, {"fused": True}),
    "bfloat16": (AMAdamW, {"exp_avg_dtype": torch.bfloat16}),
    "bfloat16 single_tensor": (AMAdamW, {"exp_avg_dtype": torch.bfloat16, "foreach": False}),
    "bfloat16 foreach": (AMAdamW, {"exp_avg_dtype": torch.bfloat16, "foreach": True}),
    "group": (AMAdamW, {"scope": "group", "nonfinite": "propagate"}),
    "sgd": (AMSGD, {"weight_decay": 0.1}),
    "sgd exact": (AMSGD, {"loss_gap": "exact"}),
}


@contextmanager
def set_as_default(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        if getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", ...) is None:
            del torch._GLOBAL_DEVICE_CONTEXT.device_context  # torch 2.6 asks the context for its device afterwards


WAYS: dict[str, Callable[[str], Any]] = {"context": torch.device, "set_default_device": set_as_default}


def train(kind: str, foreign: Callable[[], Any]) -> list[torch.Tensor]:
    """Use all methods of an optimizer under a default device that ``foreign`` sets; return weights and states."""
    cls, options = KINDS[kind]
    ours = cls is not torch.optim.AdamW
    params = named_params(SHAPES, torch.float32)
    loss = torch.tensor(1.0) if kind == "sgd exact" else None
    with foreign():
        optimizer: Any = cls(params, lr=1e-2, **options)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p in params_of(optimizer):
            p.grad = torch.randn(p.shape, generator=generator)
        with foreign():
            if ours:
                clip_grad_norm_(optimizer, 1.0, in_step=step > 1)
            optimizer.step(None if loss is None else lambda: loss)
            if step == 1:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.zero_grad()
            if ours:
                _read(optimizer)
    return snapshot(optimizer)


def _read(optimizer: Any) -> None:
    numbers = StatsReader(optimizer)
    numbers.read()
    assert numbers.scalars()["am/grad_norm"] > 0 and numbers.layers()
    assert all(beta.device.type == "cpu" for beta in optimizer.momentum().values())
    assert not optimizer.last_step_skipped and "tensors" in optimizer.describe()


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k == "compile" else ()) for k in KINDS])
def test_every_path(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "compile":
        compile_on_cpu(monkeypatch)
    try:
        found = train(kind, lambda: WAYS[way]("meta"))
    except RuntimeError as error:
        if kind != "AdamW" or "meta" not in str(error):
            raise
        pytest.skip(f"torch {torch.__version__}'s AdamW makes its own step there: {error}")
    assert_bitwise(found, train(kind, lambda: torch.device("cpu")))


@pytest.mark.slow
def test_in_triton(interpreter: Pool) -> None:
    interpreter.run("tests.optim.interpreted_steps:under_another_default_device")


def test_what_was_not_made_by_a_step() -> None:
    """Copy, pickle or convert an optimizer, or load AdamW's checkpoint, before its first step."""

    def run(device: str) -> list[torch.Tensor]:
        params = named_params([(5, 3), (4,)], torch.float32)
        for _, p in params:
            p.grad = torch.ones_like(p)
        torchs = torch.optim.AdamW(params, lr=1e-2)
        torchs.step()
        with torch.device(device):
            ours = AMAdamW(params, lr=1e-2)
            ours.load_state_dict(torchs.state_dict())
            ours.step()
            assert not any(beta.isnan() for beta in ours.momentum().values())
            file = io.BytesIO()
            torch.save(ours, file)
            file.seek(0)
            other = copy.deepcopy(torch.load(file, weights_only=False))
            fresh: Any = convert_adamw(torch.optim.AdamW(params, lr=1e-2))
            assert all(beta.isnan() for beta in fresh.momentum().values())
            assert fresh.report().numel() == 2 + 4
        for p in params_of(other):
            p.grad = torch.full_like(p, 0.5)
        other.step()
        return snapshot(other)

    assert_bitwise(run("meta"), run("cpu"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["AdamW", "chunked", "single_tensor", "foreach", "cpp"])
def test_of_fake_tensors(kind: str, device: str) -> None:
    """Planning tools need memory and shapes of a step without numbers."""
    if device == "cuda" and not torch.backends.cuda.is_built():
        pytest.skip("this torch has no CUDA")
    cls, options = KINDS[kind]
    with FakeTensorMode():
        try:
            torch.ones(2, device=device)[:, None]
        except RuntimeError:
            pytest.skip("fake tensors of this torch ask for CUDA's driver")
        params = [
            torch.nn.Parameter(torch.ones(shape, device=device)) for shape in SHAPES[:3]
        ]  # torch 2.11 cannot split an empty tensor
        optimizer: Any = cls(params, lr=1e-2, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            if cls is AMAdamW:
                clip_grad_norm_(optimizer, 1.0)
            optimizer.step()
        for p in params:
            state = optimizer.state[p]
            assert isinstance(state["exp_avg_sq"], FakeTensor) and state["exp_avg_sq"].shape == p.shape
            assert state["exp_avg_sq"].device.type == device
        if cls is AMAdamW:
            assert optimizer.report().shape == (len(params) + 4,)


def test_a_model_that_is_meta() -> None:
    for cls in (torch.optim.AdamW, AMAdamW):
        p = torch.nn.Parameter(torch.ones(3, device="meta"))
        p.grad = torch.ones_like(p)
        optimizer = cls([p])
        optimizer.step()
        assert optimizer.state[p]["exp_avg_sq"].is_meta
