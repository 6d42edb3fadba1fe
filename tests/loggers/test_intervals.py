"""Readings cover the interval: mean, lowest and highest beta_t and clamps, checked with a known beta_t."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from am_lightning import AMAdamW
from am_lightning.loggers import attach
from am_lightning.loggers.reader import StatsReader
from am_lightning.optim.intervals import Interval
from am_lightning.optim.step_stats import BetaTally
from tests.loggers.intervals import assert_curves, numbers_of
from tests.loggers.planted import CAP, DIP, NAMES, Planted, expected_curves, planted, table
from tests.optim.test_no_sync import RefuseDispatch, RefuseMethods

STEPS = 50
F64 = torch.float64


def model_and(*, named: bool = True) -> tuple[Planted, AMAdamW]:
    model = Planted()
    params = model.named_parameters() if named else model.parameters()
    return model, AMAdamW(params, lr=0.01, weight_decay=0.0)


def train(model: Planted, optimizer: AMAdamW, steps: int, *, after_each: Callable[[], None] | None = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(optimizer).backward()
        optimizer.step()
        if after_each is not None:
            after_each()


class Rows(dict[int, dict[str, float]]):
    """Keep rows as a writer."""

    def __call__(self, scalars: dict[str, float], step: int) -> None:
        assert step not in self
        self[step] = scalars

    def curves(self) -> dict[str, dict[int, float]]:
        tags = {tag for row in self.values() for tag in row}
        return {tag: {step: row[tag] for step, row in self.items()} for tag in tags}


def assert_read(reader: StatsReader, first: int, last: int) -> None:
    """Require that the last reading covers the steps ``first`` to ``last``."""
    found = {tag: {0: value} for tag, value in reader.scalars().items()}
    assert_curves(found, {tag: {0: value} for tag, value in numbers_of(planted(last)[first - 1 :]).items()})
    assert reader.interval.steps.tolist() == [last - first + 1] * len(NAMES)


def test_the_table_is_what_the_optimizer_computes() -> None:
    model, optimizer = model_and()
    seen: list[dict[str, float]] = []
    train(
        model, optimizer, STEPS, after_each=lambda: seen.append({n: float(b) for n, b in optimizer.momentum().items()})
    )
    expected = planted(STEPS)
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)
    betas = [beta for step in expected for beta in step.values()]
    assert sum(0 < beta < CAP for beta in betas) > 0.5 * len(betas)
    assert CAP in betas and 0.0 in betas and table(*DIP[:2]) == DIP[2]


@pytest.mark.parametrize("every", [1, 7, 50])
def test_a_writer_gets_the_mean_and_the_ends_of_the_interval(every: int) -> None:
    """Readings cover all tensors, layer groups and layers, and include a dip of one step, whichever step is logged."""
    model, optimizer = model_and()
    rows = Rows()
    attach(optimizer, rows, every=every)
    train(model, optimizer, STEPS)
    assert list(rows) == list(range(every, STEPS + 1, every))
    assert_curves(rows.curves(), expected_curves(STEPS, every))
    end = math.ceil(DIP[1] / every) * every
    assert rows[end]["am/beta/layer/layers.1/min"] == pytest.approx(DIP[2], abs=1e-9)


def test_groups_have_the_highest_too() -> None:
    model, optimizer = model_and()
    reader = StatsReader(optimizer)
    train(model, optimizer, 3)
    reader.read()
    train(model, optimizer, 2)
    reader.read()
    highest = max(table("embed.weight", step) for step in (4, 5))
    assert reader.scalars()["am/beta/embed/max"] == pytest.approx(highest, abs=1e-9)
    assert highest < CAP


# ---------------------------------------------------------------------- readers
def test_each_reader_has_an_interval_of_its_own() -> None:
    """Two writers, a user's reader, and the writer's own reader read by hand do not shorten each other's intervals."""
    model, optimizer = model_and()
    often, seldom = Rows(), Rows()
    handle = attach(optimizer, often, every=3)
    attach(optimizer, seldom, every=10)
    mine = StatsReader(optimizer)
    train(model, optimizer, 4)
    handle.reader.read()  # a user's own reading covers the steps since the last such reading
    assert_read(handle.reader, 1, 4)
    mine.read()
    assert_read(mine, 1, 4)
    train(model, optimizer, 9)
    mine.read()
    assert_read(mine, 5, 13)
    handle.reader.read()
    assert_read(handle.reader, 5, 13)
    train(model, optimizer, 17)
    assert_curves(often.curves(), expected_curves(30, 3))
    assert_curves(seldom.curves(), expected_curves(30, 10))
    mine.read()
    assert_read(mine, 14, 30)


