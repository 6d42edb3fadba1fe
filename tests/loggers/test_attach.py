"""attach(): what a user's own loop writes, where and at which steps, and that it does not disturb the loop."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from am_lightning.loggers import attach, reader
from am_lightning.loggers.images import log_image
from tests.clients import client
from tests.huggingface.events import histograms_in, pages_in, scalars_in
from tests.loggers.intervals import assert_curves, curves_of
from tests.loggers.pictures import IMAGE, in_events, in_mlflow
from tests.sharding.pool import Pool

KINDS: dict[str, Any] = {
    "adamw": lambda params: AMAdamW(params, lr=0.02),
    "adamw, global": lambda params: AMAdamW(params, lr=0.02, scope="global"),
    "sgd": lambda params: AMSGD(params, lr=0.02, scope="tensor"),
}


def model_and(kind: str = "adamw", *, named: bool = True) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(2))})
    return model, KINDS[kind](model.named_parameters() if named else model.parameters())


def train(
    model: Any, optimizer: Any, steps: int, *, bad: int | None = None, clip: bool = False
) -> list[dict[str, float]]:
    """Train and return beta_t after each step."""
    seen = []
    for number in range(steps):
        optimizer.zero_grad()
        hidden = model["embed"](torch.arange(5).roll(number))
        for layer in model["layers"]:
            hidden = layer(hidden).tanh()
        (hidden - 0.3 * number).square().sum().backward()
        if number == bad:
            model["embed"].weight.grad[0] = math.nan
        if clip:
            clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
    return seen


def images_in(folder: Path) -> list[tuple[str, int, tuple[int, ...]]]:
    """Return the tag, step, width and channels of each image."""
    return [(tag, step, image.shape[1:]) for tag, step, image in in_events(folder)]


class Run:
    """A run like wandb's: ``log(data, step)``."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, data: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        assert step not in self.rows
        self.rows[step] = data


