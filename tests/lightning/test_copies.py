"""Objects copied or pickled while a fit runs keep nothing of the callback: they are as they would be with AdamW."""

from __future__ import annotations

import copy
import functools
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy

from am_lightning import AdaptiveMemory, AMAdamW
from am_lightning.lightning.patched_methods import PatchedMethods
from tests.lightning.model import Regression, quiet

HOOKS = ("setup", "on_fit_start", "on_train_start", "on_train_batch_start", "on_train_batch_end", "teardown")
TRIED = (copy.deepcopy, copy.copy, lambda thing: pickle.loads(pickle.dumps(thing)))


class Copying(pl.Callback):
    """Copy the module in one hook, as an average, a teacher or a user's own checkpoint does."""

    def __init__(self, hook: str, how) -> None:
        self.copies: list[pl.LightningModule] = []
        setattr(self, hook, functools.partial(self._copy, how))

    def _copy(self, how, trainer, pl_module, *_, **__) -> None:
        if not self.copies:
            self.copies.append(how(pl_module))


def fitted(module: pl.LightningModule, **options) -> list[torch.Tensor]:
    module.seen, module.losses = [], []
    pl.Trainer(**quiet(max_steps=4, **options)).fit(module)
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("hook", HOOKS[:3])
@pytest.mark.parametrize("how", [copy.deepcopy, TRIED[2]], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_module_is_fitted_as_with_adamw(hook: str, how) -> None:
    runs = []
    for callbacks in ([], [AdaptiveMemory()]):
        copying = Copying(hook, how)
        original = Regression()
        fitted(original, callbacks=[*callbacks, copying])
        (other,) = copying.copies
        assert "configure_optimizers" not in other.__dict__
        runs.append((fitted(other), fitted(copy.deepcopy(other), callbacks=[AdaptiveMemory()])))
    for without, beside in zip(*runs, strict=True):
        assert all(map(torch.equal, without, beside))
    start = list(Regression().parameters())
    assert not any(map(torch.equal, runs[1][0], start))  # the weights differ from the initial ones


class Plain(Regression):
    """A module without a scheduler, because its lambda cannot be pickled."""

    def configure_optimizers(self):
        return super().configure_optimizers()["optimizer"]


class Inside(pl.Callback):
    """Copy the Trainer's parts in every hook."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        for hook in HOOKS:
            setattr(self, hook, functools.partial(self._try, hook))

    def _try(self, hook: str, trainer, pl_module, *_, **__) -> None:
        self.seen.add(hook)
        callback = next(c for c in trainer.callbacks if isinstance(c, AdaptiveMemory))
        parts = pl_module, trainer.strategy, trainer.precision_plugin
        for part in (*parts, callback, *trainer.optimizers):
            for how in TRIED:
                how(part)
        own = {"clip_grad_by_norm", "optimizers", "load_checkpoint", "configure_optimizers"}
        assert not any(vars(part).keys() & own for part in parts)


def test_the_trainers_parts_can_be_copied_and_pickled_in_every_hook() -> None:
    inside = Inside()
    fitted(Plain(), callbacks=[AdaptiveMemory(), inside], gradient_clip_val=0.5)
    assert inside.seen == set(HOOKS)


class Teacher(Regression):
    """Copy the module in its own setup, which runs after the callbacks'."""

    def setup(self, stage: str) -> None:
        self.teacher = [copy.deepcopy(self)]

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for slow, fast in zip(self.teacher[0].parameters(), self.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        return super().training_step(batch, batch_idx)


def test_a_teacher_is_the_students_copy() -> None:
    module = Teacher()
    fitted(module, callbacks=[AdaptiveMemory()])
    (teacher,) = module.teacher
    assert type(teacher.configure_optimizers()["optimizer"]) is torch.optim.AdamW
    assert teacher.configure_optimizers.__self__ is teacher
    assert pickle.loads(pickle.dumps(teacher)).lr == module.lr


@pytest.mark.parametrize("average", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(0.01)])
def test_averages_of_lightning(average) -> None:
    """The average of the same steps is the same whether the optimizer was converted or built."""

    class Built(Regression):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            groups = [{**g, "betas": (0.89, 0.95)} for g in made["optimizer"].param_groups]
            keys = ("params", "lr", "betas", "eps", "weight_decay")
            return AMAdamW([{key: g[key] for key in keys} for g in groups])

    weights = []
    for module, callbacks in ((Built(batches=4), []), (Plain(batches=4), [AdaptiveMemory()])):
        pl.Trainer(**quiet(max_epochs=3, callbacks=[*callbacks, average()])).fit(module)
        weights.append([p.detach().clone() for p in module.parameters()])
    for built, converted in zip(*weights, strict=True):
        torch.testing.assert_close(converted, built, rtol=1e-5, atol=1e-6)


def test_a_copied_trainer_fits_on_its_own() -> None:
    """Hyperparameter sweeps and cross-validation copy whole Trainers."""

    class Copy(pl.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            if not hasattr(self, "copied"):
                self.copied = True
                Copy.of = copy.deepcopy(trainer.strategy), copy.deepcopy(trainer.callbacks)

    fitted(Regression(), callbacks=[AdaptiveMemory(), Copy()])
    _, callbacks = Copy.of
    (ours,) = (c for c in callbacks if isinstance(c, AdaptiveMemory))
    trainer = pl.Trainer(**quiet(max_steps=2, callbacks=[ours]))
    trainer.fit(Regression())
    assert type(trainer.optimizers[0]) is AMAdamW


def test_classes_are_as_they_were_after_fit_and_after_an_error() -> None:
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            assert Strategy.__dict__["optimizers"].fset.__wrapped__ is before[0].fset
            raise RuntimeError("on purpose")

    before = Strategy.__dict__["optimizers"], Precision.__dict__["clip_grad_by_norm"]
    fitted(Regression(), callbacks=[AdaptiveMemory()])
    with pytest.raises(RuntimeError, match="on purpose"):
        fitted(Failing(), callbacks=[AdaptiveMemory()])
    assert before == (Strategy.__dict__["optimizers"], Precision.__dict__["clip_grad_by_norm"])


class Owner:
    def __init__(self) -> None:
        self.values: list[int] = []

    def method(self, number: int) -> int:
        return number

    @property
    def value(self) -> int:
        return self.values[-1]

    @value.setter
    def value(self, number: int) -> None:
        self.values.append(number)


class Child(Owner):
    pass


def test_replacements_are_of_one_object_and_leave_no_trace() -> None:
    method, value = Owner.__dict__["method"], Owner.__dict__["value"]
    first, second = Child(), Child()
    of_first, of_both = PatchedMethods(), PatchedMethods()
    of_first.add(first, "method", lambda original, number: original(number) + 1)
    for owner in (first, second):
        of_both.add(owner, "method", lambda original, number: 10 * original(number))
    of_first.add(first, "value", lambda original, number: original(-number))
    first.value = second.value = 7
    assert (first.value, second.value, first.method(2), second.method(2)) == (-7, 7, 30, 20)
    assert (copy.deepcopy(first).method(2), pickle.loads(pickle.dumps(first)).method(2)) == (2, 2)
    copy.deepcopy(of_first).undo()
    pickle.loads(pickle.dumps(of_first)).undo()
    assert first.method(2) == 30
    of_first.undo()
    assert first.method(2) == 20
    of_both.undo()
    of_both.undo()
    assert Owner.__dict__["method"] is method and Owner.__dict__["value"] is value
    assert not Child.__dict__.keys() & {"method", "value"}


def test_what_somebody_else_has_put_in_place_stays() -> None:
    owner, ours = Owner(), PatchedMethods()
    own = Owner.__dict__["method"]
    ours.add(owner, "method", lambda original, number: 0)
    owner.method = lambda number: "on the object"
    assert owner.method(1) == "on the object"
    del owner.method
    between = Owner.method
    Owner.method = lambda self, number: between(self, number) + 5
    try:
        assert owner.method(1) == 5
        ours.undo()
        assert owner.method(1) == 6
    finally:
        Owner.method = own
