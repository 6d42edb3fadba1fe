"""The user's AdamW becomes AMAdamW in place: what is carried over, what keeps working, what is refused."""

from __future__ import annotations

import abc
import copy
import functools
import weakref

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler as schedulers

from am_lightning import AdaptiveMemory, AMAdamW, am_adamw
from am_lightning.optim.convert import convert_adamw, default_cap
from tests.lightning.model import Regression, batch_of, make_net, quiet

SCHEDULES = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "Sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, 5)], [2]
    ),
    "Plateau": schedulers.ReduceLROnPlateau,
}


def step(net, optimizer, index: int) -> None:
    x, y = batch_of(index)
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(net(x), y).backward()
    optimizer.step()


def twin_runs(schedule, **options):
    """Make five scheduled steps with a converted AdamW and with an AMAdamW built with the same options."""
    weights = []
    for convert in (True, False):
        net = make_net()
        if convert:
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, betas=(0.9, 0.95), **options)
        else:
            optimizer = AMAdamW(net.parameters(), lr=0.05, betas=(0.89, 0.95), **options)
        scheduler = schedule(optimizer)
        if convert:
            assert convert_adamw(optimizer) is optimizer
        for index in range(5):
            step(net, optimizer, index)
            scheduler.step(1.0) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else scheduler.step()
        assert "beta_prod" in next(iter(optimizer.state.values()))
        weights.append([p.detach().clone() for p in net.parameters()])
    return weights


class Counting:
    """Wrap step() as the schedulers of torch before 2.5 do, and check the counter as they do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        reference, function = weakref.ref(optimizer), optimizer.step.__func__
        self.optimizer = optimizer

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            owner = reference()
            owner._step_count += 1
            return function.__get__(owner, type(owner))(*args, **kwargs)

        wrapper._with_counter = True
        optimizer.step = wrapper
        optimizer._step_count = 0

    def counted(self) -> int:
        assert hasattr(self.optimizer.step, "_with_counter")  # without it: "step() has been overridden"
        return self.optimizer._step_count


def test_a_scheduler_of_old_counts_on() -> None:
    counts, weights = [], []
    for kind in ("adamw", "converted", "built"):
        net = make_net()
        beta1 = 0.89 if kind == "built" else 0.9
        optimizer = (AMAdamW if kind == "built" else torch.optim.AdamW)(net.parameters(), lr=0.05, betas=(beta1, 0.95))
        scheduler = Counting(optimizer)
        if kind == "converted":
            convert_adamw(optimizer)
        for index in range(3):
            step(net, optimizer, index)
        counts.append(scheduler.counted())
        weights.append([p.detach() for p in net.parameters()])
        assert type(optimizer) is (torch.optim.AdamW if kind == "adamw" else AMAdamW)
    assert counts == [3, 3, 3]
    assert all(map(torch.equal, weights[1], weights[2]))
    assert not any(map(torch.equal, weights[0], weights[1]))


def test_what_others_have_put_on_it_stays() -> None:
    """Hooks, attributes and a scheduler's numbers in the groups stay; a copy has as many of them as a copy of AdamW."""
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    optimizer.note, scheduler = "theirs", Counting(optimizer)
    optimizer.param_groups[0]["name"] = "all"
    convert_adamw(optimizer)
    step(net, optimizer, 0)
    assert calls == ["before", "after"] and optimizer.note == "theirs" and scheduler.counted() == 1
    assert optimizer.state_dict()["more"] == 1 and optimizer.param_groups[0]["name"] == "all"
    assert "step" not in copy.deepcopy(optimizer).__dict__


@pytest.mark.parametrize("method", ["step", "state_dict", "load_state_dict", "add_param_group"])
def test_a_method_that_somebody_has_replaced_is_named(method: str) -> None:
    optimizer = torch.optim.AdamW(make_net().parameters())
    setattr(optimizer, method, getattr(optimizer, method))
    with pytest.raises(ValueError, match=rf"AdamW\.{method} was replaced on this instance.*remove the replacement"):
        convert_adamw(optimizer)
    assert type(optimizer) is torch.optim.AdamW and method in optimizer.__dict__


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR of torch 2.6 causes this warning itself
@pytest.mark.filterwarnings("error::UserWarning:torch.optim")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_drive_the_converted_optimizer(name: str) -> None:
    converted, built = twin_runs(SCHEDULES[name], maximize=False, weight_decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip(converted, built, strict=True))


