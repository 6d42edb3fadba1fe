"""Fabric: ``attach`` in one process, and under DDP, FSDP1 and FSDP2."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from am_lightning import AdaptiveMemory, AMAdamW, am_adamw, am_sgd, clip_grad_norm_
from am_lightning.lightning import attach
from tests.lightning.cluster_fabric import CLIP, EVERY, STEPS, alone
from tests.lightning.model import batch_of, interior_share, make_net
from tests.loggers.intervals import assert_curves, curves_of
from tests.loggers.pictures import in_events
from tests.sharding.pool import Pool


def events(folder: Path | str) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("placed", ["ddp", "fsdp1", "fsdp2"])
def test_under_every_strategy_beta_is_one_process_and_is_logged_once(
    pool: Callable[[int], Pool], tmp_path: Path, placed: str
) -> None:
    first, second = pool(2).run("tests.lightning.cluster_fabric:fit", placed=placed, folder=str(tmp_path))
    seen, norms = alone()
    assert interior_share(seen, 0.89) > 0.2
    assert first["seen"] == second["seen"]
    for ours, theirs in zip(first["seen"], seen, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
    assert (first["logged"], second["logged"]) == (STEPS // EVERY, 0)
    assert first["all_reduces"] == 1 + 2 * STEPS  # one vote on kernels; then the norm and the sums of each step
    assert first["replicas"] == (placed == "ddp")
    assert ("the module that fabric.setup returned" in first["refused"]) == (placed == "fsdp1")
    found = events(tmp_path / placed / "run")
    mean, logged = found.Scalars("am/beta/mean"), found.Scalars("am/grad_norm")
    assert [event.step for event in mean] == list(range(EVERY, STEPS + 1, EVERY))
    expected = curves_of(first["seen"], range(EVERY, STEPS + 1, EVERY))
    assert_curves({tag: {e.step: e.value for e in found.Scalars(tag)} for tag in expected}, expected)
    assert [event.value for event in logged] == pytest.approx(norms[EVERY - 1 :: EVERY], rel=2e-5)
    assert max(norms) > CLIP > min(norms)
    tags = found.Tags()
    assert {"am/beta/layer/blocks.0", "am/beta/layer/mix", "am/skipped_steps"} <= set(tags["scalars"])
    assert tags["histograms"] == ["am/beta"] and "custom_scalars__config__" in tags["tensors"]
    card = found.Tensors("am/summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "AMAdamW" in card and "over 2 ranks" in card


def steps(fabric: Fabric, model, optimizers, which: range, bad: set[int] = frozenset()) -> None:
    for step in which:
        x, y = batch_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        fabric.backward(loss * (float("nan") if step in bad else 1.0))
        for optimizer in optimizers:
            optimizer.step()


def fabric_of(folder: Path) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, loggers=[TensorBoardLogger(folder, name="", version="run")])


def test_two_optimizers_and_skipped_steps(tmp_path: Path) -> None:
    """The first optimizer logs before the second has made a step; the TensorBoard layout has both."""
    fabric, net = fabric_of(tmp_path), make_net()
    model, first, second = fabric.setup(net, AMAdamW(net[:3].parameters(), lr=0.05), am_sgd(net[3:], lr=0.01))
    curves = attach(fabric, model, first, log_every_n_steps=2)
    assert attach(fabric, model, first, log_every_n_steps=2) is curves
    attach(fabric, model, second, log_every_n_steps=3)
    attach(fabric, model, second, log_every_n_steps=None)
    steps(fabric, model, [first, second], range(2))
    attach(fabric, model, second, log_every_n_steps=4)
    with pytest.warns(UserWarning, match=r"am: 1 step since the last report dropped"):
        steps(fabric, model, [first, second], range(2, 8), bad={5})
    fabric.logger.finalize("success")
    found = events(tmp_path / "run")
    assert [e.step for e in found.Scalars("am/beta/mean")] == [2, 4, 6, 8]
    assert [e.step for e in found.Scalars("am-1/beta/mean")] == [4, 8]
    assert [e.value for e in found.Scalars("am/skipped_steps")] == [0, 0, 1, 1]
    assert "am/beta/layer/net.0" not in found.Tags()["scalars"] and "am/beta/layer/0" in found.Tags()["scalars"]
    page = found.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]  # the layout that TensorBoard shows
    assert b"adaptive momentum (am)" in page and b"adaptive momentum (am-1)" in page
    cards = [tag for tag in found.Tags()["tensors"] if "summary" in tag]
    assert sorted(cards) == ["am-1/summary/text_summary", "am/summary/text_summary"]


def test_a_resumed_run_counts_from_its_checkpoint(tmp_path: Path) -> None:
    for part, which in (("first", range(3)), ("second", range(3, 6))):
        fabric, net = fabric_of(tmp_path / part), make_net()
        model, optimizer = fabric.setup(net, am_adamw(net, lr=0.05))
        reader = attach(fabric, model, optimizer, log_every_n_steps=2)
        state = {"model": model, "optimizer": optimizer}
        if part == "second":
            fabric.load(tmp_path / "half.ckpt", state)
        steps(fabric, model, [optimizer], which)
        fabric.save(tmp_path / "half.ckpt", state)
        assert reader.finish().startswith("am: mean beta_t")
        fabric.logger.finalize("success")
    assert [e.step for e in events(tmp_path / "first" / "run").Scalars("am/beta/mean")] == [2]
    assert [e.step for e in events(tmp_path / "second" / "run").Scalars("am/beta/mean")] == [4, 6]
    assert [step for _, step, _ in in_events(tmp_path / "first")] == [2, 3]


def test_names_that_the_user_gave_stay(tmp_path: Path) -> None:
    fabric, net = fabric_of(tmp_path), make_net()
    named = [(f"mine.{name}", param) for name, param in net.named_parameters()]
    model, optimizer = fabric.setup(net, AMAdamW(named))
    attach(fabric, model, optimizer)
    assert all(name.startswith("mine.") for name in optimizer.momentum())
    unnamed = AMAdamW(net.parameters())
    attach(fabric, net, unnamed)  # one process needs no set-up or wrapped module
    assert set(unnamed.momentum()) == {name for name, _ in net.named_parameters()}


def test_clip_grad_norm_takes_fabrics_optimizer(tmp_path: Path) -> None:
    """The wrapper's class passes for AMAdamW, but an attribute set on it does not reach the optimizer inside."""
    fabric, net = fabric_of(tmp_path), make_net()
    model, optimizer = fabric.setup(net, am_adamw(net, lr=0.05))
    curves = attach(fabric, model, optimizer)
    x, y = batch_of(0)
    fabric.backward(torch.nn.functional.mse_loss(model(x), y))
    expected = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    assert float(clip_grad_norm_(optimizer, 0.1)) == pytest.approx(float(expected), rel=1e-6)
    curves.read()
    assert curves.scalars()["am/grad_norm"] == pytest.approx(float(expected), rel=1e-6)