def test_a_reader_has_what_nobody_has_read_and_then_its_own() -> None:
    model, optimizer = model_and()
    train(model, optimizer, 3)
    first = StatsReader(optimizer)
    train(model, optimizer, 2)
    first.read()
    assert_read(first, 1, 5)
    train(model, optimizer, 2)
    second = StatsReader(optimizer)
    train(model, optimizer, 1)
    second.read()
    first.read()
    assert_read(first, 6, 8)
    assert_read(second, 6, 8)


def test_reading_without_a_step_between_gives_nothing_and_looking_takes_nothing() -> None:
    model, optimizer = model_and()
    reader = StatsReader(optimizer)
    train(model, optimizer, 3)
    reader.look()
    reader.state_dict()
    reader.read()
    assert_read(reader, 1, 3)
    reader.read()
    assert "am/beta/mean" not in reader.scalars() and reader.scalars()["am/skipped_steps"] == 0
    assert not reader.layers()


def test_readers_that_are_gone_are_not_kept() -> None:
    model, optimizer = model_and()
    for _ in range(3):
        StatsReader(optimizer)
    kept = StatsReader(optimizer)
    train(model, optimizer, 2)
    kept.read()
    unread = optimizer._stats._readers._unread
    assert set(unread) == {kept, kept.history}