def test_options_are_carried_over_with_fused() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, eps=1e-6, weight_decay=0.3, maximize=True, fused=True)
    assert optimizer._step_supports_amp_scaling
    convert_adamw(optimizer, lambd=0.2)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["eps"], group["weight_decay"], group["maximize"]) == (0.1, 1e-6, 0.3, True)
    assert group["fused"] is True
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    assert group["beta1_max"] == group["betas"][0] == pytest.approx(0.9 - 0.1 * 0.2)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "betas": (0.5, 0.9)})
    assert optimizer.param_groups[1]["beta1_max"] == 0.5


def test_fused_becomes_none_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_compiler(device: torch.device) -> None:
        raise RuntimeError("fused=True on the CPU needs a C++ compiler")

    monkeypatch.setattr("am_lightning.optim.convert.require_fused", without_compiler)
    optimizer = torch.optim.AdamW(make_net().parameters(), lr=0.1, fused=True)
    with pytest.warns(UserWarning, match=r"becomes AMAdamW with fused=None: .* needs a C\+\+ compiler"):
        convert_adamw(optimizer)
    assert optimizer.param_groups[0]["fused"] is None and optimizer.defaults["fused"] is None


def test_a_cycling_scheduler_does_not_set_the_cap() -> None:
    optimizer = torch.optim.AdamW(make_net().parameters(), lr=0.1)
    scheduler = schedulers.OneCycleLR(optimizer, 0.1, total_steps=10)
    assert optimizer.param_groups[0]["betas"][0] == 0.95
    convert_adamw(optimizer)
    assert optimizer.param_groups[0]["beta1_max"] == pytest.approx(0.89)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match="cycle_momentum=False") as told:
        for _ in range(2):
            optimizer.step()
    assert len(told) == 1
    scheduler.step()
    assert optimizer.param_groups[0]["beta1_max"] == pytest.approx(0.89)


def test_default_cap_is_not_below_zero() -> None:
    assert default_cap(0.9, 0.1) == pytest.approx(0.89)
    assert default_cap(0.05, 0.5) == 0.0


class Custom(torch.optim.AdamW):
    pass


class FusedAdam(torch.optim.SGD):
    """An Adam that is not a torch.optim.Adam, such as apex's."""

    __module__ = "some_library.optimizers"


def stepped(net):
    optimizer = torch.optim.AdamW(net.parameters())
    step(net, optimizer, 0)
    return optimizer


REFUSED = {
    "amsgrad=False": lambda net: torch.optim.AdamW(net.parameters(), amsgrad=True),
    "differentiable=False": lambda net: torch.optim.AdamW(net.parameters(), differentiable=True, foreach=False),
    "not exactly torch.optim.AdamW": lambda net: Custom(net.parameters()),
    "has state already": stepped,
    "nothing to convert": lambda net: torch.optim.NAdam(net.parameters()),
    "return am_lightning.am_sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
    "in place of some_library's FusedAdam return": lambda net: FusedAdam(net.parameters()),
    "adds weight decay to the gradient.*return torch.optim.AdamW": lambda net: torch.optim.Adam(
        net.parameters(), weight_decay=0.1
    ),
}


