"""Functions that a process with TRITON_INTERPRET=1 runs: the kernels of the per-row scalars beside ``closed_form``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from am_lightning import AMAdamW
from am_lightning.optim import base
from am_lightning.optim.closed_form import Sums, bias_correction, decide, loss_gap_factor
from am_lightning.optim.kernels.inputs import GradientClip
from am_lightning.optim.kernels.triton.row_launch import RowKernels
from am_lightning.optim.step_stats import BetaTally, StepStats
from tests.optim import interpreted_steps
from tests.optim.harness import assert_bitwise, params_of, snapshot

CPU, F64 = torch.device("cpu"), torch.float64
SIZES = [[1], [3, 2], [7, 0, 5], [600, 20]]  # the last is more than one block


class Random:
    """Rows in the middle of a run: absent ones, first steps, sums that are not finite, D = 0, eta = 0."""

    def __init__(self, sizes: list[int], seed: int, *, bad: bool, phantom: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = sum(sizes)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=F64)

        groups = uniform(len(sizes), 5)
        groups[:, 2] *= 0.3
        groups[:, 3] = 0.9 + 0.0999 * groups[:, 3]
        groups[:, 4] *= 1e-6
        groups[0, 1] = 0.0 if phantom or seed % 3 == 0 else groups[0, 1]
        groups[0, 3] = 0.0 if seed % 4 == 1 else groups[0, 3]
        self.options = groups.tolist()
        cap, lr, mu, beta2, eps = torch.repeat_interleave(groups, torch.tensor(sizes), 0).unbind(1)
        self.cap, self.lr, self.mu, self.beta2, self.eps = cap, lr, mu, beta2, eps
        step = (uniform(rows) * (1 if phantom else 300)).floor()
        step[uniform(rows) < 0.2] = 0.0  # reset by hand: the other scalars must not be read
        self.table = torch.stack([step, uniform(rows), uniform(rows), uniform(rows) * 0.1]).to(torch.float32)
        self.present = (uniform(rows) < 0.8).to(F64)
        num, den = uniform(rows) - 0.3, uniform(rows)
        den[uniform(rows) < 0.1] = 0.0
        if phantom:
            num, den = torch.zeros(rows, dtype=F64), torch.zeros(rows, dtype=F64)
        if bad:
            num[int(rows * 0.6)], den[rows // 2] = float("nan"), float("inf")
        self.sums = torch.stack([num, den], 1) * self.present[:, None]

    def before(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the steps, product of betas and last learning rate, which a row without a step does not have."""
        step, beta_prod, _, prev_lr = self.table.to(F64)
        return step, torch.where(step == 0, 1.0, beta_prod), torch.where(step == 0, 0.0, prev_lr)

    def numbers(self) -> dict[str, Tensor]:
        step, beta_prod, prev_lr = self.before()
        c = bias_correction(self.cap, beta_prod)
        return {
            "cap": self.cap,
            "lr": self.lr,
            "one_plus_k": 1 + loss_gap_factor(self.lr, prev_lr, self.mu),
            "c_root": c / torch.sqrt(1 - self.beta2 ** (step + 1)),
            "c_eps": c * self.eps,
            "decay_factor": 1 - self.mu * self.lr,
            "step": step,
        }


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14, equal_nan=True)


def beside_closed_form(scope: str, nonfinite: str) -> None:
    """Compare coefficients, beta_t, active rows, states and the record over consecutive cases."""
    active = skips = 0
    for sizes in SIZES:
        kernels, record, ours = RowKernels(sizes, scope, CPU), StepStats(), StepStats()
        names = tuple(map(str, range(sum(sizes))))
        tally, theirs = (BetaTally(names, torch.empty(0, dtype=F64)) for _ in range(2))
        for seed in range(8):
            case = Random(sizes, seed, bad=seed % 4 == 3, phantom=seed == 5)
            norm = torch.tensor(2.0 + seed, dtype=F64)
            clip = GradientClip(norm, 4.5) if seed % 2 else None
            found = kernels.coefficients(case.table, case.options, case.present, clip)
            assert (found.factor is None) == (clip is None)
            if clip is not None and found.factor is not None:
                close(found.factor, clip.factor())
            for name, expected in case.numbers().items():
                close(found.coefficients[name], expected)
            first = case.present * (case.table[0] == 0)
            assert torch.equal(found.tail, torch.stack([case.present, first], 1))
            packed = torch.cat([case.sums, found.tail], 1)
            expected = decide(
                Sums.unpack(packed), cap=case.cap, lr=case.lr, scope=scope, sizes=sizes,
                first_takes_cap=True, nonfinite=nonfinite,
            )  # fmt: skip
            before, product = case.table.clone(), case.before()[1]
            omega, counts = kernels.decide(
                packed, found.columns, case.table, *ours.buffers(CPU), theirs.numbers, skip=nonfinite == "skip"
            )
            assert torch.equal(counts, expected.active)
            close(torch.where(counts, omega, 0.0), torch.where(counts, 1 - expected.beta, 0.0))
            new = torch.stack([before[0] + 1, product * expected.beta, expected.beta, case.lr]).to(torch.float32)
            kept = torch.where(counts, new, before)
            torch.testing.assert_close(case.table, kept, rtol=2e-7, atol=1e-9)
            assert torch.equal(case.table[:, ~counts], before[:, ~counts])
            record.observe(expected, case.cap, tally)
            close(theirs.numbers, tally.numbers)
            assert torch.equal(ours._counts, record._counts) and torch.equal(ours.skipped, record.skipped)
            active, skips = active + int(counts.sum()), skips + int(expected.skipped)
    assert active and (skips > 0) == (nonfinite == "skip")