# ---------------------------------------------------------------------- cost of a step
class Count(TorchDispatchMode):
    """Count operators that run on the device, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(view in str(func) for view in ("unsqueeze", "select", "slice")):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tensors", [1, 5, 300])
def test_a_step_costs_six_operations_however_many_tensors_there_are(tensors: int) -> None:
    tally = BetaTally(tuple(map(str, range(tensors))), torch.empty(0, dtype=F64))
    cap, counts = torch.full((tensors,), CAP, dtype=F64), []
    for step in range(4):
        cap = cap.clone() if step == 2 else cap  # another cap
        betas, active = torch.rand(tensors, dtype=F64) * CAP, torch.rand(tensors) < 0.8
        with RefuseMethods(), RefuseDispatch(), Count() as count:
            tally.add(betas, cap, active)
        counts.append(len(count.names))
    assert counts == [7, 6, 7, 6]


def test_a_changed_cap_is_the_one_that_is_met() -> None:
    tally = BetaTally(("a", "b"), torch.empty(0, dtype=F64))
    both = torch.tensor([True, True])
    for cap in (0.89, 0.5):
        tally.add(torch.tensor([0.5, 0.0], dtype=F64), torch.tensor([cap, 0.89], dtype=F64), both)
    found = Interval(*tally.take())
    assert (found.at_max.tolist(), found.at_zero.tolist()) == ([1.0, 0.0], [0.0, 2.0])
    assert Interval(*tally.take()).steps.tolist() == [0.0, 0.0]


def test_what_a_tensor_took_no_part_in_is_not_in_its_numbers() -> None:
    tally = BetaTally(("a", "b"), torch.empty(0, dtype=F64))
    cap = torch.full((2,), CAP, dtype=F64)
    for betas, active in (((0.5, 0.0), (True, False)), ((CAP, 0.25), (False, True))):
        tally.add(torch.tensor(betas, dtype=F64), cap, torch.tensor(active))
    expected = [[0.5, 0.25], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.5, 0.25], [0.5, 0.25]]
    assert tally.take().tolist() == expected


def test_a_reading_waits_once_and_a_step_never() -> None:
    model, optimizer = model_and()
    for group in optimizer.param_groups:
        group["foreach"] = True
    reader = StatsReader(optimizer)
    train(model, optimizer, 2)
    for _ in range(2):
        model.loss(optimizer).backward()
        with RefuseMethods(), RefuseDispatch():
            optimizer.step()
            taken = optimizer.interval(reader)
    assert taken[3].tolist() == [1.0] * len(NAMES)


def test_what_is_kept_does_not_grow_with_the_steps() -> None:
    optimizer = AMAdamW([("w", param := nn.Parameter(torch.ones(2)))])
    reader = StatsReader(optimizer)
    param.grad = torch.ones(2)
    optimizer.step()
    (tally,) = optimizer._stats._tallies.values()
    address = tally.numbers.data_ptr()
    for _ in range(1999):
        optimizer.step()
    assert list(optimizer._stats._tallies.values()) == [tally] and tally.numbers.data_ptr() == address
    assert not any(optimizer._stats._readers._unread.values())
    reader.read()
    assert reader.interval.steps.tolist() == [2000.0]


# ---------------------------------------------------------------------- changes between two readings
def rename(model: Planted, optimizer: AMAdamW) -> None:
    optimizer.name_parameters(model.named_parameters())


def cast(model: Planted, optimizer: AMAdamW) -> None:
    """Use another dtype, which stands for another device: the layout is rebuilt."""
    model.float()


@pytest.mark.parametrize("change", [rename, cast])
def test_tensors_that_are_named_or_moved_between_readings_lose_nothing(change: Callable[..., None]) -> None:
    model, optimizer = model_and(named=change is not rename)
    rows, reader = Rows(), StatsReader(optimizer)
    attach(optimizer, rows, every=10)
    train(model, optimizer, 4)
    change(model, optimizer)
    train(model, optimizer, 6)
    reader.read()
    assert reader.interval.steps.tolist() == [10.0] * len(NAMES)
    assert_curves(rows.curves(), expected_curves(10, 10))
    assert reader.layers() == {tag: value for tag, value in rows[10].items() if "/layer/" in tag}
    train(model, optimizer, 10)
    reader.read()
    assert reader.interval.steps.tolist() == [10.0] * len(NAMES)
    assert_curves(rows.curves(), expected_curves(20, 10))


def test_tallies_of_earlier_names_are_forgotten_when_they_are_read() -> None:
    model, optimizer = model_and(named=False)
    reader = StatsReader(optimizer)
    train(model, optimizer, 1)
    rename(model, optimizer)
    train(model, optimizer, 1)
    reader.read()
    assert reader.interval.steps.tolist() == [2.0] * len(NAMES)
    assert len(optimizer._stats._tallies) == 1


def test_a_group_that_is_added_counts_from_its_first_step() -> None:
    model = Planted()
    named = dict(model.named_parameters())
    late = "head.weight"
    optimizer = AMAdamW([item for item in named.items() if item[0] != late], lr=0.01, weight_decay=0.0)
    reader = StatsReader(optimizer)
    train(model, optimizer, 4)
    optimizer.add_param_group({"params": [(late, named[late])], "weight_decay": 0.0})
    train(model, optimizer, 3)
    reader.read()
    steps = {name: 3 if name == late else 7 for name in NAMES}
    names = optimizer.parameter_names()
    assert dict(zip(names, reader.interval.steps.tolist(), strict=True)) == steps
    totals = [sum(table(name, step) for step in range(1, count + 1)) for name, count in steps.items()]
    expected = dict(zip(steps, totals, strict=True))
    assert dict(zip(names, reader.interval.total.tolist(), strict=True)) == pytest.approx(expected, abs=1e-9)


def test_a_group_that_is_added_leaves_the_map_of_the_others() -> None:
    """The names of the layers then become longer, because there is a second block 0."""
    blocks = {side: nn.Linear(2, 2, bias=False) for side in ("encoder", "decoder")}
    names = {side: f"{side}.layers.0.weight" for side in blocks}
    optimizer = AMAdamW([(names["encoder"], blocks["encoder"].weight)], lr=0.01)
    reader = StatsReader(optimizer)
    for step in range(1, 31):
        if step == 11:
            optimizer.add_param_group({"params": [(names["decoder"], blocks["decoder"].weight)]})
        torch.stack([block(torch.ones(2)).sum() for block in blocks.values()]).sum().backward()
        optimizer.step()
        if step % 10 == 0:
            reader.read(step)
    kept = reader.history.state_dict()["map"]
    assert dict(zip(kept["layers"], kept["steps"].T.tolist(), strict=True)) == {
        "encoder.layers.0": [10, 10, 10],
        "decoder.layers.0": [0, 10, 10],
    }


def test_the_cap_is_that_of_the_group_now() -> None:
    """The scalars use the current cap. The map's colours extend to the largest cap of the run."""
    model, optimizer = model_and()
    reader, caps = StatsReader(optimizer), []
    for step, cap in ((3, 0.8), (6, 0.95), (9, 0.7)):
        for group in optimizer.param_groups:
            group["beta1_max"] = cap
        train(model, optimizer, 3)
        reader.read(step)
        caps.append(reader.scalars()["am/beta/cap"])
    assert caps == [0.8, 0.95, 0.7]
    assert reader.history.state_dict()["map"]["cap"] == 0.95


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_dropped_steps_and_tensors_without_a_gradient_are_not_counted(nonfinite: str) -> None:
    model = Planted()
    optimizer = AMAdamW(model.named_parameters(), lr=0.01, weight_decay=0.0, nonfinite=nonfinite)
    reader = StatsReader(optimizer)
    train(model, optimizer, 3)
    model.loss(optimizer).backward()
    optimizer.zero_grad()
    model.loss(optimizer).backward()
    model.head.weight.grad = None
    model.embed.weight.grad[0] = math.nan
    optimizer.step()
    reader.read()
    taken = 0 if nonfinite == "skip" else 1
    counted = dict(zip(NAMES, reader.interval.steps.tolist(), strict=True))
    assert counted == {name: 3 + (0 if name == "head.weight" else taken) for name in NAMES}
    assert all(math.isfinite(value) for value in reader.scalars().values())
    if nonfinite == "skip":
        assert_read(reader, 1, 3)


