"""Faults of Accelerate's attach, of the Trainer's callback and of its factory."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_ATTACH = "am_lightning/huggingface/accelerate.py"
_TRAINER = "am_lightning/huggingface/trainer.py"
_STEP_LOG = "am_lightning/loggers/step_logger.py"

_ACCELERATE = "tests/huggingface/test_accelerate.py"
_RUNS = "tests/huggingface/test_trainer.py"

MUTATIONS = [
    Mutation(
        "HF Trainer: the callback reads an optimizer that was replaced",
        _TRAINER,
        "if am_optimizer is not self._reader.optimizer:\n            before",
        "if am_optimizer is None:\n            before",
        ("tests/huggingface/test_trainer.py::test_an_optimizer_given_in_mid_run_is_read_or_refused[AMAdamW]",),
    ),
    Mutation(
        "HF Trainer: an optimizer given in mid-run is found only at the next log",
        _TRAINER,
        'which DeepSpeed takes in the backward pass."""\n        self._follow(model)',
        'which DeepSpeed takes in the backward pass."""',
        (f"{_RUNS}::test_an_optimizer_given_in_mid_run_is_met_before_its_first_step",),
    ),
    Mutation(
        "HF Trainer: an optimizer given in a step has no names yet when it makes that step",
        _TRAINER,
        "    on_pre_optimizer_step = on_step_begin",
        "    # on_pre_optimizer_step = on_step_begin",
        (f"{_RUNS}::test_an_optimizer_given_in_mid_run_is_met_before_its_first_step",),
    ),
    Mutation(
        "Accelerate: a second attach logs a second time",
        _ATTACH,
        "    if logger is None:\n",
        "    if logger is None or logger.accelerator is accelerator:\n",
        (f"{_ACCELERATE}::test_two_optimizers_and_attaching_twice",),
    ),
    Mutation(
        "Accelerate: the second optimizer writes under the first one's tags",
        _ATTACH,
        "StatsReader(am_optimizer, free_prefix(others))",
        "StatsReader(am_optimizer, free_prefix([]))",
        (f"{_ACCELERATE}::test_two_optimizers_and_attaching_twice",),
    ),
    Mutation(
        "Accelerate: one optimizer over two models gets the names of the first",
        _ATTACH,
        "model = whole[0] if whole else nn.ModuleList(holders)",
        "model = holders[0]",
        (f"{_ACCELERATE}::test_one_optimizer_over_two_models",),
    ),
    Mutation(
        "Accelerate: curves are logged at every step, not at the interval",
        _STEP_LOG,
        "if self.every is not None and self.steps % self.every == 0 and self.is_main():",
        "if self.every is not None and self.is_main():",
        (f"{_ACCELERATE}::test_two_optimizers_and_attaching_twice",),
    ),
    Mutation(
        "Accelerate: log_every_n_steps=None logs all the same",
        _STEP_LOG,
        "if self.every is not None and self.steps % self.every == 0 and self.is_main():",
        "if self.steps % (self.every or 1) == 0 and self.is_main():",
        (f"{_ACCELERATE}::test_skipped_steps_are_warned_of_and_counted",),
    ),
    Mutation(
        "Accelerate: saving a fresh optimizer counts as a step",
        _STEP_LOG,
        "if not self._had_state and inside_state_creation",
        "if self._had_state and inside_state_creation",
        (f"{_ACCELERATE}::test_trackers_get_the_curves_at_optimizer_steps[fsdp2]",),
    ),
    Mutation(
        "Accelerate: an optimizer that was not prepared is accepted",
        _ATTACH,
        "if not any(other is am_optimizer for other in prepared):",
        "if not prepared:",
        (f"{_ACCELERATE}::test_wrong_arguments",),
    ),
    Mutation(
        "Accelerate: under DDP no replica group is set",
        _ATTACH,
        'distributed_type.value.startswith("MULTI_")',
        'distributed_type.value.startswith("MULTI_GPU")',
        (f"{_ACCELERATE}::test_names_replicas_and_norms[ddp]",),
    ),
    Mutation(
        "Accelerate: an earlier run's optimizer cannot be freed",
        _ATTACH,
        "    logger.accelerator, logger.every = accelerator, log_every_n_steps\n",
        "    logger.accelerator, logger.every = accelerator, log_every_n_steps\n"
        "    globals().setdefault('_logs', []).append(logger)\n",
        (f"{_ACCELERATE}::test_a_later_run_of_the_process_starts_with_am_again",),
    ),
    Mutation(
        "Trainer: the callback stays behind the reporting ones",
        _TRAINER,
        "callbacks.insert(0, self)",
        "callbacks.append(self)",
        (f"{_RUNS}::test_optimizers_evaluation_and_a_callback_added_late",),
    ),
    Mutation(
        "Trainer: the momentum is added to what an evaluation logs, too",
        _TRAINER,
        'if self._reader is None or logs is None or "loss" not in logs:',
        "if self._reader is None or logs is None:",
        (f"{_RUNS}::test_optimizers_evaluation_and_a_callback_added_late",),
    ),
    Mutation(
        "Trainer: the skipped steps before a resume are forgotten",
        _TRAINER,
        "before = int(logged[-1]) if logged else 0",
        "before = 0",
        (f"{_RUNS}::test_skipped_steps_are_counted_over_a_resume",),
    ),
    Mutation(
        "Trainer: a second train() counts the first one's skipped steps",
        _TRAINER,
        "self._reader.skipped_before += before - self._reader.skipped_in_all()",
        "self._reader.skipped_before += before",
        (f"{_RUNS}::test_a_second_train_of_one_trainer_counts_from_zero",),
    ),
    Mutation(
        "Trainer: the factory takes adam_beta1 for the cap",
        _TRAINER,
        'cap = default_cap(args.adam_beta1, options.get("lambd", 0.1))',
        "cap = args.adam_beta1",
        (f"{_RUNS}::test_the_factory_takes_the_training_arguments",),
    ),
    Mutation(
        "Trainer: the TrainingArguments win over the factory's own keywords",
        _TRAINER,
        "options = {**own, **options}",
        "options = {**options, **own}",
        (f"{_RUNS}::test_keywords_of_the_factory_win_over_the_training_arguments",),
    ),
    Mutation(
        "Trainer: no warning is given if the arguments' learning rate is not used",
        _TRAINER,
        "not wanted & found:",
        "wanted & found:",
        (f"{_RUNS}::test_a_learning_rate_that_is_not_used_is_warned_of",),
    ),
    Mutation(
        "Trainer: a default of the arguments' own class counts as set by the user",
        _TRAINER,
        "for field in fields(args)}",
        "for field in fields(TrainingArguments)}",
        (f"{_RUNS}::test_arguments_that_are_set_in_vain_are_warned_of",),
    ),
    Mutation(
        "Trainer: the cap that was computed from adam_beta1 counts as another value",
        _TRAINER,
        'if name == "adam_beta1":',
        'if name == "beta1":',
        (f"{_RUNS}::test_arguments_that_are_set_in_vain_are_warned_of",),
    ),
    Mutation(
        "every rank writes the curves of a plain loop",
        "am_lightning/loggers/attach.py",
        "my_rank() == 0",
        "my_rank() >= 0",
        ("tests/loggers/test_attach.py::test_rank_0_writes",),
    ),
    Mutation(
        "a removed log still writes",
        "am_lightning/loggers/step_logger.py",
        "self._hooks.pop().remove()",
        "self._hooks.pop()",
        ("tests/loggers/test_attach.py::test_removed_it_writes_no_more_and_twice_is_once",),
    ),
    Mutation(
        "attached twice, curves are written twice",
        "am_lightning/loggers/attach.py",
        "and other.reader.prefix == prefix",
        "and other.reader.prefix != prefix",
        ("tests/loggers/test_attach.py::test_removed_it_writes_no_more_and_twice_is_once",),
    ),
    Mutation(
        "a number that is counted in the step is logged only if it is listed a second time",
        "am_lightning/loggers/reader.py",
        "if name not in _NOT_LOGGED and",
        'if name in ("skipped_steps", "grad_norm") and',
        ("tests/loggers/test_attach.py::test_a_new_field_is_written_with_the_others",),
    ),
]
