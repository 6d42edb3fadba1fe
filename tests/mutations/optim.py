"""Faults of the step: the sums, the closed form, the update, and every kernel."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_BASE = "am_lightning/optim/base.py"
_CLOSED_FORM = "am_lightning/optim/closed_form.py"
_ADAMW, _SGD = "am_lightning/optim/adamw.py", "am_lightning/optim/sgd.py"
_REFERENCE = "am_lightning/optim/kernels/single_tensor.py"
_FOREACH = "am_lightning/optim/kernels/foreach.py"
_PACKS = "am_lightning/optim/kernels/buckets.py"
_BLOCKED = "am_lightning/optim/kernels/cpu/chunked.py"
_LOOP = "am_lightning/optim/kernels/cpu/kernels.cpp"
_TABLES = "am_lightning/optim/kernels/triton/tables.py"
_PASSES = "am_lightning/optim/kernels/plan.py"

_EVERY_STEP = "tests/optim/test_every_step.py::test_float64"
_NONFINITE = "tests/optim/test_nonfinite.py"
_LOW = "tests/optim/test_low_precision_state.py"
_FUSED = "tests/optim/test_fused.py"

MUTATIONS = [
    # ------------------------------------------------------------------ the closed form
    Mutation(
        "the loss gap lacks the factor of the weight decay",
        _CLOSED_FORM,
        "(1 + decay * lr) * prev_lr / safe",
        "prev_lr / safe",
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "the loss gap is kept where eta is 0",
        _CLOSED_FORM,
        "return torch.where(lr > 0, (1 + decay * lr) * prev_lr / safe, 0.0).clamp(",
        "return ((1 + decay * lr) * prev_lr / safe).clamp(",
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "the bias correction lacks the cap of the first step",
        _CLOSED_FORM,
        "return 1 - cap * beta_prod",
        "return 1 - beta_prod",
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "beta is limited by the largest cap of all groups",
        _CLOSED_FORM,
        "beta = torch.minimum(beta, cap)",
        "beta = torch.minimum(beta, cap.max())",
        ("tests/generic/test_errors.py::test_cap_of_a_group", f"{_EVERY_STEP}[adamw-groups-global-None]"),
    ),
    Mutation(
        "beta may fall below 0",
        _CLOSED_FORM,
        "1 - num / torch.where(solved, den, 1.0), 0.0).clamp(min=0)",
        "1 - num / torch.where(solved, den, 1.0), 0.0)",
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "sums that are not finite are not detected",
        _CLOSED_FORM,
        "~(torch.isfinite(sums.num) & torch.isfinite(sums.den))",
        "torch.zeros_like(sums.present)",
        (f"{_NONFINITE}::test_skip_leaves_everything_bitwise_untouched[adamw-nan-tensor-None]",),
    ),
    Mutation(
        "a bad tensor is dropped alone, and the others make the step",
        _CLOSED_FORM,
        "sums.present & ~skipped & ~_phantom",
        "sums.present & ~bad & ~_phantom",
        (f"{_NONFINITE}::test_skip_leaves_everything_bitwise_untouched[adamw-nan-tensor-None]",),
    ),
    Mutation(
        "a tensor's first step adds to the sums of its scope",
        _CLOSED_FORM,
        "enters = sums.present & ~sums.first & ~bad",
        "enters = sums.present & ~bad",
        ("tests/optim/test_lifecycle.py::test_a_group_added_in_mid_run",),
    ),
    Mutation(
        "D == 0 gives the cap in place of 0",
        _CLOSED_FORM,
        "1 - num / torch.where(solved, den, 1.0), 0.0).clamp(min=0)",
        "1 - num / torch.where(solved, den, 1.0), 1.0).clamp(min=0)",
        ("tests/optim/test_every_step.py::test_zero_difference_gives_beta_zero",),
    ),
    Mutation(
        "the step that torch.distributed.checkpoint makes at lr 0 is counted",
        _CLOSED_FORM,
        "return sums.first & (lr == 0) &",
        "return sums.first & (lr < 0) &",
        ("tests/optim/test_adamw_checkpoints.py::test_phantom_step_leaves_no_trace",),
    ),
    Mutation(
        "a first step at lr 0 is not counted, though it has gradients",
        _CLOSED_FORM,
        "((sums.den.sum() if gradients is None else gradients) == 0)",
        "sums.den.sum().isfinite()",
        ("tests/optim/test_adamw_checkpoints.py::test_a_first_step_at_lr_zero_with_gradients_counts[tensor-None]",),
    ),
    Mutation(
        "propagate takes the cap in the bad tensor alone, not in its scope",
        _CLOSED_FORM,
        "torch.where(lost > 0, cap, beta)",
        "torch.where(bad, cap, beta)",
        (f"{_NONFINITE}::test_propagate_takes_the_cap_in_the_bad_scope_only",),
    ),
    # ------------------------------------------------------------------ the step
    Mutation(
        "weight decay makes weights grow",
        _BASE,
        '"shrink": 1 - mu * lr',
        '"shrink": 1 + mu * lr',
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "N is formed with k in place of 1 + k",
        _BASE,
        "gap = 1 + gap_factor(",
        "gap = gap_factor(",
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "a skipped step is counted",
        _BASE,
        '"step": scalars["step"] + counts',
        '"step": scalars["step"] + 1',
        (f"{_NONFINITE}::test_skip_leaves_everything_bitwise_untouched[adamw-nan-tensor-None]",),
    ),
    Mutation(
        "the product of betas takes in the cap in place of beta_t",
        _BASE,
        'scalars["beta_prod"] * beta',
        'scalars["beta_prod"] * scalars["cap"]',
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "the learning rate of the step before is not stored",
        _BASE,
        'torch.where(counts, scalars["lr"], scalars["prev_lr"])',
        'scalars["prev_lr"]',
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "the closure runs without gradients",
        _BASE,
        "with torch.enable_grad():",
        "with torch.no_grad():",
        ("tests/optim/test_lifecycle.py::test_closure_runs_first_with_gradients_enabled_and_its_value_is_returned",),
    ),
    Mutation(
        "zero_grad keeps the clipping that the next step was to do",
        _BASE,
        "self._workspace.gradient_clip = None\n        super().zero_grad",
        "super().zero_grad",
        ("tests/optim/test_clip.py::test_zero_grad_takes_clipping_in_the_step_back",),
    ),
    Mutation(
        "AM-AdamW's first step does not take the cap",
        _ADAMW,
        "first_takes_cap = True",
        "first_takes_cap = False",
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "the bias correction is that of a fixed momentum, cap ** t",
        _ADAMW,
        'bias_correction(scalars["cap"], scalars["beta_prod"])',
        'bias_correction(scalars["cap"], scalars["cap"] ** scalars["step"])',
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "the second moment's bias correction is one step behind",
        _ADAMW,
        'beta2 ** (scalars["step"] + 1)',
        'beta2 ** scalars["step"].clamp(min=1)',
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "eps is not bias-corrected",
        _ADAMW,
        '"floor": c * eps',
        '"floor": eps',
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "AM-SGD's first direction is g / (1 + lambda)",
        _SGD,
        "torch.where(sums.first, 1 + lambd, 1 - decision.beta)",
        "torch.where(sums.first, torch.ones_like(lambd), 1 - decision.beta)",
        (f"{_EVERY_STEP}[sgd-paper-tensor-None]",),
    ),
    Mutation(
        "the exact gap leaves out the L2 penalty",
        _SGD,
        'return (-loss if self.param_groups[0]["maximize"] else loss) + penalty',
        'return -loss if self.param_groups[0]["maximize"] else loss',
        ("tests/optim/test_exact_gap.py::test_every_step_equals_the_oracle[coupled-Logistic-None]",),
    ),
    Mutation(
        "a skipped step's loss becomes the previous loss of the exact gap",
        _SGD,
        "torch.where(decision.skipped, self._prev_loss(shared), self._objective(shared))",
        "self._objective(shared)",
        ("tests/optim/test_exact_gap.py::test_a_loss_that_is_not_finite_is_a_skipped_step",),
    ),
    # ------------------------------------------------------------------ kernels
    Mutation(
        "reference: lambda is dropped from q in D",
        _REFERENCE,
        "q = 1 + piece.options.lambd * metric\n        slope",
        "q = 1 + metric\n        slope",
        (f"{_EVERY_STEP}[adamw-paper-tensor-False]",),
    ),
    Mutation(
        "reference: D accumulates in the parameter's dtype",
        _REFERENCE,
        "den = ((d - g) * ((d - g) / (metric * q))).sum(dtype=accumulate)",
        "den = ((d - g) * ((d - g) / (metric * q))).to(piece.x.dtype).sum().to(accumulate)",
        ("tests/optim/test_layouts.py::test_low_precision[adamw-tensor-dtype1-False]",),
    ),
    Mutation(
        "reference: the weights move by the old direction",
        _REFERENCE,
        'd = d + n["omega"] * (g - d) / q\n        x = n["shrink"] * x - n["lr"] * d / metric',
        'x = n["shrink"] * x - n["lr"] * d / metric\n        d = d + n["omega"] * (g - d) / q',
        (f"{_EVERY_STEP}[adamw-paper-tensor-False]",),
    ),
    Mutation(
        "foreach: N takes the coupled decay for the decoupled one",
        _FOREACH,
        "slope.add_(bucket.pack([p.x for p in parts]).to(dtype), alpha=o.mu)",
        "slope.add_(bucket.pack([p.x for p in parts]).to(dtype), alpha=o.l2)",
        (f"{_EVERY_STEP}[adamw-paper-tensor-True]",),
    ),
    Mutation(
        "foreach: the number of blocks of a tensor is rounded down in the sums",
        _PACKS,
        "positions[owner] += range(total, total + count)",
        "positions[owner] += range(total, total + numel // block)",
        ("tests/optim/test_buckets.py::test_sums_over_very_many_blocks_are_those_of_plain_formulas",),
    ),
    Mutation(
        "foreach: the noise of rounding begins anew in every part",
        _PACKS,
        "starts += range(part.first, part.first + count * block, block)",
        "starts += range(0, count * block, block)",
        (f"{_LOW}::test_tiers_round_a_long_tensor_alike",),
    ),
    Mutation(
        "foreach: what is not kept is multiplied by 0, so that NaN is written",
        _FOREACH,
        "bucket.unpack(torch.where(keep, new.to(old.dtype), old, out=old), targets)",
        "bucket.unpack(old.add_((new.to(old.dtype) - old) * keep), targets)",
        (f"{_NONFINITE}::test_skip_leaves_everything_bitwise_untouched[adamw-nan-tensor-True]",),
    ),
    Mutation(
        "foreach: what fills up the blocks is summed",
        _PACKS,
        "torch._foreach_zero_(filling)",
        "torch._foreach_add_(filling, 1.0)",
        (f"{_EVERY_STEP}[adamw-paper-tensor-True]",),
    ),
    Mutation(
        "foreach: tensors are packed one by one, a launch for each",
        _PACKS,
        "torch._foreach_copy_(self._members_of(matrix, tensors), self._flats(tensors))",
        "[a.copy_(b) for a, b in zip(self._members_of(matrix, tensors), self._flats(tensors), strict=True)]",
        ("tests/optim/test_launches.py::test_a_step_takes_few_launches[adamw-float32]",),
    ),
    Mutation(
        "gradients are scaled by a number of another dtype, one launch a tensor",
        "am_lightning/optim/kernels/inputs.py",
        "moved(factor, same[0].device, same[0].dtype)",
        "moved(factor, same[0].device)",
        ("tests/optim/test_launches.py::test_clipping_takes_a_handful[float32]",),
    ),
    Mutation(
        "blocked: pass 1 writes the second moment",
        _BLOCKED,
        "torch.addcmul(c.v, c.g, c.g, value=rate, out=c.a)",
        "c.a.copy_(torch.addcmul(c.v, c.g, c.g, value=rate, out=c.v))",
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "blocked: beta2 is not under the root in the metric of pass 1",
        _BLOCKED,
        "_metric(c, piece, host, c.a, math.sqrt(beta2))",
        "_metric(c, piece, host, c.a, beta2)",
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "blocked: one accumulator runs over a whole chunk",
        _BLOCKED,
        "for a, b in zip(torch.split(left, SUM_BLOCK), torch.split(right, SUM_BLOCK), strict=True):\n"
        "        torch.dot(a, b, out=next(out))",
        "torch.dot(left[:SUM_BLOCK], right[:SUM_BLOCK], out=next(out))",
        ("tests/optim/test_layouts.py::test_longer_than_a_block[tensor-adamw-dtype0-None]",),
    ),
    Mutation(
        "blocked: every chunk has the noise of the first",
        _BLOCKED,
        "a, b, q, k * size)",
        "a, b, q, 0)",
        (f"{_LOW}::test_tiers_round_a_long_tensor_alike",),
    ),
    Mutation(
        "C++ loop: lambda is dropped from q",
        _LOOP,
        "q = 1 + k.lambd * P;",
        "q = 1 + P;",
        (f"{_FUSED}::test_float32_against_float64[tensor-plain-cpp]",),
    ),
    Mutation(
        "C++ loop: a tensor's sums are those of its last block",
        _LOOP,
        "out[2 * blocks[b].piece] += partial[2 * b];",
        "out[2 * blocks[b].piece] = partial[2 * b];",
        (f"{_FUSED}::test_float32_against_float64[tensor-plain-cpp]",),
    ),
    Mutation(
        "C++ loop: the update descends where it is to ascend",
        _LOOP,
        "C* x = tile<C, native>(piece.x, piece.x_kind, first, n, sx);\n    if (piece.maximize) g = negated(g, n, sg);",
        "C* x = tile<C, native>(piece.x, piece.x_kind, first, n, sx);",
        (f"{_FUSED}::test_float32_against_float64[tensor-maximize-cpp]",),
    ),
    Mutation(
        "C++ loop: tensors that do not count are written",
        _LOOP,
        "if (counts && !counts[pieces[p].row]) continue;",
        "(void)counts;",
        (f"{_FUSED}::test_a_step_that_is_not_finite_changes_nothing[nan-cpp]",),
    ),
    Mutation(
        "C++ loop: the noise of rounding is another tensor's",
        _LOOP,
        "uint32_t(piece.row + 1)",
        "uint32_t(piece.row)",
        (f"{_LOW}::test_tiers_round_alike",),
    ),
    Mutation(
        "Triton: options of the first step are used at every step",
        _TABLES,
        "if self._table is None or values != self._values:",
        "if self._table is None:",
        ("tests/optim/test_triton_pair.py::test_tables_follow_addresses_and_options",),
    ),
    Mutation(
        "Triton: lambda and mu are swapped in the table of options",
        _TABLES,
        "return [beta2, 1 - beta2, options.lambd, options.mu, sign]",
        "return [beta2, 1 - beta2, options.mu, options.lambd, sign]",
        ("tests/optim/test_triton_pair.py::test_options[maximize]",),
    ),
    Mutation(
        "Triton: tables are kept for every set of tensors that ever stepped",
        _TABLES,
        "while len(self._groups) > _KEPT_GROUPS:",
        "while len(self._groups) > 100 * _KEPT_GROUPS:",
        ("tests/optim/test_triton_steps.py::test_what_is_kept_is_bounded",),
    ),
    Mutation(
        "clipping in the step is left out by kernels that cannot do it in registers",
        _PASSES,
        "if name != TRITON for p in members",
        "if name == TRITON for p in members",
        ("tests/optim/test_clip.py::test_clipping_in_the_step_is_clipping_before_it[AMAdamW-{'foreach': None}]",),
    ),
    Mutation(
        "sums go to the first rows where some have no gradient",
        _PASSES,
        "out.index_copy_(0, self._workspace.constants.vector(here, device), pairs)",
        "out[: len(here)] = pairs",
        (f"{_EVERY_STEP}[adamw-paper-tensor-None]",),
    ),
    Mutation(
        "stochastic rounding makes a number of some NaN",
        "am_lightning/optim/kernels/rounding.py",
        "torch.where((bits & 0x7F800000) == 0x7F800000, y, rounded)",
        "torch.where(bits == 0, y, rounded)",
        (f"{_LOW}::test_nan_stays_nan_whatever_its_bits",),
    ),
    Mutation(
        "Triton is the default where its numbers are wrong",
        "am_lightning/optim/kernels/triton/check.py",
        "if not error <= limit]",
        "if error < 0]",
        ("tests/optim/test_fused_launch.py::test_where_triton_gives_wrong_numbers_the_default_is_another",),
    ),
    Mutation(
        "one of several layouts decides for itself whether Triton is the default",
        _PASSES,
        "self.why_not_triton = self.why_not_triton or why_not_triton",
        "self.why_not_triton = why_not_triton",
        ("tests/optim/test_fused_launch.py::test_a_rank_without_triton_decides_for_all",),
    ),
    Mutation(
        "ranks do not vote on the default",
        "am_lightning/optim/kernels/agreement.py",
        "summed if layout.reductions else None, asked",
        "None, asked",
        ("tests/sharding/test_fused.py::test_triton_is_the_default_on_all_ranks_or_none[ddp]",),
    ),
    Mutation(
        "rows' kernels: a first step enters the sums of its scope",
        "am_lightning/optim/kernels/triton/row_kernels.py",
        "enters = present & (first == 0) & (bad == 0)\n                nums",
        "enters = present & (bad == 0)\n                nums",
        ("tests/optim/test_triton_rows.py::test_beside_the_closed_form[global-skip]",),
    ),
    Mutation(
        "rows' kernels: a dropped step is counted",
        "am_lightning/optim/kernels/triton/row_kernels.py",
        "active = present & (skip == 0) &",
        "active = present &",
        ("tests/optim/test_triton_rows.py::test_beside_the_closed_form[tensor-skip]",),
    ),
    Mutation(
        "rows' kernels: a row that is reset by hand keeps its product of betas",
        "am_lightning/optim/kernels/triton_row_kernels.py",
        "tl.where(fresh, 1.0, beta_prod.to(tl.float64))",
        "beta_prod.to(tl.float64)",
        ("tests/optim/test_triton_rows.py::test_a_reset_by_hand_is_a_fresh_start",),
    ),
    Mutation(
        "Triton: a gradient at an odd place makes every access narrow",
        _TABLES,
        "aligned = at_g, at_d and at_v, at_x",
        "aligned = (at_g and at_d and at_v and at_x,) * 3",
        ("tests/optim/test_triton_ptx.py::test_a_tensor_at_an_odd_place_costs_its_own_access_alone[g]",),
    ),
]
