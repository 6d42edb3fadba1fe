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
    """AdamW with adaptive memory: beta_t from a two-plane proximal model of the loss, at every step.

    With P = c_t (sqrt(v / (1 - beta2^t)) + eps), where c_t = 1 - beta1_max prod_{i<t} beta_i is the bias correction of
    a momentum that varies, q = 1 + lambda P, k = (1 + mu eta_t) eta_{t-1} / eta_t and sums over the scope (Topollai and
    Choromanska, arXiv 2510.04988; the two-sum form is derived in the documentation):

    ```text
    1 - beta_t = clip(sum (d - (1 + k) g)(d / P + mu x) / sum (d - g)^2 / (P q), 1 - beta1_max, 1)
    d' = d + (1 - beta_t)(g - d) / q
    x' = (1 - mu eta_t) x - eta_t d' / P
    ```

    Args:
        params: iterable of parameters of any shape and floating dtype, of (name, parameter) pairs, or of dicts that
            define groups.
        lr: learning rate, a float or a one-element tensor.
        betas: the cap of beta_t (kept as the group option ``beta1_max``, for schedulers may cycle ``betas[0]``) and the
            decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay mu.
        lambd: memory regularisation lambda.
        scope: one beta_t for every "tensor", "group", or "global" for the model.
        maximize: ascend.
        foreach: None picks the kernels for the device, True torch._foreach_*, False plain formulas.
        capturable: safe to capture in a CUDA graph (with a tensor lr).
        fused: True runs each pass as one kernel over all tensors: Triton on CUDA and ROCm, on the CPU a C++ loop that
            the wheel brings or that is built at the first step, torch.compile elsewhere. None (with foreach None) does
            so on CUDA, ROCm and the CPU where the kernels build and work on all ranks, which is tried in the first
            step; elsewhere the eager kernels. False: eager kernels. ``describe`` says which, and why not the fused one.
        nonfinite: "skip" drops a step, on all ranks, in which a sum is not finite or ``exp_avg_sq`` would not be: a
            gradient's square overflows float32 (float64 for float64 parameters), or what float16 can hold of it.
            "propagate" does what AdamW does.
        replica_group: process group of ranks that hold the same parameters (DDP); the AdaptiveMemory callback sets it.
        exp_avg_dtype: torch.bfloat16 keeps ``exp_avg`` of float32 parameters in half the memory, rounded stochastically
            (reproducible: the noise is a hash of parameter, step and element). Not under FSDP1 and DeepSpeed.

    State of a parameter: ``exp_avg`` and ``exp_avg_sq``, of its shape; 0-dim float32 ``step``, ``beta_prod`` (the
    product of its beta_t), ``beta`` (its last, -1 before its first) and ``prev_lr``.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the text says what is allowed.
        RuntimeError: ``fused=True`` lacks a compiler or Triton (the text says what to install), or ``foreach`` is set.
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
        if group.get(self.cap_key) is not None:  # a group may name its cap; a scheduler may have changed betas[0]
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
        """As in torch.optim; the saved groups have all options of AdamW's, which some loaders ask for."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.update(FOREIGN_OPTIONS)
        return saved
