"""Short reference implementations of both optimizers. Read them first; the tests compare the fast optimizers with them.

They run in one process without kernels, and use the names of the paper (arXiv 2510.04988; docs/idea.md derives the
equations). They compute the same as AMAdamW and AMSGD, but are slow and allocate freely. Use them to try out changes
of the method.

    g   gradient            d   memory: the last direction      eta   learning rate     mu       weight decay
    x   parameter           v   mean of g^2                     P     metric            lambda   memory regularisation
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Member = tuple[Tensor, dict[str, Any], dict[str, Any]]  # parameter, its group, its state


class _Reference(torch.optim.Optimizer):
    """Base class: it groups the parameters that share one beta_t, and defines the order of a step."""

    scope: str

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for members in self._scopes():
            self._step_scope(members)
        return loss

    def _step_scope(self, members: list[Member]) -> None:
        raise NotImplementedError

    def _scopes(self) -> Iterator[list[Member]]:
        """Yield lists of parameters with a gradient. The parameters of a list share one beta_t."""
        groups: list[list[Member]] = []
        for group in self.param_groups:
            groups.append([(x, group, self.state[x]) for x in group["params"] if x.grad is not None])
        if self.scope == "tensor":
            yield from ([member] for group in groups for member in group)
        elif self.scope == "group":
            yield from groups
        elif self.scope == "global":
            yield [member for group in groups for member in group]
        else:
            raise ValueError(f"scope must be 'tensor', 'group' or 'global', not {self.scope!r}")


def _clip(numerator: float, denominator: float, cap: float) -> float:
    """beta_t. If memory and gradient are equal everywhere, every beta gives the same direction, and 0 is returned."""
    return min(max(numerator / denominator, 0.0), cap) if denominator else 0.0


class AMAdamWReference(_Reference):
    """AM-AdamW: AdamW whose beta1 is computed at every step.

    Args:
        params, lr, betas, eps, weight_decay, lambd, scope: as in ``AMAdamW``; ``betas[0]`` is the cap beta1_max.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.89, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        lambd: float = 0.1,
        scope: str = "tensor",
    ) -> None:
        self.scope = scope
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "lambd": lambd})

    def _step_scope(self, members: list[Member]) -> None:
        numerator = denominator = 0.0
        for x, group, state in members:
            g, eta, mu, lambd = x.grad, group["lr"], group["weight_decay"], group["lambd"]
            assert g is not None
            cap, beta2 = group["betas"]
            if not state:
                state |= {"step": 0, "exp_avg": 0 * x, "exp_avg_sq": 0 * x, "beta_prod": 1.0, "prev_lr": 0.0}
            d, v = state["exp_avg"], state["exp_avg_sq"]
            state["step"] += 1
            v.copy_(beta2 * v + (1 - beta2) * g**2)  # v_t
            c = 1 - cap * state["beta_prod"]  # 1 - beta1_max prod_{i<t} beta_i, the bias correction
            P = state["P"] = c * ((v / (1 - beta2 ** state["step"])).sqrt() + group["eps"])
            if state["step"] == 1:  # no memory yet
                continue
            M = 1 / (P * (1 + lambd * P))
            S1 = (M * (d - g) ** 2).sum()  # how far memory and gradient are apart
            S2 = (M * (d - g) * (g + lambd * P * d)).sum()
            S3 = (g * d / P).sum()  # Delta_t / eta_{t-1} to first order, with mu S4
            S4, S5 = (g * x).sum(), (x * (d - g)).sum()
            ratio = state["prev_lr"] / eta if eta else 0.0
            numerator += float((1 + mu * eta) * ratio * (S3 + mu * S4) - S2 - mu * S5)
            denominator += float(S1)
        for x, group, state in members:
            g, eta, mu, lambd, cap = x.grad, group["lr"], group["weight_decay"], group["lambd"], group["betas"][0]
            d, P = state["exp_avg"], state.pop("P")
            assert g is not None
            beta = cap if state["step"] == 1 else _clip(numerator, denominator, cap)  # beta_t
            d.copy_(((1 - beta) * g + (lambd * P + beta) * d) / (1 + lambd * P))  # d_t
            x.copy_((1 - mu * eta) * x - eta * d / P)  # x_{t+1}
            state |= {"beta": beta, "beta_prod": state["beta_prod"] * beta, "prev_lr": eta}


class AMSGDReference(_Reference):
    """AM-SGD (the paper's AM-MGD and AM-MSGD): momentum SGD whose momentum is computed at every step.

    Args:
        params, lr, beta_max, weight_decay, lambd, scope, decoupled_weight_decay: as in ``AMSGD``. The loss gap is
            always "first_order" here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        beta_max: float = 0.9,
        weight_decay: float = 0.0,
        *,
        lambd: float = 0.1,
        scope: str = "global",
        decoupled_weight_decay: bool = False,
    ) -> None:
        self.scope, self.decoupled_weight_decay = scope, decoupled_weight_decay
        super().__init__(params, {"lr": lr, "beta_max": beta_max, "weight_decay": weight_decay, "lambd": lambd})

    def _step_scope(self, members: list[Member]) -> None:
        numerator = denominator = 0.0
        for x, group, state in members:
            g, eta, decay, lambd = x.grad, group["lr"], group["weight_decay"], group["lambd"]
            assert g is not None
            mu = decay if self.decoupled_weight_decay else 0.0
            g = state["g"] = g + (decay - mu) * x  # coupled decay is part of the gradient
            if first := "momentum_buffer" not in state:
                state |= {"step": 0, "momentum_buffer": g.clone(), "prev_lr": 0.0}  # d_0 = g_0
            d = state["momentum_buffer"]
            state["step"] += 1
            if first:
                continue
            ratio = state["prev_lr"] / eta if eta else 0.0
            gap = (1 + mu * eta) * ratio * ((g * d).sum() + mu * (g * x).sum())  # Delta_t / eta_t to first order
            model = ((d - g) * (g + lambd * d)).sum() / (1 + lambd) + mu * (x * (d - g)).sum()
            numerator += float(gap - model)
            denominator += float(((d - g) ** 2).sum() / (1 + lambd))
        for x, group, state in members:
            eta, lambd, cap = group["lr"], group["lambd"], group["beta_max"]
            mu = group["weight_decay"] if self.decoupled_weight_decay else 0.0
            g, d = state.pop("g"), state["momentum_buffer"]
            beta = _clip(numerator, denominator, cap)  # beta_t
            d.copy_(((beta + lambd) * d + (1 - beta) * g) / (1 + lambd))  # d_t
            x.copy_((1 - mu * eta) * x - eta * d)  # x_{t+1}
            state |= {"beta": beta, "prev_lr": eta}
