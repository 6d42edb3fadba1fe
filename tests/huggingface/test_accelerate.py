"""attach(): Accelerate's DDP, FSDP1 and FSDP2 on two processes beside one process, and its errors and logs on one."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from am_lightning import AMSGD, AMAdamW
from am_lightning.huggingface import attach
from tests.huggingface.events import histograms_in, scalars_in
from tests.huggingface.launch import launch
from tests.loggers.intervals import assert_curves, curves_of
from tests.loggers.pictures import in_events
from tests.sharding.model import batch_of, make_net

# name -> arguments of accelerate_worker.layout
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp", "scope": "tensor", "clip": True},
    "ddp, accumulated": {"kind": "ddp", "scope": "global", "clip": True, "parts": 2},
    "fsdp1": {"kind": "fsdp1", "scope": "tensor", "clip": True},
    "fsdp1, global": {"kind": "fsdp1", "scope": "global"},
    "fsdp1, flat": {"kind": "fsdp1_flat", "scope": "global", "clip": True},
    "fsdp2": {"kind": "fsdp2", "scope": "tensor", "clip": True},
    "fsdp2, accumulated": {"kind": "fsdp2", "scope": "tensor", "parts": 2},
    "fsdp2, global": {"kind": "fsdp2", "scope": "global", "optimizer": "sgd"},
}
RESUMED = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("accelerate")
    module = "tests.huggingface.accelerate_worker"
    return folder, launch(module, folder, processes=2, layouts=LAYOUTS, resumed=RESUMED)


@pytest.mark.parametrize("name", LAYOUTS)
def test_beta_is_that_of_one_process(ranks, name: str) -> None:
    """beta_t is compared before it is clipped, with gradient clipping and accumulation included."""
    _, (first, second) = ranks
    ours, alone = first[name], first[name]["alone"]
    assert alone["share"] > 0.2
    compared = 0
    for row, single in zip(ours["raw"], alone["raw"], strict=True):
        for given, beta in row.items():
            theirs = single[given.removeprefix("mine.")]
            if beta == beta or theirs == theirs:
                assert beta == pytest.approx(theirs, rel=5e-5, abs=5e-6), given
                compared += 1
    assert compared >= 7 * len(alone["names"])
    assert [{n: b.hex() for n, b in step.items()} for step in ours["seen"]] == [
        {n: b.hex() for n, b in step.items()} for step in second[name]["seen"]
    ]
    assert "; 1 all-reduce a step" in ours["described"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_replicas_and_norms(ranks, name: str) -> None:
    """Parameters that the user has not named get the model's names. Norms are global, without a warning of replicas."""
    _, results = ranks
    for result in results:
        ours = result[name]
        given = "mine." if name.startswith("ddp") else ""
        assert sorted(ours["names"]) == sorted(given + n for n in ours["alone"]["names"])
        assert ours["replicas"] == name.startswith("ddp")
        assert len(ours["norms"]) == (8 if LAYOUTS[name].get("clip") else 0)
        for norm, theirs in ours["norms"]:
            assert norm == pytest.approx(theirs, rel=1e-5)
        assert result["warned"] == []


@pytest.mark.parametrize("kind", RESUMED)
def test_a_loaded_run_is_bitwise_the_unbroken_one(ranks, kind: str) -> None:
    _, results = ranks
    for result in results:
        unbroken, resumed = result[f"resumed {kind}"]["unbroken"], result[f"resumed {kind}"]["resumed"]
        assert len(resumed["seen"]) == 4
        assert resumed["seen"] == unbroken["seen"][4:]
        assert resumed["norms"] == unbroken["norms"][4:]


@pytest.mark.parametrize("kind", RESUMED)
def test_trackers_get_the_curves_at_optimizer_steps(ranks, kind: str) -> None:
    """The main process alone logs; after a resume the steps continue, and saving a fresh optimizer makes no step."""
    folder, (first, _) = ranks
    seen = first[f"resumed {kind}"]["unbroken"]["seen"]
    for name, steps in (("unbroken", (2, 4, 6, 8)), ("resumed", (6, 8))):
        scalars = scalars_in(folder / kind / name)
        assert_curves(scalars, curves_of(seen, steps, begins=steps[0] - 2))
        assert scalars["am/skipped_steps"] == dict.fromkeys(steps, 0.0)
        assert set(scalars) >= {"am/beta/norm", "am/clamp/at_max", "am/clamp/at_zero", "am/grad_norm"}
        assert histograms_in(folder / kind / name) == {"am/beta": dict.fromkeys(steps, 18.0)}


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("flat tensor", "ValueError", ["use_orig_params=True", "fsdp_use_orig_params: true", "scope='global'"]),
        ("flat, built too early", "ValueError", ["none of the 1 prepared models", "before the optimizer is built"]),
        ("not prepared", "RuntimeError", ["not prepared", "accelerator.prepare(model, optimizer)"]),
        ("another model", "ValueError", ["none of the 1 prepared models", "prepare the model and the optimizer"]),
    ],
)
def test_every_rank_refuses_with_the_cure(ranks, case: str, kind: str, words: list[str]) -> None:
    _, results = ranks
    for result in results:
        found, text = result["refusals"][case]
        assert found == kind
        assert all(word in text for word in words), text


