"""Faults of what an optimizer keeps, loads, converts, clips, records and refuses."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_STATE = "am_lightning/optim/param_state.py"
_LOADABLE = "am_lightning/optim/state_dict_checks.py"
_SCALARS = "am_lightning/optim/state_store.py"
_BASE = "am_lightning/optim/base.py"
_PERSISTENCE = "am_lightning/optim/state_store.py"
_CONVERT = "am_lightning/optim/convert.py"
_RECORD = "am_lightning/optim/step_stats.py"
_VALIDATION = "am_lightning/optim/validation.py"
_FACTORY = "am_lightning/optim/param_groups.py"
_SGD = "am_lightning/optim/sgd.py"

_LOADING = "tests/optim/test_loading.py"
_MUTATED = "tests/optim/test_mutated.py"
_ADAMW = "tests/optim/test_adamw_checkpoints.py"
_RESUME = "tests/optim/test_resume.py"
_LOW = "tests/optim/test_low_precision_state.py"
_LIFECYCLE = "tests/optim/test_lifecycle.py"
_SAVED = "tests/checkpoints/test_saved.py"

MUTATIONS = [
    Mutation(
        "the last loss has another name in checkpoints, when saved and when loaded",
        _SGD,
        '_PREV_LOSS = "prev_loss"',
        '_PREV_LOSS = "last_loss"',
        (f"{_SAVED}::test_state_dict[sgd_exact]",),
    ),
    Mutation(
        "the table of flat partitions' scalars has another name in checkpoints, when saved and when loaded",
        _STATE,
        'TABLE, OPTIONS = "am_table"',
        'TABLE, OPTIONS = "am_scalars"',
        (f"{_SAVED}::test_deepspeed[zero1]",),
    ),
    Mutation(
        "a parameter that has never stepped has beta -1 in momentum()",
        _SCALARS,
        'return betas.masked_fill(~(betas >= 0), float("nan"))',
        "return betas",
        (f"{_LIFECYCLE}::test_momentum_before_the_first_step_is_nan",),
    ),
    Mutation(
        "states that others put in place of the packed ones are not read",
        "am_lightning/optim/state_store.py",
        "self._packed is not None and all(map(is_, values, self._packed.views)):",
        "self._packed is not None and values:",
        (f"{_LOADING}::test_a_state_that_somebody_replaces_is_read",),
    ),
    Mutation(
        "adaptive scalars have the parameter's dtype",
        _STATE,
        "return torch.float64 if param.dtype == torch.float64 else torch.float32",
        "return param.dtype",
        (f"{_ADAMW}::test_bfloat16_adamw_state_gets_wide_scalars",),
    ),
    Mutation(
        "exp_avg_dtype changes the direction of 16-bit and float64 parameters, too",
        _STATE,
        "if wanted is not None and param.dtype == torch.float32 else",
        "if wanted is not None else",
        (f"{_LOW}::test_other_dtypes_of_parameters_keep_theirs",),
    ),
    Mutation(
        "an AdamW checkpoint's momentum is assumed to have decayed by the cap",
        _STATE,
        'torch.pow(float(beta1), state["step"]',
        'torch.pow(float(cap), state["step"]',
        (f"{_ADAMW}::test_adamw_state_loads_mid_run[tensor-0.5-None]",),
    ),
    Mutation(
        "eta_{t-1} of an AdamW checkpoint is 0",
        _STATE,
        'state["prev_lr"] = _scalar(lr, param)',
        'state["prev_lr"] = _scalar(0.0, param)',
        (f"{_ADAMW}::test_adamw_state_loads_mid_run[tensor-0.5-None]",),
    ),
    Mutation(
        "the cap comes from the checkpoint",
        _STATE,
        "group[cap_key] = live[cap_key]",
        "group.setdefault(cap_key, live[cap_key])",
        (f"{_LOADING}::test_the_cap_of_a_checkpoint_is_not_taken",),
    ),
    Mutation(
        "loaded scalars are rounded to the parameter's dtype",
        _STATE,
        "state[key] = _scalar(saved[key], param)",
        "state[key] = _scalar(saved[key].to(param.dtype), param)",
        (f"{_RESUME}::test_state_dict_resumes_bitwise[adamw-bfloat16-tensor-True-4]",),
    ),
    Mutation(
        "a checkpoint with only some of the adaptive scalars is accepted",
        _LOADABLE,
        "if missing and len(missing) < len(SCALARS):",
        "if missing and len(missing) > len(SCALARS):",
        (f"{_LOADING}::test_scalars_that_are_partly_missing_are_refused",),
    ),
    Mutation(
        "moments of another shape are accepted if the number of elements fits",
        _LOADABLE,
        "if value.shape != param.shape:",
        "if value.numel() != param.numel():",
        (f"{_LOADING}::test_moments_of_another_shape_are_refused_though_they_have_as_many_elements",),
    ),
    Mutation(
        "moments that are not finite are loaded where no step could be made with them",
        _LOADABLE,
        "if expected.finite:",
        "if not expected.finite:",
        (f"{_MUTATED}::test_what_would_fail_or_poison_the_next_step_is_named",),
    ),
    Mutation(
        "a number that is out of its range is loaded",
        _LOADABLE,
        "if number is None or not fits(number):",
        "if number is None:",
        (f"{_MUTATED}::test_what_would_fail_or_poison_the_next_step_is_named",),
    ),
    Mutation(
        "states under other keys than the groups list are lost",
        _LOADABLE,
        "if unlisted and lacking:",
        "if lacking and not unlisted:",
        (f"{_MUTATED}::test_keys_that_became_strings_are_refused",),
    ),
    Mutation(
        "one id in a checkpoint is two parameters",
        _LOADABLE,
        "if params[first] is not params[place]:",
        "if params[first] is None:",
        (f"{_MUTATED}::test_one_id_for_two_parameters_is_refused",),
    ),
    Mutation(
        "a load that fails in the middle leaves the new state",
        "am_lightning/optim/checkpointing.py",
        "one.__dict__.update(attributes)",
        "del attributes",
        (f"{_MUTATED}::test_a_load_that_fails_in_the_middle_changes_nothing",),
    ),
    Mutation(
        "options that were changed by hand are not checked",
        _BASE,
        "self._check_group(group_checks.as_unread(group, self.cap_key))",
        "group_checks.as_unread(group, self.cap_key)",
        (f"{_MUTATED}::test_a_step_names_the_group_and_its_option_before_it_moves",),
    ),
    Mutation(
        "a step that was set to a plain number raises no clear error",
        "am_lightning/optim/state_store.py",
        "if not isinstance(value, Tensor) or value.numel() != 1:",
        "if isinstance(value, bool):",
        ("tests/optim/test_state_replaced.py::test_a_step_that_is_no_tensor_is_named",),
    ),
    Mutation(
        "an optimizer that is reset by hand keeps its product of betas",
        "am_lightning/optim/state_store.py",
        'scalars.beta_prod.masked_fill(fresh, DEFAULTS["beta_prod"])',
        "scalars.beta_prod",
        ("tests/optim/test_state_replaced.py::test_a_reset_by_hand_is_a_fresh_start",),
    ),
    Mutation(
        "a learning rate a hair below zero ends a run",
        "am_lightning/optim/group_checks.py",
        '{**group, "lr": -lr} if isinstance(lr, Real) and lr < 0 else group',
        "group",
        (f"{_MUTATED}::test_the_last_lr_of_a_schedule_may_be_below_zero",),
    ),
    Mutation(
        "the direction is loaded in the parameter's dtype",
        "am_lightning/optim/checkpointing.py",
        "state[d] = state[d].to(param_state.direction_dtype(param, optimizer.exp_avg_dtype))",
        "state[d] = state[d].to(param.dtype)",
        (f"{_LOW}::test_checkpoints_of_adamw_and_of_both_dtypes_load",),
    ),
    Mutation(
        "a checkpoint's options are not checked before it is loaded",
        "am_lightning/optim/checkpointing.py",
        "optimizer._check_group(group_checks.with_any_lr(trial))",
        "del trial['lr']",
        ("tests/optim/test_mutated.py::test_mutated_state_dicts[0]",),
    ),
    Mutation(
        "names that the user gave are lost in a copy",
        "am_lightning/optim/checkpointing.py",
        "if known else state",
        "if not known else state",
        (f"{_LOADING}::test_names_survive_a_copy",),
    ),
    Mutation(
        "an option of the whole optimizer is accepted in a group",
        "am_lightning/optim/group_checks.py",
        "getattr(optimizer, name, ...) or not called_by_zero_redundancy():",
        "getattr(optimizer, name, ...) and not called_by_zero_redundancy():",
        ("tests/generic/test_errors.py::test_an_option_of_the_whole_optimizer_is_refused_in_a_group",),
    ),
    Mutation(
        "a copy of AMSGD forgets that its loss gap is exact",
        "am_lightning/optim/sgd.py",
        'plain_attributes = ("scope", "nonfinite", "loss_gap")',
        'plain_attributes = ("scope", "nonfinite")',
        ("tests/generic/test_state.py::test_deepcopy_and_pickle_keep_all_public_attributes",),
    ),
    Mutation(
        "the default cap may be below 0",
        _CONVERT,
        "return max(0.0, beta1 - (1 - beta1) * lambd)",
        "return beta1 - (1 - beta1) * lambd",
        ("tests/lightning/test_conversion.py::test_default_cap_is_not_below_zero",),
    ),
    Mutation(
        "the conversion forgets the user's beta2",
        _CONVERT,
        'group["betas"] = (cap, float(group["betas"][1]))',
        'group["betas"] = (cap, 0.999)',
        ("tests/lightning/test_conversion.py::test_schedulers_drive_the_converted_optimizer[LambdaLR]",),
    ),
    Mutation(
        "the cap becomes the value that a cycling scheduler writes into betas[0]",
        _CONVERT,
        '    return own if cycled else group["betas"][0]\n',
        '    return group["betas"][0]\n',
        ("tests/lightning/test_conversion.py::test_a_cycling_scheduler_does_not_set_the_cap",),
    ),
    Mutation(
        "a converted AdamW still asks GradScaler not to unscale",
        _CONVERT,
        'optimizer.__dict__.pop("_step_supports_amp_scaling", None)  # GradScaler',
        'optimizer.__dict__.get("_step_supports_amp_scaling", None)  # GradScaler',
        ("tests/lightning/test_lifecycle.py::test_gradscaler_unscales_before_a_converted_fused_adamw",),
    ),
    Mutation(
        "small gradients are scaled up to the norm",
        "am_lightning/optim/kernels/inputs.py",
        "(self.max_norm / (self.norm + 1e-6)).clamp(max=1.0)",
        "(self.max_norm / (self.norm + 1e-6)).clamp(max=1e6)",
        ("tests/optim/test_clip.py::test_norm_and_scaled_gradients_are_torchs[1000.0-AMAdamW]",),
    ),
    Mutation(
        "the norm of a 16-bit gradient is summed in 16 bits",
        "am_lightning/optim/squares.py",
        "block.to(like.device, like.dtype).square().sum() for",
        "block.square().sum().to(like.device, like.dtype) for",
        ("tests/optim/test_clip.py::test_low_precision_norm_is_summed_in_float32",),
    ),
    Mutation(
        "a good step does not reset the count of consecutive skipped steps",
        _RECORD,
        "run.copy_((run_before + 1) * now)",
        "run.copy_(run_before + now)",
        ("tests/optim/test_nonfinite.py::test_skipped_steps_are_counted_in_all_and_in_a_row[adamw]",),
    ),
    Mutation(
        "the warning of a skipped step names a tensor whose sum was finite",
        _RECORD,
        "first_bad = decision.bad.to(torch.int64).argmax()",
        "first_bad = decision.bad.to(torch.int64).argmin()",
        ("tests/lightning/test_callback.py::test_skipped_steps_are_counted_and_warned_about",),
    ),
    Mutation(
        "a beta of 1 is allowed",
        _VALIDATION,
        "if not 0.0 <= as_float(beta) < 1.0:",
        "if not 0.0 <= as_float(beta) <= 1.0:",
        ("tests/generic/test_errors.py::test_error_inputs",),
    ),
    Mutation(
        "an infinite learning rate is allowed",
        _VALIDATION,
        "if not math.isfinite(number) or number < 0 or too_big:",
        "if math.isnan(number) or number < 0 or too_big:",
        ("tests/generic/test_arguments.py::test_bad_argument",),
    ),
    Mutation(
        "the first pattern of overrides wins, not the last",
        _FACTORY,
        "for i in matching:",
        "for i in reversed(matching):",
        ("tests/generic/test_arguments.py::test_later_overrides_win",),
    ),
    Mutation(
        "biases get weight decay",
        _FACTORY,
        "if norm or bias or thin or (embedding and not decay_embeddings):",
        "if norm or (embedding and not decay_embeddings):",
        ("tests/generic/test_arguments.py::test_norms_biases_and_vectors_have_no_weight_decay",),
    ),
    Mutation(
        "names keep the prefix of torch.compile",
        "am_lightning/distributed/names.py",
        "_checkpoint_wrapped_module|_orig_mod|",
        "_checkpoint_wrapped_module|",
        (f"{_LIFECYCLE}::test_wrapper_prefixes_are_stripped",),
    ),
]
