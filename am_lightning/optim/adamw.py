"""AMAdamW: AdamW whose beta1 is chosen at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from am_lightning.optim.argument_hints import ADAMW, with_hints
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.closed_form import RowOptions
from am_lightning.optim.kernels.inputs import GroupOptions
from am_lightning.optim.kernels.registry import require_fused
from am_lightning.optim.param_state import FOREIGN_OPTIONS
from am_lightning.optim.validation import (
    check_betas,
    check_exp_avg_dtype,
    check_flag,
    check_implementation,
    check_lr,
    check_number,
)


class AMAdamW(AdaptiveMemoryOptimizer):
    """Implements AdamW with adaptive memory: a two-plane proximal model of the loss gives beta_t at every step.

    Let P = c_t (sqrt(v / (1 - beta2^t)) + eps), q = 1 + lambda P and k = (1 + mu eta_t) eta_{t-1} / eta_t. Here
    c_t = 1 - beta1_max prod_{i<t} beta_i is the bias correction of a momentum that varies. With sums over the scope
    (Topollai and Choromanska, arXiv 2510.04988; the documentation derives the two-sum form):

    ```text
    1 - beta_t = clip(sum (d - (1 + k) g)(d / P + mu x) / sum (d - g)^2 / (P q), 1 - beta1_max, 1)
    d' = d + (1 - beta_t)(g - d) / q
    x' = (1 - mu eta_t) x - eta_t d' / P
    ```

    Args:
        params: iterable of parameters of any shape and floating dtype, of (name, parameter) pairs, or of dicts that
            define groups.
        lr: learning rate, a float or a one-element tensor.
        betas: the cap of beta_t and the decay of the second moment. The cap is kept as the group option ``beta1_max``,
            because schedulers may cycle ``betas[0]``.
        eps: term added to the root of the second moment.
        weight_decay: decoupled weight decay mu.
        lambd: memory regularisation lambda.
        scope: the parameters that share one beta_t: "tensor" (each its own), "group" (each group) or "global" (all).
        maximize: maximize the objective instead of minimizing it.
        foreach: None picks the kernels for the device, True uses torch._foreach_*, False plain formulas.
        capturable: whether the step may be captured in a CUDA graph (with a tensor lr).
        fused: True runs each pass as one kernel over all tensors. This is Triton on CUDA and ROCm, a C++ loop on the
            CPU (part of the wheel, or built at the first step), and torch.compile on other devices. None, with
            ``foreach=None``, uses these kernels on CUDA, ROCm and the CPU if they build and work on all ranks, which
            the first step tries; otherwise it uses the eager kernels. False always uses the eager kernels.
            ``describe`` returns the kernels in use, and the reason if they are not the fused ones.
        nonfinite: "skip" skips a step on all ranks if a sum, or an element of the new ``exp_avg_sq``, is not finite:
            the square of a gradient overflows float32 (float64 for float64 parameters) or the dtype of
            ``exp_avg_sq``, such as float16. "propagate" behaves as AdamW does.
        replica_group: process group of ranks that hold the same parameters (DDP). The AdaptiveMemory callback sets it.
        exp_avg_dtype: torch.bfloat16 halves the memory of ``exp_avg`` of float32 parameters. Rounding is stochastic but
            reproducible: the noise is a hash of parameter, step and element. Not supported with FSDP1 and DeepSpeed.
            None uses the parameter's dtype.

    The state of a parameter has ``exp_avg`` and ``exp_avg_sq`` of its shape, and 0-dim float32 tensors: ``step``,
    ``beta_prod`` (the product of its beta_t), ``beta`` (its last beta_t, -1 before its first) and ``prev_lr``.

    Raises:
        ValueError, TypeError: if an argument is out of range or of the wrong type. The message says what is allowed.
        RuntimeError: if ``fused=True`` lacks a compiler or Triton (the message says what to install), or if ``foreach``
            is True as well.
    """

    cap_key = "beta1_max"
    moments = ("exp_avg", "exp_avg_sq")
    first_takes_cap = True
    plain_attributes = ("scope", "nonfinite", "exp_avg_dtype")

    @with_hints(ADAMW, "lambd=..., scope=... and what follows by name; AdamW's amsgrad does not exist here")
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.89, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        lambd: float = 0.1,
        scope: str = "tensor",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        nonfinite: str = "skip",
        replica_group: Any = None,
        exp_avg_dtype: torch.dtype | None = None,
    ) -> None:
        check_exp_avg_dtype(exp_avg_dtype)
        self.exp_avg_dtype = exp_avg_dtype
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "lambd": lambd,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "fused": fused,
        }
        defaults["betas"] = self._check_group(defaults)["betas"]
        super().__init__(params, defaults, scope=scope, nonfinite=nonfinite, replica_group=replica_group)
        for group in self.param_groups:
            for device in {param.device for param in group["params"]} if group["fused"] else ():
                require_fused(device)

    def _check_group(self, group: dict[str, Any]) -> dict[str, Any]:
        check_lr(group["lr"])
        cap, beta2 = check_betas(group["betas"])
        if group.get(self.cap_key) is not None:  # it takes precedence, because a scheduler may have changed betas[0]
            cap = group[self.cap_key]
            check_number(self.cap_key, cap, upper=1, open_upper=True)
        for name in ("eps", "weight_decay", "lambd"):
            check_number(name, group[name])
        for name in ("maximize", "capturable"):
            check_flag(name, group[name])
        check_implementation(group)
        return {"betas": (float(cap), beta2), self.cap_key: float(cap)}

    def _group_options(self, group: dict[str, Any]) -> GroupOptions:
        beta2, lambd, decay = group["betas"][1], group["lambd"], group["weight_decay"]
        return GroupOptions(float(beta2), float(lambd), float(decay), 0.0, group["maximize"])

    def _row_options(self, group: dict[str, Any]) -> RowOptions:
        beta2, lambd = group["betas"][1], group["lambd"]
        return RowOptions(group[self.cap_key], group["lr"], group["weight_decay"], beta2, group["eps"], lambd)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as in torch.optim. The saved groups have all of AdamW's options, which some loaders need."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.update(FOREIGN_OPTIONS)
        return saved