def test_the_step_that_a_checkpoint_makes_leaves_no_trace() -> None:
    model, optimizer = model_and()
    reader, rows = StatsReader(optimizer), Rows()
    attach(optimizer, rows, every=3)
    get_optimizer_state_dict(model, optimizer)
    reader.read()
    assert reader.interval.steps.tolist() == [0.0] * len(NAMES)
    train(model, optimizer, 3)
    reader.read()
    assert_read(reader, 1, 3)
    assert_curves(rows.curves(), expected_curves(3, 3))


# ---------------------------------------------------------------------- checkpoints
def resumed(step: int, *, saved_reader: bool, names: Sequence[str] | None = None) -> tuple[Rows, Rows]:
    """Return two runs that log every 5 steps, with a checkpoint after ``step``."""
    runs: list[Rows] = []
    saved: dict[str, Any] = {}
    for part in range(2):
        model, optimizer = model_and()
        rows = Rows()
        handle = attach(optimizer, rows, every=5)
        if part:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if saved_reader:
                handle.reader.load_state_dict(saved["reader"])
        train(model, optimizer, 20 - step if part else step)
        parts = {"model": model, "optimizer": optimizer, "reader": handle.reader}
        saved = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        runs.append(rows)
    return runs[0], runs[1]


@pytest.mark.parametrize("step", [7, 10])
def test_with_the_readers_state_a_resume_leaves_no_gap(step: int) -> None:
    first, then = resumed(step, saved_reader=True)
    assert list(first) + list(then) == [5, 10, 15, 20]
    assert_curves({tag: first.curves()[tag] | points for tag, points in then.curves().items()}, expected_curves(20, 5))


