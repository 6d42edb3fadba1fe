"""Faults of the Lightning callback, of Fabric's attach, and of their curves."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_CALLBACK = "am_lightning/lightning/callback.py"
_FITTING = "am_lightning/lightning/trainer_patches.py"
_REPLACED = "am_lightning/lightning/patched_methods.py"
_FABRIC = "am_lightning/lightning/fabric.py"
_CURVES = "am_lightning/lightning/loggers.py"
_NAMES = "am_lightning/lightning/compat.py"
_READINGS = "am_lightning/loggers/reader.py"
_STEP_LOG = "am_lightning/loggers/step_logger.py"

_RUNS = "tests/lightning/test_callback.py"
_LIFECYCLE = "tests/lightning/test_lifecycle.py"
_CONVERSION = "tests/lightning/test_conversion.py"
_LIVE = "tests/lightning/test_live_optimizers.py"
_COPIES = "tests/lightning/test_copies.py"
_CLIPPING = "tests/lightning/test_clipping.py"
_FABRIC_RUNS = "tests/lightning/test_fabric.py"
_OLDER = "tests/lightning/test_older_name.py"

MUTATIONS = [
    Mutation(
        "the callback converts without its own cap",
        _CALLBACK,
        "beta1_max=self.beta1_max, scope=self.scope)",
        "beta1_max=None, scope=self.scope)",
        (f"{_LIFECYCLE}::test_a_module_is_fitted_again_with_another_callback",),
    ),
    Mutation(
        "curves are logged at every step, not at the interval",
        _CALLBACK,
        "self._intervals, self._batches // every",
        "-1, self._batches // every",
        (f"{_RUNS}::test_curves_in_tensorboard_and_csv_are_the_momentum",),
    ),
    Mutation(
        "curves are missed where the interval ends in a batch without a step",
        _CALLBACK,
        "self._intervals > before or",
        "self._batches % every == 0 or",
        (f"{_LIFECYCLE}::test_curves_where_no_step_falls_on_the_log_interval",),
    ),
    Mutation(
        "micro-batches of an accumulated step are logged as steps",
        _CALLBACK,
        "if trainer.global_step == self._last_step:  # gradient accumulation: no step yet",
        "if trainer.global_step < self._last_step:  # gradient accumulation: no step yet",
        (f"{_RUNS}::test_accumulation_logs_steps_only",),
    ),
    Mutation(
        "curves are one step beside the Trainer's own metrics",
        _CALLBACK,
        "reader.log(trainer.loggers, step, type",
        "reader.log(trainer.loggers, step + 1, type",
        (f"{_RUNS}::test_curves_in_tensorboard_and_csv_are_the_momentum",),
    ),
    Mutation(
        "one skipped step too many is allowed in a row",
        _CALLBACK,
        "if reader.skipped_in_a_row >= self.max_consecutive_skips:",
        "if reader.skipped_in_a_row > self.max_consecutive_skips:",
        (f"{_LIFECYCLE}::test_too_many_skips_end_the_run_at_exactly_the_limit",),
    ),
    Mutation(
        "skipped steps are read too late, after consecutive ones have begun",
        _CALLBACK,
        "self._next_look = self._steps + self.max_consecutive_skips - in_a_row",
        "self._next_look = self._steps + self.max_consecutive_skips",
        (f"{_LIFECYCLE}::test_too_many_skips_end_the_run_at_exactly_the_limit",),
    ),
    Mutation(
        "a run that ends after too many skipped steps writes no checkpoint",
        _CALLBACK,
        "trainer.save_checkpoint(path)\n        raise",
        "raise",
        (f"{_RUNS}::test_too_many_skips_in_a_row_end_the_run_after_a_checkpoint",),
    ),
    Mutation(
        "a checkpoint saved after fit has no count of skipped steps",
        _CALLBACK,
        'return self._at_end or {"skipped_steps": []}',
        'return {"skipped_steps": []}',
        (f"{_LIFECYCLE}::test_skips_are_in_a_checkpoint_saved_after_fit_and_not_in_the_next_fit",),
    ),
    Mutation(
        "the skipped steps before a resume are counted again in the next fit",
        _CALLBACK,
        "self._readers, self._saved = [], {}",
        "self._readers, self._saved = [], self._at_end",
        (f"{_LIFECYCLE}::test_skips_are_in_a_checkpoint_saved_after_fit_and_not_in_the_next_fit",),
    ),
    Mutation(
        "optimizers that are rebuilt in mid-run are not converted",
        _CALLBACK,
        "        elif optimizers:\n            self._convert(trainer, optimizers)",
        "        elif optimizers and not self._fitting:\n            self._convert(trainer, optimizers)",
        (f"{_LIVE}::test_the_successor_is_converted_trained_and_shown[set_up_again-on_train_batch_start]",),
    ),
    Mutation(
        "the curves continue to be those of a replaced optimizer",
        _CALLBACK,
        "if self._fitting:\n            self._follow(trainer)",
        "if self._fitting and not self._readers:\n            self._follow(trainer)",
        (f"{_LIVE}::test_the_successor_is_converted_trained_and_shown[assigned-training_step]",),
    ),
    Mutation(
        "an optimizer that is put into the Trainer's list is not seen",
        _CALLBACK,
        "trainer.strategy.optimizers = now",
        "self._live = list(now)",
        (f"{_LIVE}::test_the_successor_is_converted_trained_and_shown[put_into_the_list-on_train_batch_end]",),
    ),
    Mutation(
        "an optimizer that takes another's place counts dropped steps from 0",
        _CALLBACK,
        "elif index < len(before):",
        "elif index > len(before):",
        (f"{_LIVE}::test_the_successor_is_converted_trained_and_shown[assigned-on_train_batch_start]",),
    ),
    Mutation(
        "a layer that is added in mid-run has no name",
        "am_lightning/optim/param_layout.py",
        "self.given.known_names |= names_by_id",
        "names_by_id",
        (f"{_LIVE}::test_a_layer_that_is_added_has_its_name",),
    ),
    Mutation(
        "a method that is replaced for one object is replaced for its copies, too",
        _REPLACED,
        "if entry.owner is owner:",
        "if isinstance(owner, type(entry.owner)):",
        (f"{_COPIES}::test_replacements_are_of_one_object_and_leave_no_trace",),
    ),
    Mutation(
        "after an exception methods of the Trainer's parts stay replaced",
        _CALLBACK,
        "            self._conclude(trainer)\n        self._leave()",
        "            self._conclude(trainer)",
        (f"{_CLIPPING}::test_nothing_is_left_after_fit_or_an_exception",),
    ),
    Mutation(
        "a module's own AMAdamW is refused",
        _CALLBACK,
        "if not ready and not plain:",
        "if not plain:",
        (f"{_CONVERSION}::test_a_module_that_returns_amadamw_is_only_logged",),
    ),
    Mutation(
        "a converted AdamW counts no steps for a scheduler written after an older torch's",
        "am_lightning/optim/convert.py",
        "owner._step_count += 1",
        "owner._step_count += 0",
        (f"{_CONVERSION}::test_a_scheduler_of_old_counts_on",),
    ),
    Mutation(
        "a state_dict that was set on an AdamW stays on the converted one",
        "am_lightning/optim/convert.py",
        "for method in sorted(_METHODS & optimizer.__dict__.keys()):",
        'for method in sorted({"step"} & optimizer.__dict__.keys()):',
        (f"{_CONVERSION}::test_a_method_that_somebody_has_replaced_is_named[state_dict]",),
    ),
    Mutation(
        "the callback's class in a Trainer's list is not named",
        _CALLBACK,
        "if callback is None and cls is not None:",
        "if callback is None and cls is AdaptiveMemory.__base__:",
        (f"{_CONVERSION}::test_the_class_without_brackets_is_named",),
    ),
    Mutation(
        "a positional argument of the callback is not named",
        "am_lightning/optim/argument_hints.py",
        "if len(args) > taken or not kwargs.keys() <= set(known):",
        "if not kwargs.keys() <= set(known):",
        (f"{_CONVERSION}::test_a_slip_is_named_with_its_cure",),
    ),
    Mutation(
        "a plugin's own clipping is replaced",
        _FITTING,
        "if type(plugin).clip_grad_by_norm in lightnings_own and",
        "if hasattr(type(plugin), 'clip_grad_by_norm') and",
        (f"{_CLIPPING}::test_a_plugins_own_clipping_stays",),
    ),
    Mutation(
        "undo removes a replacement that another program has made since",
        _REPLACED,
        "if cls.__dict__.get(name) is self._installed:",
        "if name in cls.__dict__:",
        (f"{_COPIES}::test_what_somebody_else_has_put_in_place_stays",),
    ),
    Mutation(
        "LearningRateMonitor shows the cap as the momentum",
        _FITTING,
        "shown = {} if math.isnan(beta) else dict.fromkeys(shown, beta)",
        "shown = {} if math.isnan(beta) else shown",
        ("tests/lightning/test_momentum_tag.py::test_momentum_is_beta_of_the_group[Regression]",),
    ),
    Mutation(
        "LearningRateMonitor: the device is read once for each group",
        "am_lightning/lightning/trainer_patches.py",
        "if index not in read or param_group is optimizer.param_groups[0]:",
        "if index >= 0:",
        ("tests/lightning/test_momentum_tag.py::test_the_device_is_read_once_for_all_groups",),
    ),
    Mutation(
        "LearningRateMonitor: the momentum of the first step stays",
        "am_lightning/lightning/trainer_patches.py",
        "if index not in read or param_group is optimizer.param_groups[0]:",
        "if index not in read:",
        ("tests/lightning/test_momentum_tag.py::test_momentum_is_beta_of_the_group[Own]",),
    ),
    Mutation(
        "LearningRateMonitor shows one momentum for all groups",
        _FITTING,
        "own = [row for row, group in enumerate(optimizer.groups_of_parameters()) if group is param_group]",
        "own = [row for row, group in enumerate(optimizer.groups_of_parameters()) if group]",
        ("tests/lightning/test_momentum_tag.py::test_momentum_is_beta_of_the_group[Regression]",),
    ),
    Mutation(
        "under DDP no replica group is set",
        "am_lightning/optim/unwrap.py",
        "optimizer.replica_group = torch.distributed.group.WORLD",
        "optimizer.replica_group = None",
        ("tests/lightning/test_strategies.py::test_every_strategy_is_one_process[ddp-2-tensor]",),
    ),
    Mutation(
        "classes of the older name are not known while the newer is loaded",
        _NAMES,
        "for module in self._modules)",
        "for module in self._modules[:1])",
        (f"{_OLDER}::test_a_trainer_of_the_older_name[beside the newer]",),
    ),
    Mutation(
        "a name that the program does not use is imported",
        _NAMES,
        "if any(home in sys.modules for homes in _HOMES for home in homes):",
        "if all(home in sys.modules for homes in _HOMES for home in homes):",
        (f"{_OLDER}::test_a_name_is_imported_only_where_it_is_used[the older alone]",),
    ),
    Mutation(
        "the callback is no Callback of a package that is loaded after it",
        _NAMES,
        "if kinds and Callback.__bases__ != kinds:",
        "if kinds and Callback.__bases__ == (_Base,):",
        (f"{_OLDER}::test_a_name_is_imported_only_where_it_is_used[ours, then the older]",),
    ),
    Mutation(
        "LightningCLI of the older name refuses the callback's class path",
        "am_lightning/__init__.py",
        "        join()  # LightningCLI",
        "        # LightningCLI",
        (f"{_OLDER}::test_a_name_is_imported_only_where_it_is_used",),
    ),
    Mutation(
        "an error has the class of one package, whichever the program uses",
        _NAMES,
        "kinds[0] if len(kinds) == 1 else",
        "kinds[0] if kinds else",
        (f"{_OLDER}::test_a_name_is_imported_only_where_it_is_used[both, and an error]",),
    ),
    Mutation(
        "Fabric: a resumed run's curves begin at step 0",
        _STEP_LOG,
        "reader.optimizer.register_load_state_dict_post_hook(self._count_from_state)",
        "reader.optimizer.register_load_state_dict_post_hook(lambda _: None)",
        (f"{_FABRIC_RUNS}::test_a_resumed_run_counts_from_its_checkpoint",),
    ),
    Mutation(
        "Fabric: the Trainer's callback does nothing, without an error",
        _CALLBACK,
        "def on_after_setup(self, **_: Any) -> None:",
        "def _on_after_setup(self, **_: Any) -> None:",
        (f"{_FABRIC_RUNS}::test_the_trainers_callback_in_fabric_is_named",),
    ),
    Mutation(
        "Fabric: the second optimizer writes under the first one's tags",
        _STEP_LOG,
        "for prefix in map(prefix_of, itertools.count()) if prefix not in taken)",
        "for prefix in map(prefix_of, itertools.count()))",
        (f"{_FABRIC_RUNS}::test_two_optimizers_and_skipped_steps",),
    ),
    Mutation(
        "Fabric: under DDP no replica group is set",
        _FABRIC,
        "FabricDDPStrategy) or fabric.world_size == 1:",
        "FabricDDPStrategy) or fabric.world_size >= 1:",
        (f"{_FABRIC_RUNS}::test_under_every_strategy_beta_is_one_process_and_is_logged_once[ddp]",),
    ),
    Mutation(
        "tensors that have never stepped are in the histogram",
        _READINGS,
        "stepped = self.interval.steps > 0",
        "stepped = self.interval.steps >= 0",
        (f"{_RUNS}::test_layers_and_the_histogram_are_for_tensorboard_and_leave_out_what_never_stepped",),
    ),
    Mutation(
        "curves of each layer go to every logger",
        _CURVES,
        "logger.log_metrics(scalars, step=step)",
        "logger.log_metrics(scalars | self.layers(), step=step)",
        (f"{_RUNS}::test_layers_and_the_histogram_are_for_tensorboard_and_leave_out_what_never_stepped",),
    ),
    Mutation(
        "the warning of skipped steps comes again at every interval",
        _READINGS,
        "new, self._warned_of = self.newly_skipped(), int(self.numbers.skipped_steps)",
        "new = self.newly_skipped()",
        (f"{_RUNS}::test_skipped_steps_are_counted_and_warned_about",),
    ),
    Mutation(
        "adapters are in the layer group other",
        "am_lightning/loggers/metrics.py",
        "return name[: below.start()] if below else",
        "return name[: below.end()] if below else",
        ("tests/momentum/test_report.py::test_layer_groups_of_common_models",),
    ),
    Mutation(
        "the share of tensors at the cap includes those just below it",
        "am_lightning/optim/step_stats.py",
        "self._edges == beta,",
        "(self._edges - beta).abs() < 0.1,",
        (f"{_RUNS}::test_curves_in_tensorboard_and_csv_are_the_momentum",),
    ),
    Mutation(
        "the lowest beta_t is that of the last step",
        "am_lightning/optim/step_stats.py",
        "torch.fmin(self._lowest, taken, out=self._lowest)",
        "self._lowest.copy_(taken)",
        (f"{_RUNS}::test_curves_in_tensorboard_and_csv_are_the_momentum",),
    ),
    Mutation(
        "a reading takes the steps from the other readers",
        "am_lightning/optim/intervals.py",
        "for unread in self._unread.values():",
        "for unread in list(self._unread.values())[-1:]:",
        ("tests/loggers/test_attach.py::test_every_kind_of_writer_gets_the_same",),
    ),
    Mutation(
        "a load of the step that a run is at drops the interval so far",
        "am_lightning/loggers/step_logger.py",
        "if self._counted != before:",
        "if True:",
        ("tests/loggers/test_attach.py::test_a_load_in_an_interval",),
    ),
    Mutation(
        "a resume begins where Lightning's count is one behind",
        _CALLBACK,
        "now = trainer.fit_loop.epoch_loop._batches_that_stepped",
        "now = trainer.fit_loop.epoch_loop._batches_that_stepped - 1",
        ("tests/lightning/test_intervals.py::test_a_resume_has_the_axis_of_lightning",),
    ),
    Mutation(
        "a fit that Ctrl-C ends prints no line",
        _CALLBACK,
        "if self._fitting and not isinstance(exception, Exception):",
        "if self._fitting and isinstance(exception, Exception):",
        ("tests/lightning/test_intervals.py::test_a_fit_that_is_ended_from_outside_says_the_same",),
    ),
    Mutation(
        "two optimizers get half of the pictures",
        _CALLBACK,
        "trainer.max_steps * batches // trainer.global_step",
        "trainer.max_steps",
        ("tests/lightning/test_intervals.py::test_two_optimizers_have_as_many_pictures_as_one",),
    ),
    Mutation(
        "a checkpoint has no interval",
        _CALLBACK,
        'self._saved.get("readers", [])',
        "[]",
        ("tests/lightning/test_intervals.py::test_a_resume_leaves_no_gap",),
    ),
    Mutation(
        "the steps in the sentence are one too low",
        _CALLBACK,
        "reader.read(self._batches)",
        "reader.read(self._batches - 1)",
        ("tests/lightning/test_intervals.py::test_the_end_of_a_fit_in_one_line",),
    ),
]
