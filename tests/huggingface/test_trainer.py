"""AdaptiveMemoryCallback and AMAdamWFactory in the real Trainer, on one process and under DDP on two."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from am_lightning import AMSGD, AMAdamW
from am_lightning.huggingface import AdaptiveMemoryCallback, AMAdamWFactory
from am_lightning.optim.unwrap import unwrap_optimizer
from tests.huggingface.events import scalars_in
from tests.huggingface.launch import launch
from tests.huggingface.trainer_runs import FORMS, LOG, SAVE, STEPS, Watch, make_model, make_trainer, run
from tests.lacking import unless_lacking
from tests.loggers.intervals import assert_curves, curves_of

LOGGED = range(LOG, STEPS + 1, LOG)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Return the runs of one process, with the global batch of two."""
    folder = tmp_path_factory.mktemp("one")
    runs: dict[str, Any] = {form: unless_lacking(run, folder / form, form, batch=4) for form in FORMS}
    return folder, runs | {"resumed": run(folder / "resumed", "class", batch=4, resume=folder / "class")}


@pytest.fixture(scope="module")
def double(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, launch("tests.huggingface.trainer_runs", folder, processes=2)


def check_curves(folder: Path, result: dict[str, Any], before: Sequence[dict[str, float]] = ()) -> None:
    """Require that the event file and ``log_history`` have the betas of all steps since the last log.

    Args:
        before: betas of the steps of the run that this one resumes. Default: none.
    """
    ends, begins = [step for step in LOGGED if step > len(before)], len(before) // LOG * LOG
    expected = curves_of([*before, *result["seen"]], ends, begins=begins)
    scalars = scalars_in(folder / "runs")
    history = {record["step"]: record for record in result["history"] if "loss" in record}
    assert list(history) == list(LOGGED)
    assert_curves({tag.removeprefix("train/"): points for tag, points in scalars.items()}, expected)
    assert_curves({tag: {step: history[step][tag] for step in ends} for tag in expected}, expected)
    assert all(
        {"am/clamp/at_max", "am/beta/mlp", "am/beta/embed", "am/skipped_steps"} <= set(r) for r in history.values()
    )
    assert [record["step"] for record in result["history"] if "am/beta/mean" in record] == list(LOGGED)


@pytest.mark.parametrize("form", FORMS)
def test_the_curves_are_the_optimizers(single, form: str) -> None:
    folder, runs = single
    check_curves(folder / form, runs[form])
    names = [name for name, _ in make_model().named_parameters()]
    assert sorted(runs[form]["seen"][0]) == sorted(names)
    assert runs[form]["callbacks"][0] == "AdaptiveMemoryCallback"
    assert len(set(runs[form]["callbacks"])) == len(runs[form]["callbacks"])
    betas = [beta for step in runs[form]["seen"][1:] for beta in step.values()]
    assert sum(1e-6 < beta < 0.89 - 1e-6 for beta in betas) > 0.2 * len(betas)


def test_the_factory_takes_the_training_arguments(single) -> None:
    """adam_beta1 0.9 becomes a cap of 0.89; keywords of am_adamw take precedence."""
    _, runs = single
    decay, plain, wpe = runs["factory"]["groups"]
    assert (decay["lr"], plain["lr"], wpe["lr"]) == (0.07, 0.07, 0.035)
    assert (decay["weight_decay"], plain["weight_decay"], wpe["weight_decay"]) == (0.1, 0.0, 0.1)
    assert wpe["param_names"] == ["transformer.wpe.weight"]
    for group in (decay, plain, wpe):
        assert group["beta1_max"] == pytest.approx(0.89)
        assert group["betas"][1] == 0.95
        assert group["eps"] == 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("world", ["single", "double"])
def test_a_resumed_run_is_bitwise_the_unbroken_one(world: str, request) -> None:
    folder, found = request.getfixturevalue(world)
    for result in found if world == "double" else [found]:
        assert len(result["resumed"]["seen"]) == STEPS - SAVE
        assert result["resumed"]["seen"] == result["class"]["seen"][SAVE:]
    one = found[0] if world == "double" else found
    check_curves(folder / "resumed", one["resumed"], before=one["class"]["seen"][:SAVE])


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_have_the_beta_of_one(single, double, form: str) -> None:
    _, runs = single
    folder, results = double
    for result in results:
        assert result[form]["distributed"] == "MULTI_CPU"
        assert "; 1 all-reduce a step" in result[form]["described"]
        assert result[form]["seen"] == results[0][form]["seen"]
        assert result["warned"] == []
    for ours, theirs in zip(results[0][form]["seen"], runs[form]["seen"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
    check_curves(folder / form, results[0][form])


@pytest.mark.parametrize("name", ["FSDP1Trainer class", "FSDP1Trainer factory", "FSDP2Trainer class"])
def test_sharded_processes_have_the_beta_of_one(single, double, name: str) -> None:
    """The factory excludes norms from weight decay although FSDP1 shows all parameters as vectors."""
    _, runs = single
    folder, results = double
    expected = runs[name.partition(" ")[2]]
    for result in results:
        assert result[name]["distributed"] == "FSDP"
        assert ("FSDP1 FULL_SHARD" if "FSDP1" in name else "(S(0)) on mesh") in result[name]["described"]
        assert result[name]["seen"] == results[0][name]["seen"]
    for ours, theirs in zip(results[0][name]["seen"], expected["seen"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
    check_curves(folder / name, results[0][name])


@pytest.mark.slow
def test_skipped_steps_are_counted_over_a_resume(tmp_path) -> None:
    """Steps 2 and 6 are dropped; the checkpoint is of step 5."""
    with pytest.warns(UserWarning, match=r"am: 1 step since the last report dropped.*transformer.wte.weight"):
        first = run(tmp_path / "first", "class", batch=4, bad_steps=(2, 6))
    assert [r["am/skipped_steps"] for r in first["history"] if "loss" in r] == [1, 1, 2, 2]
    with pytest.warns(UserWarning, match="1 step since the last report dropped"):
        then = run(tmp_path / "then", "class", batch=4, bad_steps=(6,), resume=tmp_path / "first")
    assert [r["am/skipped_steps"] for r in then["history"] if "loss" in r] == [1, 1, 2, 2]


def test_a_second_train_of_one_trainer_counts_from_zero(tmp_path) -> None:
    trainer = make_trainer(
        tmp_path, batch=4, watch=Watch((2,)), optimizer_cls_and_kwargs=FORMS["class"], arguments={"max_steps": 4}
    )
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 step since the last report dropped"):
            trainer.train()
        assert [r["am/skipped_steps"] for r in trainer.state.log_history if "loss" in r] == [1, 1]


def test_optimizers_evaluation_and_a_callback_added_late(tmp_path) -> None:
    """The curves are logged beside the training loss only, and every later callback receives them."""

    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.logs: list[dict[str, Any]] = []

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            self.logs.append(dict(logs))

    reporter = Reporter()
    model = make_model()
    trainer = make_trainer(
        tmp_path,
        batch=4,
        model=model,
        callbacks=[reporter],
        optimizers=(AMSGD(model.parameters(), lr=0.07), None),
        arguments={
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "weight_decay": 0.0,
        },
    )
    trainer.add_callback(AdaptiveMemoryCallback())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    assert type(trainer.callback_handler.callbacks[0]) is AdaptiveMemoryCallback
    told = ["am/beta/mean" in logs for logs in reporter.logs]
    assert told == ["loss" in logs for logs in reporter.logs]
    assert told.count(True) == 2
    assert len(reporter.logs) == 5  # two of training, two of evaluation, the summary
    assert [{**logs, "step": r["step"]} for logs, r in zip(reporter.logs, trainer.state.log_history, strict=True)] == (
        trainer.state.log_history
    )
    json.dumps(trainer.state.log_history)


class Replace(TrainerCallback):
    """Give the Trainer another optimizer after a step."""

    def __init__(self, kind: type, after: int) -> None:
        self.kind, self.after = kind, after
        self.seen: list[float] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == self.after:
            self.trainer.optimizer = self.kind(model.parameters(), lr=0.05)
        elif self.kind is AMAdamW:
            betas = unwrap_optimizer(self.trainer.optimizer).momentum().values()
            self.seen.append(float(torch.stack(list(betas)).mean()))


@pytest.mark.parametrize("kind", [AMAdamW, torch.optim.AdamW])
def test_an_optimizer_given_in_mid_run_is_read_or_refused(tmp_path, kind: type) -> None:
    """The Trainer uses the new optimizer, also an AdamW, but its callback handler still passes the old one."""
    replace = Replace(kind, after=3)
    trainer = make_trainer(
        tmp_path,
        batch=4,
        callbacks=[AdaptiveMemoryCallback(), replace],
        optimizer_cls_and_kwargs=FORMS["class"],
        arguments={"max_steps": 6, "logging_steps": 1, "save_strategy": "no"},
    )
    replace.trainer = trainer
    if kind is torch.optim.AdamW:
        with pytest.raises(TypeError, match=r"AdamW .*optimizer must be AMAdamW or AMSGD: pass Trainer"):
            trainer.train()
        return
    trainer.train()
    last = trainer.optimizer
    assert {float(state["step"]) for state in last.state.values()} == {3}
    assert set(last.momentum()) == {name for name, _ in make_model().named_parameters()}
    logged = {r["step"]: r["am/beta/mean"] for r in trainer.state.log_history if "am/beta/mean" in r}
    assert [logged[step] for step in (1, 2, 4, 5, 6)] == pytest.approx(replace.seen, rel=1e-6)
    assert 3 in logged  # the step before


class Growing(Trainer):
    """Rebuild the optimizer after two steps: between steps, or in the middle of the third."""

    way = ""
    kind: type = AMAdamW
    calls = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        if self.state.global_step == 2 and self.way != "created again":
            self.optimizer = self.kind(self.model.parameters(), lr=0.05)
        return super().training_step(*args, **kwargs)


class CreateAgain(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.trainer.way == "created again" and state.global_step == 2:
            self.trainer.optimizer, self.trainer.optimizer_cls_and_kwargs = None, (self.trainer.kind, {"lr": 0.05})
            self.trainer.create_optimizer()


class Names(TrainerCallback):
    """Record the optimizer's names of its parameters just before a step."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.seen.append(set(unwrap_optimizer(self.trainer.optimizer).parameter_names()))


@pytest.mark.parametrize("kind", [AMAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("way", ["created again", "in training_step"])
@pytest.mark.parametrize("ours", [True, False], ids=["callback", "none"])
def test_an_optimizer_given_in_mid_run_is_met_before_its_first_step(tmp_path, way: str, kind: type, ours: bool) -> None:
    """The optimizer is found long before the next log. Without the callback any optimizer is used."""
    again, names = CreateAgain(), Names()
    trainer = make_trainer(
        tmp_path,
        batch=4,
        trainer_class=Growing,
        callbacks=[AdaptiveMemoryCallback(), again, names] if ours else [again],
        optimizer_cls_and_kwargs=FORMS["class"],
        arguments={"max_steps": 5, "logging_steps": 5, "save_strategy": "no", "report_to": "none"},
    )
    trainer.way, trainer.kind, again.trainer, names.trainer = way, kind, trainer, trainer
    if ours and kind is torch.optim.AdamW:
        with pytest.raises(TypeError, match=r"AdamW .*optimizer must be AMAdamW or AMSGD: pass Trainer"):
            trainer.train()
        assert trainer.calls == (2 if way == "created again" else 3) and not trainer.optimizer.state
        return
    trainer.train()
    assert {float(state["step"]) for state in unwrap_optimizer(trainer.optimizer).state.values()} == {3}
    assert names.seen == [{name for name, _ in make_model().named_parameters()}] * (5 if ours else 0)


def test_the_default_optimizer_is_refused_with_the_cure(tmp_path) -> None:
    trainer = make_trainer(tmp_path, batch=4)
    with pytest.raises(TypeError, match=r"Invalid optimizer: AdamW .*optimizer_cls_and_kwargs=\(AMAdamW, \{'lr'"):
        trainer.train()


def test_a_learning_rate_that_is_not_used_is_warned_of(tmp_path) -> None:
    """The Trainer passes no arguments to an optimizer class, so AMAdamW's default lr would be used silently."""
    trainer = make_trainer(tmp_path, batch=4, optimizer_cls_and_kwargs=(AMAdamW, {}), arguments={"max_steps": 1})
    with pytest.warns(UserWarning, match=r"learning_rate=0.07 is not used: the optimizer was built with lr 0.001"):
        trainer.train()


@dataclass
class OwnArguments(TrainingArguments):
    """Arguments with defaults other than TrainingArguments', as TRL's SFTConfig and DPOConfig have."""

    learning_rate: float = 2e-5
    adam_beta2: float = 0.99


CLASS = {"optimizer_cls_and_kwargs": (AMAdamW, {})}
NOT_SET = {"learning_rate": 2e-5, "adam_beta2": 0.99}  # defaults of the class
# What is set, how the optimizer is built, and the options that the callback reports as unused.
SET: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    "nothing": ({}, CLASS, []),
    "what TrainingArguments have of themselves": ({"learning_rate": 5e-5}, CLASS, ["learning_rate=5e-05"]),
    "beta2 and eps": ({"adam_beta2": 0.95, "adam_epsilon": 1e-6}, CLASS, ["adam_beta2=0.95", "adam_epsilon=1e-06"]),
    "beta1": ({"adam_beta1": 0.8}, CLASS, ["adam_beta1=0.8"]),
    "beta1, from which the factory takes the cap": (
        {"adam_beta1": 0.8, "adam_beta2": 0.95, "learning_rate": 0.07},
        {"optimizer_cls_and_kwargs": (AMAdamWFactory, {})},
        [],
    ),
    "weight decay, which the Trainer gives a class": ({"weight_decay": 0.3}, CLASS, []),
    "weight decay beside an optimizer": ({"weight_decay": 0.3}, None, ["weight_decay=0.3"]),
}


@pytest.mark.parametrize("what", SET)
def test_arguments_that_are_set_in_vain_are_warned_of(tmp_path: Path, what: str) -> None:
    arguments, how, expected = SET[what]
    model = make_model()
    built = how or {"optimizers": (AMAdamW(model.parameters()), None)}
    arguments = {**NOT_SET, "weight_decay": 0.0, "max_steps": 1, "report_to": "none", **arguments}
    trainer = make_trainer(tmp_path, batch=4, model=model, args_class=OwnArguments, arguments=arguments, **built)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(warning.message) for warning in told if "is not used" in str(warning.message)]
    assert re.findall(r"OwnArguments\.(\S+) is not used", " ".join(said)) == expected
    assert len(said) == bool(expected)


def test_keywords_of_the_factory_win_over_the_training_arguments(tmp_path) -> None:
    options = {"lr": 0.5, "betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 0.3}
    trainer = make_trainer(tmp_path, batch=4, optimizer_cls_and_kwargs=(AMAdamWFactory, options))
    decay, *_ = trainer.create_optimizer().param_groups
    assert {name: decay[name] for name in options} == options


def test_outside_a_trainer() -> None:
    """The callback names the remedy if it cannot find the Trainer's list; the factory needs lr."""
    model = make_model()
    with pytest.raises(TypeError, match=r"came with transformers 5.2. Use optimizer_cls_and_kwargs=\(AMAdamW"):
        AMAdamWFactory([{"params": list(model.parameters())}], lr=0.5)  # as older Trainers do
    with pytest.raises(TypeError, match="give it lr"):
        AMAdamWFactory()(model)
    assert AMAdamWFactory()(model, lr=0.5).param_groups[0]["lr"] == 0.5


def test_a_callback_that_cannot_find_its_place_says_so(tmp_path) -> None:
    trainer = make_trainer(tmp_path, batch=4, optimizer_cls_and_kwargs=FORMS["class"], arguments={"max_steps": 1})
    trainer.train()
    with pytest.warns(UserWarning, match=r"callbacks.insert\(0, trainer.pop_callback\(AdaptiveMemoryCallback\)\)"):
        AdaptiveMemoryCallback().on_train_begin(
            trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=trainer.optimizer
        )
