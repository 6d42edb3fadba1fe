"""Mistakes of people who come from torch.optim end with a TypeError that says what to write."""

from __future__ import annotations

import inspect

import pytest
import torch

from am_lightning import AMSGD, AMAdamW, am_adamw, am_sgd, clip_grad_norm_
from am_lightning.optim.argument_hints import ADAMW, SGD


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


def model() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


SLIPS = {
    "learning_rate": (
        lambda: AMAdamW(params(), learning_rate=0.1),
        "'learning_rate': write lr=",
    ),
    "factory": (lambda: am_adamw(model(), learning_rate=0.1), "'learning_rate': write lr="),
    "factory of sgd": (lambda: am_sgd(model(), momentum=0.9), "'momentum': .* cap is beta_max=..."),
    "AdamW's amsgrad": (lambda: AMAdamW(params(), amsgrad=False), "'amsgrad': .*leave it out"),
    "the callback's cap": (lambda: AMAdamW(params(), beta1_max=0.8), r"'beta1_max': .* betas=\(cap, beta2\)"),
    "lambda": (lambda: AMSGD(params(), lambda_=0.1), "'lambda_': write lambd="),
    "SGD's momentum": (lambda: AMSGD(params(), lr=0.1, momentum=0.9), "AMSGD has no argument 'momentum'.*beta_max=..."),
    "SGD's nesterov": (lambda: AMSGD(params(), nesterov=True), "'nesterov': .*leave it out"),
    "nearly right": (lambda: AMAdamW(params(), weight_decy=0.1), "'weight_decy': write weight_decay="),
    "far off": (lambda: AMAdamW(params(), zzz=0.1), "'zzz': its arguments are params, lr, betas"),
    "AdamW's sixth": (
        lambda: AMAdamW(params(), 1e-3, (0.9, 0.9), 1e-8, 0.1, False),
        "take False as positional: write lambd",
    ),
    "torch's norm_type": (
        lambda: clip_grad_norm_(AMAdamW(params()), 1.0, norm_type=2.0),
        "'norm_type': .*leave it out",
    ),
    "its third": (
        lambda: clip_grad_norm_(AMAdamW(params()), 1.0, 2.0),
        "clip_grad_norm_ does not take 2.0 as positional",
    ),
    "a model to clip": (lambda: clip_grad_norm_(model(), 1.0), r"Invalid optimizer: Linear .*\(optimizer, max_norm\)"),
    "parameters to clip": (lambda: clip_grad_norm_(params(), 1.0), r"where torch's clip_grad_norm_ takes parameters"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named_with_its_cure(slip: str) -> None:
    call, text = SLIPS[slip]
    with pytest.raises(TypeError, match=text):
        call()


def test_signatures_are_what_they_were() -> None:
    """Help texts, LightningCLI and the HF Trainer read the signatures."""
    for kind, cures in ((AMAdamW, ADAMW), (AMSGD, SGD)):
        names = list(inspect.signature(kind).parameters)
        assert names[:2] == ["params", "lr"] and "replica_group" in names
        assert not cures.keys() & set(names)


def test_a_subclass_names_itself() -> None:
    class Mine(AMAdamW):
        def __init__(self, params, extra: int = 0, **options) -> None:
            super().__init__(params, **options)
            self.extra = extra

    assert Mine(params(), 3, lr=0.1).extra == 3
    with pytest.raises(TypeError, match="Mine has no argument 'wd': write weight_decay"):
        Mine(params(), wd=0.1)
