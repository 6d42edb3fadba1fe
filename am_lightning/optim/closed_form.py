"""From the two sums of each row to beta_t: pure functions of tensors, no host sync.

The sums of a row are N = sum (d - (1 + k) g) (d / P + mu x) and D = sum (d - g)^2 / (P q), and
1 - beta_t = clip(N / D, 1 - cap, 1). See docs and Topollai and Choromanska, arXiv 2510.04988.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A ratio of learning rates beyond this leaves beta_t at a clamp anyway, and would overflow float32 inside the sums.
LARGEST_K = 1e18


class AdaptiveScalars(NamedTuple):
    """What every logical parameter keeps from step to step, ``[rows]`` each, in this order wherever they are packed.

    Attributes:
        step: steps in which it took part.
        beta_prod: the product of its beta_t.
        beta: its last beta_t, -1 before its first.
        prev_lr: eta_{t-1}.
    """

    step: Tensor
    beta_prod: Tensor
    beta: Tensor
    prev_lr: Tensor

    def advanced(self, decision: Decision, lr: Tensor) -> AdaptiveScalars:
        """After the step: those of inactive rows stay."""
        active, beta = decision.active, decision.beta
        return AdaptiveScalars(
            step=self.step + active,
            beta_prod=torch.where(active, self.beta_prod * beta, self.beta_prod),
            beta=torch.where(active, beta, self.beta),
            prev_lr=torch.where(active, lr, self.prev_lr),
        )


class RowOptions(NamedTuple):
    """Options that enter a step's coefficients: ``[rows]`` of every row's group, or of one group as users give them."""

    beta_max: Tensor
    lr: Tensor
    weight_decay: Tensor  # decoupled
    beta2: Tensor
    eps: Tensor
    lambd: Tensor


class Sums(NamedTuple):
    """The reduced packed sums, each ``[rows]``: N, D, and whether any rank has a gradient / has its first step."""

    num: Tensor
    den: Tensor
    present: Tensor
    first: Tensor

    @classmethod
    def unpack(cls, packed: Tensor) -> Sums:
        num, den, present, first = packed.unbind(1)
        return cls(num, den, present > 0, first > 0)


class Decision(NamedTuple):
    """What a step does, the same on every rank.

    Attributes:
        beta: ``[rows]``, beta_t; meaningless where ``active`` is False.
        omega: ``[rows]``, the weight of the gradient in d' = d + omega (g - d) / q.
        active: ``[rows]`` bool, the row takes part in this step.
        skipped: 0-dim bool, the whole step is dropped.
        bad: ``[rows]`` bool, a sum of this row is not finite.
    """

    beta: Tensor
    omega: Tensor
    active: Tensor
    skipped: Tensor
    bad: Tensor


def loss_gap_factor(lr: Tensor, prev_lr: Tensor, decay: Tensor) -> Tensor:
    """k = (1 + mu eta_t) eta_{t-1} / eta_t, and 0 where eta_t = 0 (the loss gap is dropped)."""
    safe = torch.where(lr > 0, lr, 1.0)
    return torch.where(lr > 0, (1 + decay * lr) * prev_lr / safe, 0.0).clamp(max=LARGEST_K)


def bias_correction(cap: Tensor, beta_prod: Tensor) -> Tensor:
    """c_t = 1 - cap * prod_{i<t} beta_i: the bias correction of a momentum that varies."""
    return 1 - cap * beta_prod


def coefficients(scalars: AdaptiveScalars, options: RowOptions, *, second_moment: bool) -> dict[str, Tensor]:
    """What the kernels multiply a row by, as far as it is known before the sums; see ``kernels.inputs.Coefficients``.

    Args:
        options: ``[rows]`` each.
        second_moment: P = c_t (sqrt(v' / (1 - beta2^t)) + eps); False: P = 1.
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
    """``[rows]`` -> ``[scopes]``: the sum over each scope.

    Args:
        values: one number for each row, rows in the order of the groups.
        scope: "tensor", "group" or "global".
        sizes: rows in each group.
    """
    if scope == "tensor":
        return values
    if scope == "global":
        return values.sum().reshape(1)
    return torch.stack([part.sum() for part in torch.split(values, list(sizes))])


def over_rows(totals: Tensor, scope: str, sizes: Sequence[int]) -> Tensor:
    """``[scopes]`` -> ``[rows]``: each row gets the number of its scope."""
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
    """beta_t of every row, and which rows take part.

    Args:
        sums: reduced sums.
        cap, lr: ``[rows]``, the cap of beta_t and eta_t.
        first_takes_cap: a row's own first step uses the cap (AM-AdamW) or its scope's beta (AM-SGD).
        nonfinite: "skip" drops the step, "propagate" takes the cap where a sum is not finite, as AdamW would.
        reduce_over_stages: sums over the stages of a pipeline, whose rows are elsewhere; None: all rows are here.
        loss_gap: 0-dim, (1 + mu eta_t) Delta_t / eta_t where the loss gap is known (scope global), else None.
        gradients: 0-dim, 0 where all gradients are zero; None: D of first steps says it (no decay inside g).
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
    """The totals of all pipeline stages, in one collective; a tensor's own sums are whole on its stage."""
    shared = totals[-1:] if scope == "tensor" else totals
    sizes = [total.numel() for total in shared]
    summed = torch.split(reduce(torch.cat([total.reshape(-1) for total in shared])), sizes)
    return *totals[: len(totals) - len(shared)], *summed[:-1], summed[-1].reshape(())


def _is_dcp_init_step(sums: Sums, lr: Tensor, gradients: Tensor | None) -> Tensor:
    """``[rows]`` bool: the step that torch.distributed.checkpoint makes on a fresh optimizer: eta = 0, zero gradients.

    It must leave no trace; a genuine first step at eta = 0 has gradients and counts.
    """
    return sums.first & (lr == 0) & ((sums.den.sum() if gradients is None else gradients) == 0)
