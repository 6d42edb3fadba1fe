"""AMSGD: momentum SGD whose momentum is chosen at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from am_lightning.distributed import ShardLayout, local_shard
from am_lightning.optim.argument_hints import SGD, with_hints
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.closed_form import Decision, RowOptions, Sums
from am_lightning.optim.kernels.inputs import GroupOptions
from am_lightning.optim.squares import square_sum
from am_lightning.optim.step_inputs import StepInputs
from am_lightning.optim.validation import (
    LOSS_GAPS,
    check_choice,
    check_flag,
    check_implementation,
    check_lr,
    check_number,
    is_one_number,
)

_PREV_LOSS = "prev_loss"  # group option: f(x_{t-1}), a float in a state_dict, a device tensor in a live group


class _Shared(NamedTuple):
    """0-dim numbers that are summed over all ranks in the same collective as the packed sums."""

    loss: Tensor
    ranks: Tensor
    penalty: Tensor  # the L2 penalty of coupled weight decay, for loss_gap="exact"
    gradients: Tensor  # 0 if all gradients are zero; needed because coupled decay is part of D


class AMSGD(AdaptiveMemoryOptimizer):
    """Implements SGD with adaptive memory (the paper's AM-MGD and AM-MSGD).

    The first direction is d_0 = g_0. Then, with sums over the scope (Topollai and Choromanska, arXiv 2510.04988):

    ```text
    beta_t = clip(((1 + lambda) Delta_t / eta_t - <d - g, g + lambda d>) / |d - g|^2, 0, beta_max)
    d' = ((beta_t + lambda) d + (1 - beta_t) g) / (1 + lambda)
    x' = x - eta_t d'
    ```

    Args:
        params: iterable of parameters of any shape and floating dtype, of (name, parameter) pairs, or of dicts that
            define groups.
        lr: learning rate, a float or a one-element tensor.
        beta_max: cap of beta_t, in [0, 1].
        weight_decay: L2 penalty, or decoupled weight decay with ``decoupled_weight_decay``.
        lambd: memory regularisation lambda.
        scope: the parameters that share one beta_t: "tensor" (each its own), "group" (each group) or "global" (all).
        loss_gap: "first_order" estimates Delta_t = f(x_{t-1}) - f(x_t) by eta_{t-1} <g_t, d>. "exact" uses the losses
            that the closure returns, for full-batch training; it needs scope "global" and one lr for all groups.
        maximize: maximize the objective instead of minimizing it.
        foreach: None picks the eager kernels for the device, True uses torch._foreach_*, False plain formulas.
        nonfinite: "skip" skips a step in which a sum is not finite, "propagate" uses the cap there.
        replica_group: process group of ranks that hold the same parameters (DDP). The AdaptiveMemory callback sets it.

    The state of a parameter has ``momentum_buffer`` (the direction d) of its shape, and 0-dim float32 tensors:
    ``step``, ``beta_prod`` (the product of its beta_t), ``beta`` (its last beta_t, -1 before its first) and
    ``prev_lr``.

    With ``loss_gap="exact"``, ``step`` needs a closure that returns one number, and raises ValueError otherwise.

    Raises:
        ValueError, TypeError: if an argument is out of range or of the wrong type. The message says what is allowed.
    """

    cap_key = "beta_max"
    moments = ("momentum_buffer",)
    first_takes_cap = False
    plain_attributes = ("scope", "nonfinite", "loss_gap")

    loss_gap: str

    @with_hints(SGD, "lambd=..., scope=... and what follows by name; SGD's dampening and nesterov do not exist here")
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        beta_max: float = 0.9,
        weight_decay: float = 0.0,
        *,
        lambd: float = 0.1,
        scope: str = "global",
        decoupled_weight_decay: bool = False,
        loss_gap: str = "first_order",
        maximize: bool = False,
        foreach: bool | None = None,
        nonfinite: str = "skip",
        replica_group: Any = None,
    ) -> None:
        check_choice("loss_gap", loss_gap, LOSS_GAPS)
        if loss_gap == "exact" and scope != "global":
            raise ValueError(f"Invalid scope: {scope!r} (loss_gap='exact' needs scope='global': one loss, one beta_t)")
        self.loss_gap = loss_gap
        defaults = {
            "lr": lr,
            "beta_max": beta_max,
            "weight_decay": weight_decay,
            "lambd": lambd,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        self._check_group(defaults)
        super().__init__(params, defaults, scope=scope, nonfinite=nonfinite, replica_group=replica_group)

    def _check_group(self, group: dict[str, Any]) -> dict[str, Any]:
        check_lr(group["lr"])
        check_number("beta_max", group["beta_max"], upper=1)
        check_number("weight_decay", group["weight_decay"])
        check_number("lambd", group["lambd"])
        check_flag("decoupled_weight_decay", group["decoupled_weight_decay"])
        check_flag("maximize", group["maximize"])
        check_implementation(group)
        before = group.get(_PREV_LOSS)
        if not (before is None or is_one_number(before) or (isinstance(before, Real) and not math.isinf(before))):
            raise TypeError(f"Invalid {_PREV_LOSS}: {before!r} ({_PREV_LOSS} must be the last loss, or None)")
        return {}

    def _group_options(self, group: dict[str, Any]) -> GroupOptions:
        decay, decoupled = float(group["weight_decay"]), group["decoupled_weight_decay"]
        mu, l2 = (decay, 0.0) if decoupled else (0.0, decay)
        return GroupOptions(0.0, float(group["lambd"]), mu, l2, group["maximize"])

    def _row_options(self, group: dict[str, Any]) -> RowOptions:
        mu = self._group_options(group).mu
        numbers: Any = (group[self.cap_key], group["lr"], mu, 0.0, 0.0, float(group["lambd"]))
        return RowOptions(*numbers)

    # ------------------------------------------------------------------ the exact gap
    @property
    def needs_exact_sums(self) -> bool:  # type: ignore[override]
        """The loss gap is known, so that sums must count each element once."""
        return self.loss_gap == "exact"

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        loss = super()._evaluate(closure)
        if self.loss_gap == "exact":
            self._check_loss(loss, closure)
            self._check_one_step_size()
        return loss

    def _check_loss(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        """Raise ValueError, before anything changes, if the closure does not return the loss."""
        if closure is None:
            raise ValueError(
                "loss_gap='exact' needs step(closure) with a closure that returns the loss, but closure is None"
            )
        real = isinstance(loss, Real) and not isinstance(loss, bool)
        if isinstance(loss, Tensor):
            real = loss.numel() == 1 and not loss.is_complex() and loss.dtype != torch.bool
        if not real:
            shown = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(
                f"loss_gap='exact' needs a closure that returns a real scalar loss, but it returned {shown}"
            )

    def _check_one_step_size(self) -> None:
        """Raise ValueError unless all groups have the same learning rate, decoupled weight decay and sign.

        Delta_t / eta_t is defined only if the whole model moves with one eta and one mu. A tensor lr must be the same
        object in all groups, because comparing values would wait for the device.
        """
        first = self.param_groups[0]
        for group in self.param_groups[1:]:
            for key in ("lr", "weight_decay", "decoupled_weight_decay", "maximize"):
                tensors = isinstance(group[key], Tensor) or isinstance(first[key], Tensor)
                same = group[key] is first[key] or (not tensors and group[key] == first[key])
                if not same and (key != "weight_decay" or group["decoupled_weight_decay"]):
                    raise ValueError(
                        f"loss_gap='exact' needs one {key} for all groups, but got {first[key]} and {group[key]}"
                    )

    def prepare(self, layout: ShardLayout) -> StepInputs:
        """Collect the inputs as in the base class. With the exact gap, k is 0: the known Delta_t replaces k <g, d>."""
        inputs = super().prepare(layout)
        if self.loss_gap == "exact":
            inputs.coefficients["one_plus_k"] = torch.ones_like(inputs.coefficients["one_plus_k"])
        return inputs

    def _reduce(self, packed: Tensor, layout: ShardLayout, loss: Any) -> tuple[Tensor, _Shared | None]:
        mine = self._shared(layout, loss, packed)
        packed, shared = layout.all_reduce(packed, None if mine is None else torch.stack(mine))
        return packed, None if shared is None else _Shared(*shared.unbind())

    def _shared(self, layout: ShardLayout, loss: Any, like: Tensor) -> _Shared | None:
        """Return this rank's numbers, or None on every rank if the step needs none."""
        coupled = self._coupled_decays()
        if self.loss_gap != "exact" and not any(coupled):
            return None
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        value = penalty = gradients = zero
        if self.loss_gap == "exact":
            value = loss.detach() if isinstance(loss, Tensor) else torch.full_like(zero, float(loss))
            value = value.reshape(()).to(zero)
            for logical in layout.logical_params:
                l2 = coupled[logical.group_index]
                if l2 and logical.is_owner:
                    penalty = penalty + 0.5 * l2 * square_sum(local_shard(logical, logical.param), like)
        if any(coupled) and any(isinstance(group["lr"], Tensor) or group["lr"] == 0 for group in self.param_groups):
            assert self._plan is not None  # step() has made it
            for grad in self._plan.gradients():
                gradients = gradients + square_sum(grad, like)
        return _Shared(value, torch.ones_like(zero), penalty, gradients)

    def decide(
        self,
        sums: Sums,
        options: RowOptions,
        sizes: Sequence[int],
        shared: _Shared | None = None,
        **known: Any,
    ) -> Decision:
        """Compute beta_t as in the base class, from the known loss gap if there is one."""
        exact = self.loss_gap == "exact"
        decision = super().decide(
            sums,
            options,
            sizes,
            loss_gap=self._known_gap(shared, options) if shared is not None and exact else None,
            gradients=shared.gradients if shared is not None and any(self._coupled_decays()) else None,
            **known,
        )
        # d_0 = g_0: a fresh buffer is zero, and 0 + (1 + lambda) (g - 0) / (1 + lambda) = g
        return decision._replace(omega=torch.where(sums.first, 1 + options.lambd, decision.omega))

    def _remember(self, shared: _Shared, decision: Decision) -> None:
        """Keep f(x_t) for the exact gap of the next step. A skipped step leaves the old value."""
        if self.loss_gap != "exact":
            return
        now = torch.where(decision.skipped, self._prev_loss(shared.loss), self._objective(shared))
        for group in self.param_groups:
            group[_PREV_LOSS] = now

    def _coupled_decays(self) -> list[float]:
        """The L2 penalty of each group, or 0 if its decay is decoupled."""
        return [self._group_options(group).l2 for group in self.param_groups]

    def _known_gap(self, shared: _Shared, options: RowOptions) -> Tensor:
        """0-dim (1 + mu eta_t) Delta_t / eta_t."""
        now, before = self._objective(shared), self._prev_loss(shared.loss)
        lr, mu = options.lr[0], options.weight_decay[0]
        moves = (lr > 0) & ~torch.isnan(before)
        known = (1 + mu * lr) * (before - now) / torch.where(lr > 0, lr, 1.0)
        return torch.where(torch.isfinite(now), torch.where(moves, known, 0.0), torch.nan)

    def _prev_loss(self, like: Tensor) -> Tensor:
        """0-dim f(x_{t-1}), nan before the first step that was not skipped."""
        before = self.param_groups[0].get(_PREV_LOSS)
        if isinstance(before, Tensor):
            return before.to(like)
        return torch.full_like(like, torch.nan if before is None else before)

    def _objective(self, shared: _Shared) -> Tensor:
        """f, the mean of the ranks' losses (negated with ``maximize``) plus the L2 penalty."""
        loss = shared.loss / shared.ranks
        return (-loss if self.param_groups[0]["maximize"] else loss) + shared.penalty

    def state_dict(self) -> dict[str, Any]:
        """Return the state as in torch.optim. f(x_{t-1}) of the exact gap is a float in the saved groups."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            if isinstance(group.get(_PREV_LOSS), Tensor):
                group[_PREV_LOSS] = float(group[_PREV_LOSS])
            elif self.loss_gap == "exact":
                group.setdefault(_PREV_LOSS, None)  # torch.distributed.checkpoint loads only keys that already exist
        return saved