def test_fsdp1_loads_what_it_loads_for_adamw(ranks) -> None:
    """Accelerate 1.15 gives any optimizer without a step an empty sharded state."""
    _, results = ranks
    for result in results:
        assert result["fresh"]["AMAdamW"] == result["fresh"]["AdamW"]


# ---------------------------------------------------------------------- one process
@pytest.fixture
def accelerator(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


def step(accelerator: Accelerator, model: Any, *optimizers: Any, bad: bool = False) -> None:
    accelerator.backward(model(batch_of(0, torch.float32)[0]).square().mean())
    for optimizer in optimizers:
        if bad:
            next(model.parameters()).grad.fill_(float("nan"))
        optimizer.step()
        optimizer.zero_grad()


def test_two_optimizers_and_attaching_twice(accelerator, tmp_path) -> None:
    """The second optimizer's tags start with am-1; a second attach() only changes the interval."""
    accelerator.init_trackers("run")
    net, other = make_net(torch.float32), make_net(torch.float32)
    net, other, adamw, sgd = accelerator.prepare(net, other, AMAdamW(net.parameters()), AMSGD(other.parameters()))
    readings = attach(accelerator, adamw, log_every_n_steps=1)
    second = attach(accelerator, sgd.optimizer, log_every_n_steps=2)
    assert attach(accelerator, adamw, log_every_n_steps=2) is readings
    assert (readings.prefix, second.prefix) == ("am", "am-1")
    for _ in range(4):
        step(accelerator, net, adamw)
        step(accelerator, other, sgd)
    step(accelerator, net, adamw)
    assert readings.finish().startswith("am: mean beta_t")
    accelerator.end_training()
    assert max(at for tag, at, _ in in_events(tmp_path / "run") if tag == "am/beta/layers") == 5
    scalars = scalars_in(tmp_path / "run")
    assert scalars["am/beta/mean"].keys() == scalars["am-1/beta/mean"].keys() == {2, 4}
    assert not any(tag.startswith("am-2") for tag in scalars)
    assert histograms_in(tmp_path / "run").keys() == {"am/beta", "am-1/beta"}


@pytest.mark.slow
def test_a_later_run_of_the_process_starts_with_am_again(accelerator) -> None:
    """An earlier run's optimizer can be freed, as find_executable_batch_size needs."""
    alive = []
    for _ in range(2):
        accelerator.free_memory()
        net = make_net(torch.float32)
        net, optimizer = accelerator.prepare(net, AMAdamW(net.parameters()))
        readings = attach(accelerator, optimizer)
        assert readings.prefix == "am"
        step(accelerator, net, optimizer)
        alive.append(weakref.ref(optimizer.optimizer))
        del net, optimizer, readings
    accelerator.free_memory()
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_one_optimizer_over_two_models(accelerator) -> None:
    net, other = make_net(torch.float32), make_net(torch.float32, blocks=1)
    params = [*net.parameters(), *other.parameters()]
    _, _, optimizer = accelerator.prepare(net, other, AMAdamW(params))
    attach(accelerator, optimizer)
    assert {"0.blocks.1.up.weight", "1.blocks.0.up.weight"} <= set(optimizer.optimizer.parameter_names())


def test_skipped_steps_are_warned_of_and_counted(accelerator, tmp_path) -> None:
    """If the interval is None, nothing is read or reported. A dropped first step counts as a step of the curve."""
    accelerator.init_trackers("run")
    net = make_net(torch.float32)
    net, optimizer = accelerator.prepare(net, AMAdamW(net.parameters()))
    attach(accelerator, optimizer, log_every_n_steps=2)
    with pytest.warns(UserWarning, match=r"am: 2 steps since the last report dropped.*first in 'shift'"):
        step(accelerator, net, optimizer, bad=True)
        step(accelerator, net, optimizer, bad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(accelerator, net, optimizer)
        step(accelerator, net, optimizer)
    readings = attach(accelerator, optimizer, log_every_n_steps=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(accelerator, net, optimizer, bad=True)
        step(accelerator, net, optimizer)
    readings.read()
    assert readings.scalars()["am/skipped_steps"] == 3
    accelerator.end_training()
    assert scalars_in(tmp_path / "run")["am/skipped_steps"] == {2: 2.0, 4: 2.0}


def test_wrong_arguments(accelerator) -> None:
    net = make_net(torch.float32)
    net, ours, plain = accelerator.prepare(net, AMAdamW(net.parameters()), torch.optim.AdamW(net.parameters()))
    with pytest.raises(TypeError, match=r"Invalid optimizer: AdamW \(optimizer must be AMAdamW or AMSGD: build"):
        attach(accelerator, plain)
    with pytest.raises(TypeError, match=r"Invalid accelerator: AcceleratedOptimizer"):
        attach(ours, accelerator)
    with pytest.raises(ValueError, match=r"Invalid log_every_n_steps: 0 .*whole number >= 1"):
        attach(accelerator, ours, log_every_n_steps=0)
    with pytest.raises(TypeError, match=r"Invalid log_every_n_steps: 2.5"):
        attach(accelerator, ours, log_every_n_steps=2.5)
    with pytest.raises(RuntimeError, match=r"not prepared by this accelerator"):  # two other optimizers are prepared
        attach(accelerator, AMAdamW(net.parameters()))