def test_without_it_the_curves_begin_at_the_resume() -> None:
    _, then = resumed(7, saved_reader=False)
    seen = planted(10)[7:]
    assert then[10]["am/beta/mean"] == pytest.approx(numbers_of(seen)["am/beta/mean"], abs=1e-9)
    assert then[15] == pytest.approx(
        then[15] | {tag: points[15] for tag, points in expected_curves(15, 5).items()}, abs=1e-9
    )


def test_saving_takes_nothing_from_an_interval() -> None:
    model, optimizer = model_and()
    rows = Rows()
    handle = attach(optimizer, rows, every=6)
    states: list[dict[str, Any]] = []
    train(model, optimizer, 12, after_each=lambda: states.append(handle.reader.state_dict()))
    assert_curves(rows.curves(), expected_curves(12, 6))
    assert [state["interval"][3].sum() / len(NAMES) for state in states] == [1, 2, 3, 4, 5, 0] * 2


@pytest.mark.parametrize("order", [("optimizer", "reader"), ("reader", "optimizer")])
@pytest.mark.parametrize("step", [7, 10])
def test_what_is_loaded_takes_the_place_of_what_was_counted(step: int, order: tuple[str, str]) -> None:
    """This includes a checkpoint of another run at the same step."""
    (model, optimizer), rows = model_and(), Rows()
    handle = attach(optimizer, rows, every=5)
    train(model, optimizer, step)
    other, its_optimizer = model_and()
    its_reader = attach(its_optimizer, Rows(), every=5).reader
    train(other, its_optimizer, step)
    pairs = {"optimizer": (optimizer, its_optimizer), "reader": (handle.reader, its_reader)}
    for to, source in map(pairs.__getitem__, order):
        to.load_state_dict(copy.deepcopy(source.state_dict()))
    train(model, optimizer, 20 - step)
    assert handle.reader.interval.steps.tolist() == [5] * len(NAMES)
    assert_curves(rows.curves(), expected_curves(20, 5))
    assert handle.reader.history.state_dict()["sums"][-1] == 20 * len(NAMES)


@pytest.mark.filterwarnings("ignore:am. 3 steps")
@pytest.mark.parametrize("order", [("optimizer", "reader"), ("reader", "optimizer")])
def test_a_resume_after_dropped_steps_continues_at_their_step(order: tuple[str, str]) -> None:
    """The optimizer's state does not count dropped steps."""
    rows, saved = Rows(), dict[str, Any]()
    for steps in (20, 20):
        model, optimizer = model_and()
        handle = attach(optimizer, rows, every=10)
        if saved:
            model.load_state_dict(saved["model"])
            for name in order:
                {"optimizer": optimizer, "reader": handle.reader}[name].load_state_dict(saved[name])
        for step in range(steps):
            optimizer.zero_grad()
            model.loss(optimizer).backward()
            if not saved and 4 <= step < 7:
                model.embed.weight.grad[0] = math.nan
            optimizer.step()
        parts = {"model": model, "optimizer": optimizer, "reader": handle.reader}
        saved = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    assert list(rows) == [10, 20, 30, 40]
    history = saved["reader"]["history"]
    assert history["sums"][-1] == history["map"]["steps"].sum() == 37 * len(NAMES)


def test_a_return_to_an_earlier_checkpoint_leaves_out_what_came_after_it() -> None:
    """A later checkpoint has read the interval before the return."""
    model, optimizer = model_and()
    rows = Rows()
    handle = attach(optimizer, rows, every=10)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 4)
    handle.reader.state_dict()
    optimizer.load_state_dict(saved)
    train(model, optimizer, 7)
    expected = numbers_of(planted(10)[3:])
    assert rows[10] == pytest.approx(rows[10] | expected, abs=1e-9)