@pytest.mark.parametrize("cure", REFUSED)
def test_what_cannot_be_converted_is_refused_with_the_cure(cure: str) -> None:
    class Module(Regression):
        def configure_optimizers(self):
            return REFUSED[cure](self.net)

    trainer = pl.Trainer(**quiet(max_steps=1, callbacks=[AdaptiveMemory()]))
    with pytest.raises(MisconfigurationException, match=cure):
        trainer.fit(Module())


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
def test_adam_is_converted_as_the_adamw_that_it_is(options) -> None:
    if (
        "decoupled_weight_decay" in options
        and "decoupled_weight_decay" not in torch.optim.Adam([torch.ones(1)]).defaults
    ):
        pytest.skip("Adam of this torch has no decoupled weight decay")

    class Module(Regression):
        def configure_optimizers(self):
            return torch.optim.Adam(self.net.parameters(), lr=0.05, betas=(0.9, 0.95), **options)

    module = Module()
    trainer = pl.Trainer(**quiet(max_steps=5, callbacks=[AdaptiveMemory()]))
    trainer.fit(module)
    assert type(trainer.optimizers[0]) is AMAdamW

    class Twin(Regression):
        def configure_optimizers(self):
            decay = options.get("weight_decay", 0.0)
            return AMAdamW(self.net.parameters(), lr=0.05, betas=(0.89, 0.95), weight_decay=decay)

    twin = Twin()
    pl.Trainer(**quiet(max_steps=5)).fit(twin)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_beside_adamw_others_stay_and_are_named(caplog) -> None:
    class Module(Regression):
        automatic_optimization = False

        def configure_optimizers(self):
            weights = list(self.net.parameters())
            self.made = [
                torch.optim.AdamW(weights[:1]),
                torch.optim.SGD(weights[1:2], lr=0.1),
                torch.optim.Adam(weights[2:], weight_decay=0.1),
            ]
            return self.made

        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            for optimizer in self.optimizers():
                optimizer.step()

    module = Module()
    with (
        pytest.warns(UserWarning, match="leaves Adam as it is beside the other optimizers: Adam adds weight decay"),
        caplog.at_level("INFO"),
    ):
        pl.Trainer(**quiet(max_steps=3, callbacks=[AdaptiveMemory()])).fit(module)
    assert [type(optimizer) for optimizer in module.made] == [AMAdamW, torch.optim.SGD, torch.optim.Adam]


def test_a_checkpoint_of_adam_is_that_of_the_adamw_that_it_is() -> None:
    saved = {}
    for kind, decay in ((torch.optim.Adam, 0.0), (torch.optim.AdamW, 0.0), (torch.optim.Adam, 0.1)):
        net = make_net()
        optimizer = kind(net.parameters(), weight_decay=decay)
        step(net, optimizer, 0)
        saved[kind.__name__, decay] = optimizer.state_dict()
    after = []
    for key in (("Adam", 0.0), ("AdamW", 0.0)):
        net = make_net()
        optimizer = AMAdamW(net.parameters(), weight_decay=0.0)
        optimizer.load_state_dict(saved[key])
        step(net, optimizer, 1)
        after.append([p.detach() for p in net.parameters()])
    assert all(map(torch.equal, *after))
    if "decoupled_weight_decay" in saved["Adam", 0.1]["param_groups"][0]:  # since torch 2.7
        with pytest.raises(ValueError, match="of Adam with weight_decay that is coupled"):
            AMAdamW(make_net().parameters()).load_state_dict(saved["Adam", 0.1])