def one_norm_is_clipped() -> None:
    """Clip norms that are above, below, infinite, zero and nan."""
    kernels, table = RowKernels([1], "tensor", CPU), torch.zeros(4, 1)
    for norm, max_norm in ((4.0, 1.0), (0.5, 1.0), (3.0, float("inf")), (0.0, 0.0), (float("nan"), 1.0), (9.0, 0.1)):
        clip = GradientClip(torch.tensor(norm, dtype=F64), max_norm)
        found = kernels.coefficients(table, [[0.9, 0.1, 0.0, 0.99, 1e-8]], torch.ones(1, dtype=F64), clip)
        assert found.factor is not None
        torch.testing.assert_close(found.factor, clip.factor(), rtol=0, atol=0, equal_nan=True)


def train(optimizer: AMAdamW, lr: Any) -> None:
    """Make five steps with a first gradient that comes late, one sum that is not finite, and a rate of zero."""
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params_of(optimizer)):
            grad = (torch.randn(p.shape, generator=generator) + 0.5 * p.detach().float()).to(p.dtype)
            p.grad = None if i == 1 and step < 2 else grad
        if step == 3:
            params_of(optimizer)[0].grad.view(-1)[0] = float("nan")
        rate = 0.0 if step == 2 else 0.05 / (1 + step)
        for group in optimizer.param_groups:
            if isinstance(lr, Tensor):
                lr.fill_(rate)
            else:
                group["lr"] = rate
        optimizer.step()


def whole_steps(scope: str, nonfinite: str, tensor_lr: bool) -> None:
    """Run with and without these kernels, also while some states are missing; the steps and reports are the same."""
    options: dict[str, Any] = {"scope": scope, "nonfinite": nonfinite, "capturable": tensor_lr, "fused": True}
    runs = []
    for in_kernels in (True, False):
        lr = torch.tensor(0.05) if tensor_lr else 0.05
        optimizer = interpreted_steps.make(interpreted_steps.two_groups(), lr=lr, **options)
        with pytest.MonkeyPatch.context() as patch:
            if not in_kernels:
                patch.setattr(base, "row_kernels", lambda *arguments: None)
            train(optimizer, lr)
        runs.append(optimizer)
    ours, plain = runs
    assert bool(ours.last_step_skipped) == bool(plain.last_step_skipped)
    torch.testing.assert_close(ours.report(), plain.report(), rtol=1e-6, atol=1e-7, equal_nan=True)
    for a, b in zip(snapshot(ours), snapshot(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)


def the_same_bits_with_and_without_missing_states() -> None:
    """A rank may lack the state of a tensor of which it holds nothing; beta_t of all other tensors must not change."""
    runs = []
    for spare in (False, True):
        groups = interpreted_steps.two_groups()
        if spare:
            groups.append({"params": [("spare", torch.nn.Parameter(torch.ones(3)))]})
        optimizer = interpreted_steps.make(groups, lr=0.05, scope="global", fused=True)
        for step in range(3):
            for p in params_of(optimizer)[:5]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype)
            optimizer.step()
        runs.append(optimizer)
    kept = snapshot(runs[0])
    assert_bitwise(kept, snapshot(runs[1])[: len(kept)])


def a_reset_by_hand_is_a_fresh_start() -> None:
    """Reset one tensor, two and all of them in place: the next steps are those of the other kernels."""
    for chosen in ([0], [1, 4], range(5)):
        pair = []
        for more in ({"fused": True}, {"fused": False, "foreach": False}):
            optimizer = interpreted_steps.make(interpreted_steps.two_groups(), lr=0.05, **more)
            interpreted_steps._train(optimizer, 6)
            for i in chosen:
                state = optimizer.state[params_of(optimizer)[i]]
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    state[key].zero_()
            interpreted_steps._train(optimizer, 3, start=6)
            pair.append(optimizer)
        assert "Triton for 5" in pair[0].describe(), pair[0].describe()
        for a, b in zip(*map(snapshot, pair), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6, equal_nan=True)
