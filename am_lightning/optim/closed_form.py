"""Computes beta_t from the two sums of each row. All functions are pure and make no host sync.

A row is one logical parameter. Its sums are N = sum (d - (1 + k) g) (d / P + mu x) and D = sum (d - g)^2 / (P q), and
1 - beta_t = clip(N / D, 1 - cap, 1). See docs and Topollai and Choromanska, arXiv 2510.04988.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A larger ratio of learning rates would overflow float32 inside the sums, and leaves beta_t at a clamp anyway.
LARGEST_K = 1e18


class AdaptiveScalars(NamedTuple):
    """The numbers that every logical parameter keeps between steps, ``[rows]`` each. They are packed in this order.

    Attributes:
        step: the number of steps in which it took part.
        beta_prod: the product of its beta_t.
        beta: its last beta_t, -1 before its first step.
        prev_lr: eta_{t-1}.
    """

    step: Tensor
    beta_prod: Tensor
    beta: Tensor
    prev_lr: Tensor

    def advanced(self, decision: Decision, lr: Tensor) -> AdaptiveScalars:
        """Return the scalars after the step. Inactive rows keep theirs."""
        active, beta = decision.active, decision.beta
        return AdaptiveScalars(
            step=self.step + active,
            beta_prod=torch.where(active, self.beta_prod * beta, self.beta_prod),
            beta=torch.where(active, beta, self.beta),
            prev_lr=torch.where(active, lr, self.prev_lr),
        )


class RowOptions(NamedTuple):
    """Options that enter a step's coefficients: ``[rows]`` tensors, or one group's numbers as the user set them."""

    beta_max: Tensor
    lr: Tensor
    weight_decay: Tensor  # decoupled
    beta2: Tensor
    eps: Tensor
    lambd: Tensor


class Sums(NamedTuple):
    """The reduced sums, ``[rows]`` each: N, D, whether any rank has a gradient, and whether it is the first step."""

    num: Tensor
    den: Tensor
    present: Tensor
    first: Tensor

    @classmethod
    def unpack(cls, packed: Tensor) -> Sums:
        num, den, present, first = packed.unbind(1)
        return cls(num, den, present > 0, first > 0)


class Decision(NamedTuple):
    """The decision of a step. It is the same on every rank.

    Attributes:
        beta: ``[rows]``, beta_t; meaningless where ``active`` is False.
        omega: ``[rows]``, the weight of the gradient in d' = d + omega (g - d) / q.
        active: ``[rows]`` bool, whether the row takes part in this step.
        skipped: 0-dim bool, whether the whole step is skipped.
        bad: ``[rows]`` bool, whether a sum of the row is not finite.
    """

    beta: Tensor
    omega: Tensor
    active: Tensor
    skipped: Tensor
    bad: Tensor


def loss_gap_factor(lr: Tensor, prev_lr: Tensor, decay: Tensor) -> Tensor:
    """k = (1 + mu eta_t) eta_{t-1} / eta_t. It is 0 where eta_t = 0, which drops the loss gap."""
    safe = torch.where(lr > 0, lr, 1.0)
    return torch.where(lr > 0, (1 + decay * lr) * prev_lr / safe, 0.0).clamp(max=LARGEST_K)


def bias_correction(cap: Tensor, beta_prod: Tensor) -> Tensor:
    """c_t = 1 - cap * prod_{i<t} beta_i: the bias correction of a momentum that varies."""
    return 1 - cap * beta_prod


def coefficients(scalars: AdaptiveScalars, options: RowOptions, *, second_moment: bool) -> dict[str, Tensor]:
    """Compute the kernel coefficients that are known before the sums; see ``kernels.inputs.Coefficients``.

    Args:
        scalars: the adaptive scalars, ``[rows]`` each.
        options: the options, ``[rows]`` each.
        second_moment: True for P = c_t (sqrt(v' / (1 - beta2^t)) + eps), False for P = 1.
    """
    cap, lr, mu, beta2, eps, _ = options
    known = {
        "one_plus_k": 1 + loss_gap_factor(lr, scalars.prev_lr, mu),
        "lr": lr,
        "decay_factor": 1 - mu * lr,
        "step": scalars.step,
    }
    if second_moment:
        c = bias_correction(cap, scalars.beta_prod)
        known |= {"c_root": c / torch.sqrt(1 - beta2 ** (scalars.step + 1)), "c_eps": c * eps}
    return known


def scope_totals(values: Tensor, scope: str, sizes: Sequence[int]) -> Tensor:
    """Sum over each scope: ``[rows]`` -> ``[scopes]``.

    Args:
        values: one number per row, in the order of the groups.
        scope: "tensor", "group" or "global".
        sizes: the number of rows in each group.
    """
    if scope == "tensor":
        return values
    if scope == "global":
        return values.sum().reshape(1)
    return torch.stack([part.sum() for part in torch.split(values, list(sizes))])


def over_rows(totals: Tensor, scope: str, sizes: Sequence[int]) -> Tensor:
    """Give each row the number of its scope: ``[scopes]`` -> ``[rows]``."""
    if scope == "tensor":
        return totals
    if scope == "global":
        return totals.expand(sum(sizes))
    return torch.cat([total.expand(size) for total, size in zip(totals, sizes, strict=True)])


def decide(
    sums: Sums,
    *,
    cap: Tensor,
    lr: Tensor,
    scope: str,
    sizes: Sequence[int],
    first_takes_cap: bool,
    nonfinite: str,
    reduce_over_stages: Callable[[Tensor], Tensor] | None = None,
    loss_gap: Tensor | None = None,
    gradients: Tensor | None = None,
) -> Decision:
    """Compute beta_t of every row, and which rows take part in the step.

    Args:
        sums: the reduced sums.
        cap, lr: ``[rows]``, the cap of beta_t and eta_t.
        scope: "tensor", "group" or "global".
        sizes: the number of rows in each group.
        first_takes_cap: True uses the cap in a row's own first step (AM-AdamW), False its scope's beta (AM-SGD).
        nonfinite: "skip" skips the step, "propagate" uses the cap where a sum is not finite, as AdamW would.
        reduce_over_stages: a function that sums over pipeline stages; None if this rank has all rows.
        loss_gap: 0-dim (1 + mu eta_t) Delta_t / eta_t if the loss gap is known (scope "global"), else None.
        gradients: 0-dim, 0 if all gradients are zero. None uses D instead, which is valid if no decay is inside g.
    """
    bad = sums.present & ~(torch.isfinite(sums.num) & torch.isfinite(sums.den))
    if loss_gap is not None:
        bad = bad | (sums.present & ~torch.isfinite(loss_gap))
    enters = sums.present & ~sums.first & ~bad
    num, den, lost = torch.where(enters, sums.num, 0.0), torch.where(enters, sums.den, 0.0), bad.to(cap.dtype)
    if scope != "tensor":
        num, den, lost = (scope_totals(column, scope, sizes) for column in (num, den, lost))
    failed = bad.sum().to(cap.dtype)
    if reduce_over_stages is not None:
        num, den, lost, failed = _over_stages(reduce_over_stages, scope, num, den, lost, failed)
    skipped = failed > 0 if nonfinite == "skip" else torch.zeros_like(failed, dtype=torch.bool)
    if scope != "tensor":
        num, den, lost = (over_rows(total, scope, sizes) for total in (num, den, lost))
    if loss_gap is not None:
        num = num - loss_gap
    solved = den > 0
    beta = torch.where(solved, 1 - num / torch.where(solved, den, 1.0), 0.0).clamp(min=0)
    beta = torch.minimum(beta, cap)
    if nonfinite == "propagate":
        beta = torch.where(lost > 0, cap, beta)
    if first_takes_cap:
        beta = torch.where(sums.first, cap, beta)
    active = sums.present & ~skipped & ~_is_dcp_init_step(sums, lr, gradients)
    return Decision(beta, 1 - beta, active, skipped, bad)


def _over_stages(reduce: Callable[[Tensor], Tensor], scope: str, *totals: Tensor) -> tuple[Tensor, ...]:
    """Sum totals over all pipeline stages in one collective. With scope "tensor" a stage has its sums already."""
    shared = totals[-1:] if scope == "tensor" else totals
    sizes = [total.numel() for total in shared]
    summed = torch.split(reduce(torch.cat([total.reshape(-1) for total in shared])), sizes)
    return *totals[: len(totals) - len(shared)], *summed[:-1], summed[-1].reshape(())


def _is_dcp_init_step(sums: Sums, lr: Tensor, gradients: Tensor | None) -> Tensor:
    """``[rows]`` bool, whether this is the step that torch.distributed.checkpoint makes to initialise the state.

    That step has eta = 0 and zero gradients, and must leave no trace. A genuine first step at eta = 0 has gradients
    and counts.
    """
    return sums.first & (lr == 0) & ((sums.den.sum() if gradients is None else gradients) == 0)