FORMS = {
    "one": lambda a, b, schedule: a,
    "dict": lambda a, b, schedule: {"optimizer": a, "lr_scheduler": schedule},
    "list": lambda a, b, schedule: [a, b],
    "tuple": lambda a, b, schedule: (a, b),
    "two lists": lambda a, b, schedule: ([a, b], [schedule]),
    "dicts": lambda a, b, schedule: [{"optimizer": a}, {"optimizer": b}],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_configure_optimizers_is_converted(form: str) -> None:
    class Module(Regression):
        automatic_optimization = False

        def configure_optimizers(self):
            self.made = [torch.optim.AdamW(part.parameters()) for part in (self.net[:3], self.net[3:])]
            return FORMS[form](*self.made, schedulers.ConstantLR(self.made[0]))

        def training_step(self, batch, batch_idx) -> None:
            pass

    module = Module(batches=1)
    trainer = pl.Trainer(**quiet(max_epochs=1, callbacks=[AdaptiveMemory()]))
    trainer.fit(module)
    count = 1 if form in ("one", "dict") else 2
    assert [type(optimizer) for optimizer in module.made] == [AMAdamW] * count + [torch.optim.AdamW] * (2 - count)
    assert all(a is b for a, b in zip(trainer.optimizers, module.made, strict=False))


def test_a_module_without_an_optimizer_is_refused() -> None:
    class Module(Regression):
        def configure_optimizers(self):
            return None

    with (
        pytest.warns(UserWarning, match="will run with no optimizer"),
        pytest.raises(MisconfigurationException, match="nothing to convert: the Trainer was given no optimizer"),
    ):
        pl.Trainer(**quiet(max_steps=1, callbacks=[AdaptiveMemory()])).fit(Module())


def test_the_class_without_brackets_is_named() -> None:
    with pytest.raises(AttributeError, match=r"AdaptiveMemory is a class.*write AdaptiveMemory\(\)"):
        pl.Trainer(**quiet(max_steps=1, callbacks=[AdaptiveMemory]))
    assert AdaptiveMemory().state_key == "AdaptiveMemory"


def test_the_callback_is_subclassed_with_classes_of_other_kinds() -> None:
    """Abstract bases, generics and protocols have metaclasses; the callback must have the usual one."""

    class Registered(type):
        pass

    class Mine(AdaptiveMemory, abc.ABC):
        @abc.abstractmethod
        def name(self) -> str: ...

    class Whole(Mine, metaclass=abc.ABCMeta):
        def name(self) -> str:
            return "whole"

    class Theirs(metaclass=Registered):
        pass

    class Both(AdaptiveMemory, Theirs):
        pass

    class Named(AdaptiveMemory):
        @property
        def state_key(self) -> str:
            return f"mine of {super().state_key}"

    with pytest.raises(TypeError, match="abstract"):
        Mine()
    with pytest.raises(AttributeError, match=r"Both is a class.*write Both\(\)"):
        pl.Trainer(**quiet(max_steps=1, callbacks=[Both]))
    assert Whole().state_key.endswith(".Whole") and Named().state_key.startswith("mine of test_")
    for kind in (Whole, Both, Named):
        trainer = pl.Trainer(**quiet(max_steps=1, callbacks=[kind(beta1_max=0.5)]))
        trainer.fit(Regression())
        assert trainer.optimizers[0].param_groups[0]["beta1_max"] == 0.5


SLIPS = {
    "a number": (
        lambda: AdaptiveMemory(0.8),
        r"AdaptiveMemory does not take 0.8 as positional: write .*beta1_max=",
    ),
    "a module": (lambda: AdaptiveMemory(Regression()), "does not take a Regression as positional.*neither a module"),
    "learning_rate": (lambda: AdaptiveMemory(learning_rate=0.1), "'learning_rate': the optimizer's own: give it to"),
    "lr": (lambda: AdaptiveMemory(lr=0.1), "'lr': the optimizer's own: give it to torch.optim.AdamW"),
    "betas": (lambda: AdaptiveMemory(betas=(0.9, 0.95)), "'betas': the cap of beta_t is beta1_max="),
    "lambda": (lambda: AdaptiveMemory(lam=0.1), "'lam': write lambd="),
    "interval": (lambda: AdaptiveMemory(log_every=5), "'log_every': write log_every_n_steps="),
    "nearly right": (lambda: AdaptiveMemory(per_layers=True), "'per_layers': write per_layer="),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named_with_its_cure(slip: str) -> None:
    call, text = SLIPS[slip]
    with pytest.raises(TypeError, match=text):
        call()


def test_the_modules_own_method_comes_back() -> None:
    module = Regression(batches=2)
    trainer = pl.Trainer(**quiet(max_steps=2, callbacks=[AdaptiveMemory()]))
    trainer.fit(module)
    assert type(trainer.optimizers[0]) is AMAdamW
    assert "configure_optimizers" not in module.__dict__


def test_a_module_that_returns_amadamw_is_only_logged() -> None:
    class Module(Regression):
        def configure_optimizers(self):
            return am_adamw(self, lr=0.05, betas=(0.7, 0.95))

    trainer = pl.Trainer(**quiet(max_steps=2, callbacks=[AdaptiveMemory(scope="global")]))
    with pytest.warns(UserWarning, match="only logs here"):
        trainer.fit(Module(batches=2))
    assert trainer.optimizers[0].scope == "tensor"
    assert {group["beta1_max"] for group in trainer.optimizers[0].param_groups} == {0.7}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lambd", -0.1),
        ("lambd", float("nan")),
        ("beta1_max", 1.0),
        ("scope", "layer"),
        ("per_layer", 1),
        ("histogram", "yes"),
        ("log_every_n_steps", 0),
        ("max_consecutive_skips", 0),
        ("max_consecutive_skips", 1.5),
    ],
)
def test_bad_arguments_are_named(argument: str, value) -> None:
    with pytest.raises((TypeError, ValueError), match=argument):
        AdaptiveMemory(**{argument: value})
