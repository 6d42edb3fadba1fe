"""AMAdamW and AMSGD described as torch describes its own optimizers, in torch.testing's `OptimizerInfo`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

from am_lightning import AMSGD, AMAdamW

pytest.importorskip("expecttest", reason="torch.testing needs expecttest")
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

SCHEDULERS: list[list[Callable[[Optimizer], LRScheduler]]] = [
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: ReduceLROnPlateau(opt)],
    [lambda opt: CosineAnnealingLR(opt, T_max=300)],
    [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4), lambda opt: ReduceLROnPlateau(opt)],
    [
        lambda opt: StepLR(opt, gamma=0.9, step_size=10),
        lambda opt: ConstantLR(opt, factor=0.4, total_iters=4),
        lambda opt: ExponentialLR(opt, gamma=0.99),
        lambda opt: PolynomialLR(opt, power=0.9, total_iters=400),
    ],
]


def _inputs(*entries: tuple[str, dict[str, Any]]) -> list[OptimizerInput]:
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in entries]


def adamw_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return _inputs(
        ("default", {}),
        ("non-default lr", {"lr": 0.01}),
        ("Tensor lr", {"lr": torch.tensor(0.001)}),
        ("nonzero weight_decay", {"weight_decay": 0.1}),
        ("zero weight_decay", {"weight_decay": 0.0}),
        ("maximize", {"weight_decay": 0.1, "maximize": True}),
        ("capturable", {"capturable": True}),
        ("capturable, Tensor lr", {"capturable": True, "lr": torch.tensor(0.001)}),
        ("betas", {"betas": (0.5, 0.95)}),
        ("no momentum", {"betas": (0.0, 0.999)}),
        ("lambd", {"lambd": 0.0}),
        ("scope group", {"scope": "group", "weight_decay": 0.1}),
        ("scope global", {"scope": "global", "weight_decay": 0.1}),
        ("nonfinite", {"nonfinite": "propagate"}),
    )


def sgd_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return _inputs(
        ("default", {}),
        ("non-default lr", {"lr": 1e-2}),
        ("Tensor lr", {"lr": torch.tensor(0.001)}),
        ("coupled weight_decay", {"weight_decay": 0.1}),
        ("decoupled weight_decay", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        ("maximize", {"weight_decay": 0.1, "maximize": True}),
        ("no momentum", {"beta_max": 0.0}),
        ("uncapped", {"beta_max": 1.0}),
        ("lambd", {"lambd": 1.0}),
        ("scope tensor", {"scope": "tensor"}),
        ("scope group", {"scope": "group", "weight_decay": 0.1}),
        ("nonfinite", {"nonfinite": "propagate"}),
        ("exact loss gap", {"loss_gap": "exact", "weight_decay": 0.1}),
    )


def _errors(*entries: tuple[type[Exception], str, dict[str, Any]]) -> list[ErrorOptimizerInput]:
    return [
        ErrorOptimizerInput(OptimizerInput(params=None, kwargs=kwargs, desc=regex), error_type=error, error_regex=regex)
        for error, regex, kwargs in entries
    ]


def shared_error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    return get_error_inputs_for_all_optims(device, dtype) + _errors(
        (ValueError, "Invalid learning rate: -0.1", {"lr": -0.1}),
        (ValueError, "Invalid learning rate: nan", {"lr": float("nan")}),
        (ValueError, "Invalid weight_decay value: -1", {"lr": 1e-2, "weight_decay": -1}),
        (ValueError, "Invalid lambd.*: -0.5", {"lambd": -0.5}),
        (ValueError, "Invalid scope: 'layer'.*'tensor'.*'group'.*'global'", {"scope": "layer"}),
        (ValueError, "Invalid nonfinite: 'ignore'.*'skip'.*'propagate'", {"nonfinite": "ignore"}),
        (TypeError, "replica_group", {"replica_group": "world"}),
        (TypeError, "momentum", {"momentum": 0.9}),
    )  # fmt: skip


def adamw_error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    return shared_error_inputs(device, dtype) + _errors(
        (
            ValueError,
            "lr as a Tensor is not supported for capturable=False and foreach=True",
            {"lr": torch.tensor(0.001), "foreach": True},
        ),
        (ValueError, "Invalid beta parameter at index 0: 1.0", {"lr": 1e-2, "betas": (1.0, 0.0)}),
        (ValueError, "Invalid beta parameter at index 1: 1.0", {"lr": 1e-2, "betas": (0.0, 1.0)}),
        (ValueError, "Invalid epsilon value: -1e-08", {"eps": -1e-8}),
        (RuntimeError, "`fused` and `foreach` cannot be `True` together", {"fused": True, "foreach": True}),
        (TypeError, "Invalid fused: 1", {"fused": 1}),
        (ValueError, "Invalid exp_avg_dtype: torch.float16", {"exp_avg_dtype": torch.float16}),
        (TypeError, "amsgrad", {"amsgrad": True}),
    )


def sgd_error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    return shared_error_inputs(device, dtype) + _errors(
        (ValueError, "Invalid beta_max.*: 1.5", {"beta_max": 1.5}),
        (ValueError, "Invalid loss_gap: 'true'.*'first_order'.*'exact'", {"loss_gap": "true"}),
        (ValueError, "loss_gap.*scope", {"loss_gap": "exact", "scope": "tensor"}),
        (TypeError, "decoupled_weight_decay", {"decoupled_weight_decay": "yes"}),
    )


OPTIMIZERS = [
    OptimizerInfo(
        AMAdamW,
        optim_inputs_func=adamw_inputs,
        optim_error_inputs_func=adamw_error_inputs,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach", "fused"),
        not_og_supported_flags=(),
        has_capturable_arg=True,
        supports_complex=False,
    ),
    OptimizerInfo(
        AMSGD,
        optim_inputs_func=sgd_inputs,
        optim_error_inputs_func=sgd_error_inputs,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach",),
        not_og_supported_flags=(),
        supports_complex=False,
    ),
]

STATE_NAMES = {AMAdamW: ("exp_avg", "exp_avg_sq"), AMSGD: ("momentum_buffer",)}

each_optimizer = pytest.mark.parametrize("info", OPTIMIZERS, ids=lambda info: info.name)


def _cases() -> Iterator[Any]:
    for info in OPTIMIZERS:
        for entry in info.optim_inputs_func(device="cpu"):
            yield pytest.param(info, entry.kwargs, id=f"{info.name}-{entry.desc}")


def _error_cases() -> Iterator[Any]:
    for info in OPTIMIZERS:
        for entry in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            assert entry.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
            yield pytest.param(info, entry, id=f"{info.name}-{entry.optimizer_error_input.desc}")


each_case = pytest.mark.parametrize(("info", "kwargs"), list(_cases()))
each_error = pytest.mark.parametrize(("info", "error"), list(_error_cases()))


def with_own_lr(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the keywords whose tensors no other test shares."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in kwargs.items()}


class LeastSquares:
    """``sum (W x + b)^2`` over the parameters W (10, 5) and b (10,): every optimizer must lower it."""

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(10, 5, 2, generator=generator, dtype=torch.float64).to(dtype)[..., 0]
        bias = torch.randn(10, 2, generator=generator, dtype=torch.float64).to(dtype)[..., 0]
        if contiguous:
            weight, bias = weight.contiguous(), bias.contiguous()
        self.weight = torch.nn.Parameter(weight)
        self.bias = torch.nn.Parameter(bias)
        self.input = torch.randn(5, generator=generator, dtype=torch.float64).to(dtype)
        self.params = [self.weight, self.bias]

    def named(self) -> list[tuple[str, Tensor]]:
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self) -> Tensor:
        """Zero the gradients, run forward and backward, return the loss: a closure for ``step``."""
        for param in self.params:
            param.grad = None
        loss = (self.weight.mv(self.input) + self.bias).pow(2).sum()
        loss.backward()
        return loss


def rosenbrock(point: Tensor) -> Tensor:
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2