def test_what_is_not_adaptive_is_refused_with_the_cure(tmp_path: Path) -> None:
    fabric, net = fabric_of(tmp_path), make_net()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters()))
    with pytest.raises(TypeError, match=r"Invalid optimizer: AdamW .*am_adamw\(model"):
        attach(fabric, model, optimizer)
    ours = am_adamw(net)
    with pytest.raises(TypeError, match="Invalid fabric: Sequential"):
        attach(net, model, ours)
    with pytest.raises(TypeError, match="Invalid model: AMAdamW"):
        attach(fabric, ours, model)
    with pytest.raises(ValueError, match="none of the 8 parameters"):
        attach(fabric, make_net(), ours)
    with pytest.raises(ValueError, match="log_every_n_steps"):
        attach(fabric, model, ours, log_every_n_steps=0)


def test_ddp_before_launch_is_refused() -> None:
    fabric, net = Fabric(accelerator="cpu", devices=2, strategy="ddp"), make_net()
    with pytest.raises(RuntimeError, match=r"fabric\.launch\(\)"):
        attach(fabric, net, am_adamw(net))


def test_no_warning_where_nothing_is_wrong(tmp_path: Path) -> None:
    fabric, net = fabric_of(tmp_path), make_net()
    model, optimizer = fabric.setup(net, am_adamw(net, lr=0.05))
    attach(fabric, model, optimizer, log_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="lightning")
        steps(fabric, model, [optimizer], range(3))


def test_the_trainers_callback_in_fabric_is_named() -> None:
    """Fabric calls its callbacks' methods and nothing else, so AdamW would stay unchanged without a message."""
    net = make_net()
    fabric = Fabric(accelerator="cpu", callbacks=[AdaptiveMemory()])
    with pytest.raises(TypeError, match=r"callback of Lightning's Trainer.*attach\(fabric, model, optimizer\)"):
        fabric.setup(net, torch.optim.AdamW(net.parameters()))
