# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels of the scalar work on rows, in float64, which compute the same as ``closed_form``.

``columns`` is ``[7, rows]``: cap, lr, 1 + k, c_t / sqrt(1 - beta2^t), c_t eps, 1 - mu eta_t, steps before this one.
``table`` is ``[4, rows]``: the float32 states step, beta_prod, beta, prev_lr.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _before(step, beta_prod, prev_lr):
    """Reset rows whose ``step`` is 0, as ``state_store._restarted`` does."""
    fresh = step == 0
    return tl.where(fresh, 1.0, beta_prod.to(tl.float64)), tl.where(fresh, 0.0, prev_lr.to(tl.float64))


@triton.jit
def coefficients_kernel(
    table, options, group_of, present, norm, columns, tail, scale, rows,
    LARGEST_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the coefficients before the sums, and ``tail``, ``[rows, 2]``, present and first.

    ``options`` has cap, lr, mu, beta2, eps of every group, then max_norm; the factor of clipping goes to ``scale``.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = o < rows
    group = options + 1 + 5 * tl.load(group_of + o, inside, 0)
    cap, lr, mu = tl.load(group, inside, 0.0), tl.load(group + 1, inside, 0.0), tl.load(group + 2, inside, 0.0)
    beta2, eps = tl.load(group + 3, inside, 0.5), tl.load(group + 4, inside, 0.0)
    step = tl.load(table + o, inside, 0.0).to(tl.float64)
    product, lr_before = tl.load(table + rows + o, inside, 1.0), tl.load(table + 3 * rows + o, inside, 0.0)
    beta_prod, prev_lr = _before(step, product, lr_before)
    k = tl.where(lr > 0, (1 + mu * lr) * prev_lr / tl.where(lr > 0, lr, 1.0), 0.0)
    c = 1 - cap * beta_prod
    power = tl.exp(tl.log(beta2) * (step + 1))  # beta2^t; beta2 = 0 gives exp(-inf)
    tl.store(columns + o, cap, inside)
    tl.store(columns + rows + o, lr, inside)
    tl.store(columns + 2 * rows + o, 1 + tl.minimum(k, tl.full((), LARGEST_K, tl.float64)), inside)
    tl.store(columns + 3 * rows + o, c / tl.sqrt(1 - power), inside)
    tl.store(columns + 4 * rows + o, c * eps, inside)
    tl.store(columns + 5 * rows + o, 1 - mu * lr, inside)
    tl.store(columns + 6 * rows + o, step, inside)
    here = tl.load(present + o, inside, 0.0)
    tl.store(tail + 2 * o, here, inside)
    tl.store(tail + 2 * o + 1, here * (step == 0).to(tl.float64), inside)
    if norm is not None:
        factor = tl.load(options) / (tl.load(norm).to(tl.float64) + tl.full((), 1e-6, tl.float64))
        tl.store(scale, tl.where(factor > 1, 1.0, factor))  # nan stays


@triton.jit
def _read(packed, o, inside):
    """Return N, D, whether there is a gradient, whether it is the row's first, and whether a sum is not finite."""
    num, den = tl.load(packed + 4 * o, inside, 0.0), tl.load(packed + 4 * o + 1, inside, 0.0)
    present = tl.load(packed + 4 * o + 2, inside, 0.0) > 0
    first = tl.load(packed + 4 * o + 3, inside, 0.0) > 0
    bad = present & ((num - num != 0) | (den - den != 0))  # inf - inf is nan, and so is nan - nan
    return num, den, present, first, bad


@triton.jit
def _count(tally, rows, o, beta, cap, kept):
    """Add a step to the tally, as ``BetaTally.add`` does."""
    at_max, at_zero = (beta == cap).to(tl.float64), (beta == 0).to(tl.float64)
    tl.store(tally + o, tl.load(tally + o, kept, 0.0) + beta, kept)
    tl.store(tally + rows + o, tl.load(tally + rows + o, kept, 0.0) + at_max, kept)
    tl.store(tally + 2 * rows + o, tl.load(tally + 2 * rows + o, kept, 0.0) + at_zero, kept)
    tl.store(tally + 3 * rows + o, tl.load(tally + 3 * rows + o, kept, 0.0) + 1, kept)
    tl.store(tally + 4 * rows + o, tl.minimum(tl.load(tally + 4 * rows + o, kept, 0.0), beta), kept)
    tl.store(tally + 5 * rows + o, tl.maximum(tl.load(tally + 5 * rows + o, kept, 0.0), beta), kept)


@triton.jit
def decide_kernel(
    packed, columns, table, bounds, omega, active, record, skipped, tally, rows, scopes,
    SHARED: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute 1 - beta_t, the active rows, their new states and the record after the sums, in one program.

    Args:
        packed: ``[rows, 4]``, the reduced N, D, present, first.
        bounds: ``[scopes + 1]``, first row of each scope. With ``SHARED`` the rows of a scope share one N and D.
        record: int64, skipped steps, consecutive ones, first bad row of the last, consecutive ones before this step.
        tally: ``[6, rows]``, the numbers of a ``BetaTally``.
    """
    lanes = tl.arange(0, BLOCK)
    failed = tl.zeros((BLOCK,), tl.int32)
    bad_row = tl.zeros((BLOCK,), tl.int32) + rows
    weight = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, rows, BLOCK):
        o = i + lanes
        _, den, _, _, bad = _read(packed, o, o < rows)
        failed += bad.to(tl.int32)
        bad_row = tl.minimum(bad_row, tl.where(bad, o, rows))
        weight += den
    skip = tl.zeros_like(failed) + tl.sum(failed, 0) > (0 if SKIP else rows)
    still = tl.zeros_like(weight) + tl.sum(weight, 0) == 0  # no gradients and eta = 0: a step that loads a checkpoint
    for s in range(scopes):
        begin, end = tl.load(bounds + s), tl.load(bounds + s + 1)
        nums, dens = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
        lost = tl.zeros((BLOCK,), tl.int32)
        if SHARED:
            for i in range(begin, end, BLOCK):
                o = i + lanes
                num, den, present, first, bad = _read(packed, o, o < end)
                enters = present & (first == 0) & (bad == 0)
                nums += tl.where(enters, num, 0.0)
                dens += tl.where(enters, den, 0.0)
                lost += bad.to(tl.int32)
            nums, dens = tl.sum(nums, 0) + tl.zeros_like(nums), tl.sum(dens, 0) + tl.zeros_like(dens)
            lost = tl.sum(lost, 0) + tl.zeros_like(lost)
        for i in range(begin, end, BLOCK):
            o = i + lanes
            inside = o < end
            num, den, present, first, bad = _read(packed, o, inside)
            if SHARED:
                num, den = nums, dens
            else:
                enters = present & (first == 0) & (bad == 0)
                num, den, lost = tl.where(enters, num, 0.0), tl.where(enters, den, 0.0), bad.to(tl.int32)
            cap, lr = tl.load(columns + o, inside, 0.0), tl.load(columns + rows + o, inside, 0.0)
            solved = den > 0
            beta = tl.where(solved, 1 - num / tl.where(solved, den, 1.0), 0.0)
            beta = tl.minimum(tl.maximum(beta, 0.0), cap)
            if not SKIP:
                beta = tl.where(lost > 0, cap, beta)
            beta = tl.where(first, cap, beta)
            takes_part = present & (skip == 0) & ((first & (lr == 0) & still) == 0)
            tl.store(omega + o, 1 - beta, inside)
            tl.store(active + o, takes_part.to(tl.uint8), inside)
            kept = inside & takes_part
            step = tl.load(table + o, kept, 0.0)
            beta_prod, _ = _before(step, tl.load(table + rows + o, kept, 0.0), beta)
            tl.store(table + o, step + 1, kept)
            tl.store(table + rows + o, (beta_prod * beta).to(tl.float32), kept)
            tl.store(table + 2 * rows + o, beta.to(tl.float32), kept)
            tl.store(table + 3 * rows + o, lr.to(tl.float32), kept)
            _count(tally, rows, o, beta, cap, kept)
    now = tl.max(skip.to(tl.int64), 0)
    run = tl.load(record + 1)
    tl.store(record, tl.load(record) + now)
    tl.store(record + 1, (run + 1) * now)
    tl.store(record + 2, now * tl.min(bad_row, 0) + (1 - now) * tl.load(record + 2))
    tl.store(record + 3, run)
    tl.store(skipped, now.to(tl.uint8))