class Metrics(Run):
    """A logger like Lightning's and mlflow's."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        Run.log(self, metrics, step)

    def log(self, data: dict[str, float], step: int | None = None) -> None:
        raise AssertionError("log_metrics is for this")


@pytest.mark.parametrize("kind", KINDS)
def test_a_summary_writer_has_all_curves(tmp_path: Path, kind: str) -> None:
    model, optimizer = model_and(kind)
    with SummaryWriter(str(tmp_path)) as writer:
        attach(optimizer, writer, every=2)
        seen = train(model, optimizer, 7, clip=True)
    found = scalars_in(tmp_path)
    assert {tuple(points) for points in found.values()} == {(2, 4, 6)}
    for step in (2, 4, 6):
        layer = [betas[f"layers.1.{kind}"] for betas in seen[step - 2 : step] for kind in ("weight", "bias")]
        embed = [betas["embed.weight"] for betas in seen[step - 2 : step]]
        for tag, betas in (("am/beta/layer/layers.1", layer), ("am/beta/embed", embed)):
            assert found[tag][step] == pytest.approx(sum(betas) / len(betas), abs=1e-6)
            assert found[f"{tag}/min"][step] == pytest.approx(min(betas), abs=1e-6)
    assert_curves(found, curves_of(seen, (2, 4, 6), cap=0.9 if kind == "sgd" else 0.89))
    assert {"am/clamp/at_max", "am/clamp/at_zero", "am/skipped_steps", "am/grad_norm"} <= set(found)
    assert histograms_in(tmp_path) == {"am/beta": {2: 5, 4: 5, 6: 5}}
    (page,) = pages_in(tmp_path)  # exactly one
    assert list(page) == ["adaptive momentum (am)"]


def test_every_kind_of_writer_gets_the_same(tmp_path: Path) -> None:
    model, optimizer = model_and()
    run, metrics, rows = Run(), Metrics(), {}
    attach(optimizer, run, every=2)
    attach(optimizer, metrics, every=2)
    attach(optimizer, lambda scalars, step: rows.update({step: scalars}), every=2)
    train(model, optimizer, 4)
    assert run.rows == metrics.rows == rows and list(rows) == [2, 4]
    assert all(type(value) is float for row in rows.values() for value in row.values())


@pytest.mark.parametrize(
    "make", [lambda p: AMAdamW(p, lr=0.02, betas=(0.0, 0.9)), lambda p: AMSGD(p, lr=0.02, beta_max=0.0)]
)
def test_a_cap_of_zero_is_logged(make: Any, tmp_path: Path) -> None:
    model, _ = model_and()
    with SummaryWriter(str(tmp_path)) as writer:
        attach(optimizer := make(model.named_parameters()), writer, every=2)
        train(model, optimizer, 4)
    assert scalars_in(tmp_path)["am/beta/mean"] == {2: 0.0, 4: 0.0}
    assert [(tag, shape) for tag, _, shape in images_in(tmp_path)] == [("am/beta/layers", (1000, 3))] * 2


def test_lightnings_logger_gets_the_picture_too(tmp_path: Path) -> None:
    model, optimizer = model_and()
    logger = TensorBoardLogger(tmp_path)
    attach(optimizer, logger, every=2)
    train(model, optimizer, 2)
    logger.finalize("success")
    assert scalars_in(tmp_path)["am/beta/cap"].keys() == {2}
    assert [(tag, step) for tag, step, _ in images_in(tmp_path)] == [("am/beta/layers", 2)]


@pytest.mark.parametrize("own", [False, True], ids=["the module", "a run"])
def test_the_mlflow_module_gets_the_picture_too(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    mlflow = client("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    model, optimizer = model_and()
    with mlflow.start_run() as run:
        if own:
            assert log_image(run, "am/beta/layers", IMAGE, 2)
        else:
            attach(optimizer, mlflow, every=2)
            train(model, optimizer, 2)
    assert [(tag, step) for tag, step, _ in in_mlflow(tmp_path)] == [("am/beta/layers", 2)]
    assert not [warning for warning in recwarn if "did not take" in str(warning.message)]


def test_layers_have_curves_where_parameters_have_names() -> None:
    model, optimizer = model_and(named=False)
    run = Run()
    attach(optimizer, run, every=1)
    train(model, optimizer, 1)
    optimizer.name_parameters(model.named_parameters())
    train(model, optimizer, 1)
    layers = [{tag for tag in row if tag.startswith("am/beta/layer/")} for row in run.rows.values()]
    known = {f"am/beta/layer/{layer}{end}" for layer in ("embed", "layers.0", "layers.1") for end in ("", "/min")}
    assert layers == [set(), known]


@pytest.mark.parametrize("before", [True, False], ids=["attached, then loaded", "loaded, then attached"])
def test_a_resumed_run_continues_where_it_was(before: bool) -> None:
    model, optimizer = model_and()
    train(model, optimizer, 5)
    saved, (other, resumed), run = copy.deepcopy(optimizer.state_dict()), model_and(), Run()
    if before:
        attach(resumed, run, every=3)
    resumed.load_state_dict(saved)
    if not before:
        attach(resumed, run, every=3)
    train(other, resumed, 4)
    assert list(run.rows) == [6, 9]


def test_at_the_end_there_is_a_last_picture_and_a_sentence(tmp_path: Path) -> None:
    """Both include the last step, at which no interval ended, from the handle and from its reader."""
    model, optimizer = model_and()
    with SummaryWriter(str(tmp_path)) as writer:
        handle = attach(optimizer, writer, every=4)
        assert handle.finish() == ""
        train(model, optimizer, 6)
        said = handle.finish()
        train(model, optimizer, 1)
        again = handle.reader.finish()
    assert [step for _, step, _ in images_in(tmp_path)] == [4, 6, 7]
    assert said.startswith("am: mean beta_t 0.") and "no step skipped" in said
    assert again != said and reader.StatsReader(optimizer).finish() == ""


def test_removed_it_writes_no_more_and_twice_is_once() -> None:
    model, optimizer = model_and()
    run = Run()
    hooks = [len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_load_state_dict_post_hooks)]
    attach(optimizer, run, every=1)
    handle = attach(optimizer, run, every=2)  # a notebook's cell is run again
    other = attach(optimizer, run, every=3, prefix="am-1")
    train(model, optimizer, 3)
    assert [sorted({tag.partition("/")[0] for tag in row}) for row in run.rows.values()] == [["am"], ["am-1"]]
    handle.remove()
    handle.remove()
    other.remove()
    train(model, optimizer, 3)
    assert list(run.rows) == [2, 3]
    assert hooks == [len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_load_state_dict_post_hooks)]


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_copy_writes_nothing_and_the_first_continues(clone: Any) -> None:
    """The object written to cannot be pickled, and copying still works."""
    model, optimizer = model_and()
    rows: list[int] = []
    attach(optimizer, lambda scalars, step: rows.append(step), every=1)
    assert "step" not in vars(optimizer)
    train(model, optimizer, 1)
    train(*clone((model, optimizer)), 2)
    assert rows == [1]
    train(model, optimizer, 1)
    assert rows == [1, 2]


def test_the_steps_are_those_without() -> None:
    runs = []
    for logged in (False, True):
        model, optimizer = model_and()
        if logged:
            attach(optimizer, Run(), every=1)
        train(model, optimizer, 4)
        runs.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *runs))


def test_dropped_steps_are_warned_of() -> None:
    model, optimizer = model_and()
    run = Run()
    attach(optimizer, run, every=2)
    with pytest.warns(UserWarning, match=r"am: 1 step since the last report dropped.*'embed.weight'") as caught:
        train(model, optimizer, 4, bad=2)
    assert [Path(warning.filename).name for warning in caught] == ["test_attach.py"]
    assert [row["am/skipped_steps"] for row in run.rows.values()] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"optimizer": torch.optim.AdamW([nn.Parameter(torch.ones(1))])},
            TypeError,
            "Invalid optimizer: AdamW .*build",
        ),
        ({"writer": None}, TypeError, "Invalid writer: None. writer must have add_scalar"),
        ({"writer": SummaryWriter}, TypeError, r"the class SummaryWriter \(writer must be an instance\)"),
        ({"writer": lambda scalars: None}, TypeError, "cannot be called with scalars and a step .*too many positional"),
        ({"every": 0}, ValueError, "Invalid every: 0"),
        ({"every": 1.5}, TypeError, "Invalid every: 1.5"),
        ({"prefix": ""}, TypeError, "Invalid prefix: ''"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    _, optimizer = model_and()
    with pytest.raises(error, match=words):
        attach(**{"optimizer": optimizer, "writer": print, **arguments})
    assert not optimizer._optimizer_step_post_hooks


def on_a_rank() -> list[int]:
    """Return, on every rank, the steps that it wrote and whether it has a sentence at the end.

    Only rank 0 reads: a collective would wait for the other ranks.
    """
    model, optimizer = model_and()
    optimizer.replica_group = torch.distributed.group.WORLD
    run = Run()
    handle = attach(optimizer, run, every=1)
    train(model, optimizer, 2)
    return [*run.rows, bool(handle.finish())]


def test_rank_0_writes() -> None:
    pool = Pool(2)
    try:
        assert pool.run(f"{__name__}:on_a_rank") == [[1, 2, True], [False]]
    finally:
        pool.stop()


def test_a_load_in_an_interval() -> None:
    """A load at the run's own step continues the interval; one of an earlier step removes the steps since."""
    for back, first in ((False, 0), (True, 1)):
        model, optimizer = model_and()
        run = Run()
        attach(optimizer, run, every=4)
        seen = train(model, optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        if not back:
            seen += train(model, optimizer, 1)
            saved = copy.deepcopy(optimizer.state_dict())
        else:
            train(model, optimizer, 1)
        optimizer.load_state_dict(saved)
        seen += train(model, optimizer, 4 - len(seen))
        assert_curves({tag: {4: value} for tag, value in run.rows[4].items()}, curves_of(seen, (4,), begins=first))


def test_what_a_checkpoint_gets_is_json() -> None:
    """The HF Trainer writes JSON; for a tensor without a step the lowest beta_t is not a number."""
    model, optimizer = model_and()
    for param in model["embed"].parameters():
        param.requires_grad_(False)
    handle = attach(optimizer, print, every=50)
    train(model, optimizer, 3)
    saved = handle.reader.state_dict()
    json.dumps(saved | {"interval": saved["interval"].tolist()}, allow_nan=False)
    assert len(saved["names"]) == 4 and "embed.weight" not in saved["names"]


class MoreNumbers(NamedTuple):
    """StepNumbers with an additional one, as CONTRIBUTING.md describes."""

    skipped_steps: float
    skipped_in_a_row: float
    first_bad: float
    grad_norm: float
    update_norm: float


def test_a_new_field_is_written_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(AMAdamW):
        def report(self) -> torch.Tensor:
            return torch.cat([super().report(), torch.full((1,), 7.0)])

    monkeypatch.setattr(reader, "StepNumbers", MoreNumbers)
    model, _ = model_and()
    optimizer, run = Counting(model.named_parameters(), lr=0.02), Run()
    attach(optimizer, run, every=1)
    betas = train(model, optimizer, 2)
    assert [row["am/update_norm"] for row in run.rows.values()] == [7.0, 7.0]
    assert run.rows[2]["am/beta/max"] == pytest.approx(max(betas[-1].values()))
    assert not {"am/first_bad", "am/skipped_in_a_row", "am/grad_norm"} & run.rows[2].keys()
