"""Faults of the recipes: checkpoints, the order of the data, schedules, losses, signals, plans, monitors."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_PACKAGE = "am_lightning/pretrain"
_MANIFEST = f"{_PACKAGE}/checkpoints/manifest.py"
_ATOMIC = f"{_PACKAGE}/checkpoints/atomic.py"
_CALLBACK = f"{_PACKAGE}/checkpoints/callback.py"
_WRITER = f"{_PACKAGE}/checkpoints/writer.py"
_ORDER = f"{_PACKAGE}/data/order.py"
_PERMUTATION = f"{_PACKAGE}/data/permutation.py"
_LITDATA = f"{_PACKAGE}/data/litdata_loader.py"
_SHARDS = f"{_PACKAGE}/data/shards.py"
_CHUNKS = f"{_PACKAGE}/data/chunks.py"
_SCHEDULE = f"{_PACKAGE}/model/schedule.py"
_SIGNALS = f"{_PACKAGE}/callbacks/fault_tolerance.py"
_STOP_SIGNALS = f"{_PACKAGE}/runtime/stop_signals.py"
_MEMORY = f"{_PACKAGE}/commands/plan/memory.py"

_CHECKPOINTS = "tests/recipes/test_checkpoints.py"
_ORDERS = "tests/recipes/test_order.py"
_LITDATA_TESTS = "tests/recipes/test_litdata.py"
_SCHEDULES = "tests/recipes/test_schedule.py"
_NONFINITE = "tests/recipes/test_nonfinite_losses.py"
_STOPPED = "tests/recipes/test_fault_tolerance.py"
_PLAN = "tests/recipes/test_plan.py"
_GPU = "tests/recipes/test_gpu_check.py"
_MONITORS = "tests/recipes/test_throughput.py"
_EXPORTS = "tests/recipes/test_export.py"

MUTATIONS = [
    # ------------------------------------------------------------------ the console command
    Mutation(
        "a misspelt setting is left to the parser, after seconds of imports",
        f"{_PACKAGE}/runtime/settings.py",
        "not in known:",
        "in known:",
        ("tests/recipes/test_console.py::test_help_and_refusals_import_nothing_of_training",),
    ),
    Mutation(
        "list imports torch",
        f"{_PACKAGE}/commands/list.py",
        "import argparse\n",
        "import argparse\n\nimport torch  # noqa: F401\n",
        ("tests/recipes/test_console.py::test_help_and_refusals_import_nothing_of_training",),
    ),
    Mutation(
        "the short help of fit shows the defaults of the classes",
        f"{_PACKAGE}/commands/fit.py",
        r": +(.*?) +# \(.*?\) (.*)$",
        r": +.*? +# \(.*?, (.*?)\) (.*)$",
        ("tests/recipes/test_console.py::test_the_short_help_has_the_values_of_base_yaml",),
    ),
    Mutation(
        "the summary of a run looks for event files of any logger",
        f"{_PACKAGE}/commands/report/summary.py",
        "if isinstance(each, TensorBoardLogger)), None)",
        "if each.log_dir), None)",
        ("tests/recipes/test_commands.py::test_fit_takes_a_name_and_needs_no_tensorboard",),
    ),
    Mutation(
        "the launchers of a copy do not take its recipe",
        "recipes/launch/common.sh",
        '        CONFIG="${copies[0]}"',
        "        :",
        ("tests/recipes/test_console.py::test_a_launcher_of_a_copy_takes_the_copied_recipe",),
    ),
    # ------------------------------------------------------------------ signals
    Mutation(
        "a signal in a step that should_stop ends is not answered",
        _SIGNALS,
        "self._agreed = self._ask(asks=True, now=True)",
        "self._agreed = None",
        (f"{_STOPPED}::test_a_signal_after_the_last_step_is_obeyed",),
    ),
    Mutation(
        "ranks learn of a signal just before a validation after it",
        _SIGNALS,
        "waits_anyway or _validation_is_near(trainer)",
        "waits_anyway",
        ("tests/recipes/test_waits.py::test_fault_tolerance_asks_at_its_interval",),
    ),
    # ------------------------------------------------------------------ checkpoints
    Mutation(
        "a checkpoint's checksums are not compared",
        _MANIFEST,
        "if digest != wanted[name][1]]",
        "if not digest]",
        (f"{_CHECKPOINTS}::test_a_folder_is_whole_only_with_all_of_its_files",),
    ),
    Mutation(
        "a folder without a manifest counts as whole",
        _MANIFEST,
        'it was not finished" if ours else None',
        'it was not finished" if False else None',
        (f"{_CHECKPOINTS}::test_a_folder_is_whole_only_with_all_of_its_files",),
    ),
    Mutation(
        "a broken file that this process has verified before counts as whole",
        _MANIFEST,
        "(name, s.st_ino, s.st_size, s.st_mtime_ns) for",
        "(name,) for",
        (f"{_CHECKPOINTS}::test_a_folder_is_whole_only_with_all_of_its_files",),
    ),
    Mutation(
        "new bytes lie beside the manifest of the old ones after a kill",
        _ATOMIC,
        "manifest_of(path).unlink(missing_ok=True)  # a kill",
        "pass  # a kill",
        (f"{_CHECKPOINTS}::test_a_new_file_is_never_beside_an_old_manifest",),
    ),
    Mutation(
        "a file gets its name before it is on the disk",
        f"{_PACKAGE}/runtime/atomic_files.py",
        "        file.flush()\n        os.fsync(file.fileno())\n",
        "        file.flush()\n",
        (f"{_CHECKPOINTS}::test_a_file_is_on_the_disk_before_it_has_its_name",),
    ),
    Mutation(
        "a folder of shards gets its name before its files are on the disk",
        _ATOMIC,
        "    sync_files(part)\n",
        "",
        (f"{_CHECKPOINTS}::test_a_folder_is_on_the_disk_before_it_has_its_name",),
    ),
    Mutation(
        "a checkpoint is begun though the disk has no room for it",
        _ATOMIC,
        "if shutil.disk_usage(folder).free < needed:",
        "if shutil.disk_usage(folder).free < 0:",
        (f"{_CHECKPOINTS}::test_without_room_nothing_is_begun",),
    ),
    Mutation(
        "the oldest whole checkpoint is chosen",
        f"{_PACKAGE}/checkpoints/resume.py",
        "sorted(order, reverse=True)",
        "sorted(order)",
        (f"{_CHECKPOINTS}::test_without_last_ckpt_the_newest_step_is_chosen",),
    ),
    Mutation(
        "the newest checkpoint is the one whose step is the highest",
        f"{_PACKAGE}/checkpoints/resume.py",
        "(manifest.number if manifest else without, step, last, path)",
        "(0 if manifest else without, step, last, path)",
        (f"{_CHECKPOINTS}::test_the_oldest_go_with_their_manifests",),
    ),
    Mutation(
        "a checkpoint that a kill left without a manifest counts as the oldest",
        f"{_PACKAGE}/checkpoints/resume.py",
        "without = math.inf if",
        "without = -1 if",
        (f"{_CHECKPOINTS}::test_what_a_kill_left_without_a_manifest_is_the_newest",),
    ),
    Mutation(
        "a second run in a folder does not see the first",
        f"{_PACKAGE}/runtime/run_lock.py",
        "fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        ("tests/recipes/test_run_lock.py::test_a_second_process_is_told_of_the_first_until_it_is_killed",),
    ),
    Mutation(
        "a model of another shape is loaded from Accelerate's checkpoint",
        f"{_PACKAGE}/checkpoints/accelerate.py",
        "of.load_state_dict(saved[name])\n        return path, saved",
        "pass\n        return path, saved",
        ("tests/recipes/test_resumes.py::test_a_resumed_run_is_the_unbroken_one",),
    ),
    Mutation(
        "one checkpoint more than asked for is kept",
        _ATOMIC,
        "newest_first(checkpoints)[keep:]",
        "newest_first(checkpoints)[keep + 1 :]",
        (f"{_CHECKPOINTS}::test_the_oldest_go_with_their_manifests",),
    ),
    Mutation(
        "a checkpoint may run code when it is loaded",
        _CALLBACK,
        "original(decide(choose), weights_only=True)",
        "original(decide(choose), weights_only=False)",
        (f"{_CHECKPOINTS}::test_a_checkpoint_that_would_run_code_is_refused",),
    ),
    Mutation(
        "a failure in the background is forgotten",
        _WRITER,
        "            pending.result()",
        "            pending.exception()",
        (f"{_CHECKPOINTS}::test_what_fails_in_the_background_ends_the_run",),
    ),
    Mutation(
        "a resume with other accumulation begins in the middle of a step",
        _CALLBACK,
        "counters[name] += difference",
        "counters[name] += 0 * difference",
        ("tests/recipes/test_runs.py::test_accumulation_may_change_on_resume",),
    ),
    Mutation(
        "a step folder that a killed run left incomplete is not deleted",
        f"{_PACKAGE}/checkpoints/run_folder.py",
        'checkpoints.glob(".*.part")',
        'checkpoints.glob(".part-*")',
        ("tests/recipes/test_accelerate_checkpoints.py",),
    ),
    # ------------------------------------------------------------------ the order of the data
    Mutation(
        "a resumed order begins one step late",
        _ORDER,
        "for first in range(self.first_step() * self.batch_size,",
        "for first in range((self.first_step() + (self.first_step() > 0)) * self.batch_size,",
        (f"{_ORDERS}::test_a_resumed_order_is_the_rest_of_the_whole_one",),
    ),
    Mutation(
        "all ranks read the rows of the first",
        _ORDER,
        "mine = first + self.rank * self.share",
        "mine = first",
        (f"{_ORDERS}::test_steps_are_the_same_for_every_world_size_and_accumulation",),
    ),
    Mutation(
        "every pass has the order of the first",
        _PERMUTATION,
        "np.random.default_rng([seed, number]).permutation(rows)",
        "np.random.default_rng([seed, 0]).permutation(rows)",
        (f"{_ORDERS}::test_passes_and_seeds_have_their_own_order",),
    ),
    Mutation(
        "a large order gives a row that is not there",
        _PERMUTATION,
        "found[outside] >= np.uint64(rows)]",
        "found[outside] > np.uint64(rows)]",
        (f"{_ORDERS}::test_every_row_comes_once_in_a_pass",),
    ),
    Mutation(
        "a resume with other processes reads the rest of a pass in the order of its own processes",
        _LITDATA,
        "return self.grid if fresh else Grid(*known[0][1:])",
        "return self.grid",
        (f"{_LITDATA_TESTS}::test_a_resume_is_exact_for_any_processes_workers_and_micro_batches",),
    ),
    Mutation(
        "every pass over litdata's chunks has the order of the first",
        _LITDATA,
        "            loader.current_epoch = number\n",
        "            loader.current_epoch = 0\n",
        (f"{_LITDATA_TESTS}::test_a_pass_has_every_row_once",),
    ),
    Mutation(
        "a flipped byte of a chunk is read",
        _LITDATA,
        "if chunk_filepath not in self.checked:",
        "if chunk_filepath in self.checked:",
        (f"{_LITDATA_TESTS}::test_damage_is_named_before_a_row_of_it_is_given",),
    ),
    Mutation(
        "on a parallel file system litdata's own order is used",
        _LITDATA,
        "            if dataset.posix_fast is not None:",
        "            if dataset.posix_fast is None:",
        (f"{_LITDATA_TESTS}::test_a_parallel_file_system_has_the_same_order",),
    ),
    Mutation(
        "ten times too few documents are held out",
        _CHUNKS,
        "return bucket % 10_000 < percent * 100",
        "return bucket % 10_000 < percent * 10",
        ("tests/recipes/test_sources.py::test_about_five_percent_are_held_out",),
    ),
    Mutation(
        "a line that begins where a file is cut is lost",
        _CHUNKS,
        "file.seek(self.start - 1)\n                position = self.start - 1 + len",
        "file.seek(self.start)\n                position = self.start + len",
        ("tests/recipes/test_sources.py::test_a_line_is_in_one_piece_at_every_size",),
    ),
    Mutation(
        "a slice of tokens is read from the next file too early",
        _SHARDS,
        'np.searchsorted(self.starts, start, "right")) - 1',
        'np.searchsorted(self.starts, start, "right"))',
        ("tests/recipes/test_shards.py::test_a_slice_goes_over_any_number_of_files",),
    ),
    Mutation(
        "the content of token files is not checked",
        _SHARDS,
        "if content and checksum(path) != shard.sha256:",
        "if content and not checksum(path):",
        ("tests/recipes/test_shards.py::test_a_broken_file_is_named_with_the_cure",),
    ),
    # ------------------------------------------------------------------ schedule, losses, signals
    Mutation(
        "the warmup is one step behind: its first step has learning rate 0",
        _SCHEDULE,
        "return (step + 1) / warmup",
        "return step / warmup",
        (f"{_SCHEDULES}::test_it_rises_then_falls_between_its_bounds",),
    ),
    Mutation(
        "the cosine begins at step 0 and not after the warmup",
        _SCHEDULE,
        'if self.kind == "wsd" else warmup\n',
        'if self.kind == "wsd" else 0\n',
        (f"{_SCHEDULES}::test_cosine_is_half_way_in_the_middle_and_ends_at_its_end",),
    ),
    Mutation(
        "the final learning rate is not kept to",
        _SCHEDULE,
        "return self.final_fraction + (1 - self.final_fraction) * shape",
        "return max(self.final_fraction, shape)",
        (f"{_SCHEDULES}::test_cosine_is_half_way_in_the_middle_and_ends_at_its_end",),
    ),
    Mutation(
        "without a callback that counts it, a loss that is not finite does not end the run",
        f"{_PACKAGE}/callbacks/throughput.py",
        "if math.isfinite(loss) or any(",
        "if loss is not None or any(",
        (f"{_NONFINITE}::test_a_run_whose_steps_nobody_drops_ends_with_its_first_bad_loss",),
    ),
    Mutation(
        "ranks agree on a signal at every step, whatever the interval",
        _SIGNALS,
        "asks, now = step % self.check_every_n_steps == 0,",
        "asks, now = True,",
        (f"{_STOPPED}::test_a_signal_is_agreed_on_every_few_steps",),
    ),
    Mutation(
        "a signal ends the run in the middle of an accumulated step",
        _SIGNALS,
        "if step == self._last_step or self._agreed is not None:",
        "if self._agreed is not None:",
        (f"{_STOPPED}::test_a_stopped_run_resumes_bitwise[False-8-SIGTERM-143]",),
    ),
    Mutation(
        "a stopped run ends with status 128 for every signal",
        _SIGNALS,
        "else 128 + self._agreed)",
        "else 128)",
        (f"{_STOPPED}::test_a_signal_in_the_last_step_is_obeyed_when_all_is_saved",),
    ),
    Mutation(
        "signal handlers stay after fit",
        _STOP_SIGNALS,
        "signal.signal(number, handler if handler is not None else signal.SIG_DFL)",
        "signal.getsignal(number)",
        (f"{_STOPPED}::test_after_a_finished_fit_the_handlers_are_the_old_ones",),
    ),
    Mutation(
        "a DataLoader's worker requeues the job",
        _STOP_SIGNALS,
        "elif number == signal.SIGTERM:  # in a forked",
        "elif number == signal.SIGUSR1:  # in a forked",
        (f"{_STOPPED}::test_a_forked_worker_requeues_nothing",),
    ),
    Mutation(
        "a rank in a rendezvous only notes a signal",
        _STOP_SIGNALS,
        "return _channel[1].fileno()",
        "return -1",
        ("tests/recipes/test_rendezvous.py",),
    ),
    Mutation(
        "an early signal is handled twice",
        _STOP_SIGNALS,
        "kept, _early.received = _early.received, set()",
        "kept = _early.received",
        (f"{_STOPPED}::test_an_early_signal_is_kept_for_the_programs_without_lightning",),
    ),
    # ------------------------------------------------------------------ plan, monitors, models
    Mutation(
        "plan: a ring's all-reduce sends its payload once",
        f"{_PACKAGE}/commands/plan/traffic.py",
        "beta = _ring(2 * message_bytes(",
        "beta = _ring(message_bytes(",
        (f"{_PLAN}::test_traffic_by_hand", f"{_PLAN}::test_the_60m_by_hand"),
    ),
    Mutation(
        "plan: one moment is counted, not two",
        _MEMORY,
        'held = {"weights": w * weights.all, "AM-AdamW moments": 2 * w * weights.all}',
        'held = {"weights": w * weights.all, "AM-AdamW moments": w * weights.all}',
        (f"{_PLAN}::test_the_60m_by_hand",),
    ),
    Mutation(
        "plan: ZeRO 2 does not split the gradients",
        _MEMORY,
        "gradients = c * p // (n if stage >= 2 else 1)",
        "gradients = c * p // (n if stage > 2 else 1)",
        (f"{_PLAN}::test_zero_by_the_papers_bytes",),
    ),
    Mutation(
        "plan: a measurement on another GPU counts as one on this GPU",
        f"{_PACKAGE}/commands/plan/measured.py",
        "if (gpu_of(m.device), m.precision, m.compiled) == (gpu, precision, compiled)",
        "if (m.precision, m.compiled) == (precision, compiled)",
        ("tests/recipes/test_gpu_page.py::test_plan_takes_what_was_measured",),
    ),
    Mutation(
        "the logged loss is that of the last micro-batch",
        f"{_PACKAGE}/callbacks/throughput.py",
        "self._loss = loss if self._loss is None else self._loss + loss",
        "self._loss = loss",
        (f"{_MONITORS}::test_loss_and_norm_are_of_the_whole_step",),
    ),
    Mutation(
        "the gradient norm adds norms, not their squares",
        f"{_PACKAGE}/callbacks/throughput.py",
        "norm.float().square()",
        "norm.float()",
        (f"{_MONITORS}::test_every_optimizer_has_a_gradient_norm",),
    ),
    Mutation(
        "a tensor parallel size that does not divide the heads is accepted",
        f"{_PACKAGE}/model/parallelize.py",
        '        "model.num_heads": shape.num_heads,\n',
        "",
        ("tests/recipes/test_parallel.py::test_what_would_divide_is_named",),
    ),
    Mutation(
        "the GPU check runs finished parts again",
        "recipes/gpu/check.py",
        '(p for p in found if status[p.name] != "done")',
        "(p for p in found)",
        (f"{_GPU}::test_what_is_missing_comes_before_what_failed",),
    ),
    Mutation(
        "a part of the GPU check outlives the call that started it",
        "recipes/gpu/part.py",
        "os.killpg(0, signal.SIGKILL)",
        "pass",
        (f"{_GPU}::test_a_cut_off_loses_one_part_and_the_next_call_continues",),
    ),
    Mutation(
        "a test that was stopped counts as passed",
        "recipes/gpu/right.py",
        'if not (name := case.get("name")):',
        'if (name := case.get("name", "")) is None:',
        (f"{_GPU}::test_a_file_of_tests_that_is_stopped_says_what_it_had",),
    ),
    Mutation(
        "a rehearsal becomes docs/gpu.md",
        "recipes/gpu/page.py",
        "if rehearsal and (options.to",
        "if not rehearsal and (options.to",
        ("tests/recipes/test_gpu_page.py::test_a_rehearsal_is_marked_and_is_never_docs",),
    ),
    # ------------------------------------------------------------------ recipes over their base
    Mutation(
        "a recipe's base is not read",
        f"{_PACKAGE}/runtime/paths.py",
        "files.insert(0, base)",
        "return files",
        ("tests/recipes/test_config.py::test_a_recipe_over_its_base_is_the_whole_text[130m]",),
    ),
    Mutation(
        "a recipe written out whole loses its own comments",
        f"{_PACKAGE}/runtime/recipe_text.py",
        "    if any(entry.above) or mark:\n",
        "    if not base.line:\n",
        ("tests/recipes/test_config.py::test_texts_are_merged_with_their_comments",),
    ),
    # ------------------------------------------------------------------ sample and export
    Mutation(
        "export: the pickle that describes shards runs code",
        f"{_PACKAGE}/checkpoints/weights.py",
        "_Unpickler(file).load()",
        "pickle.load(file)",
        (f"{_EXPORTS}::test_the_description_of_shards_runs_no_code",),
    ),
    Mutation(
        "export: a failed write leaves half a folder",
        f"{_PACKAGE}/runtime/atomic_files.py",
        "        shutil.rmtree(part, ignore_errors=True)  # a folder\n",
        "",
        (f"{_EXPORTS}::test_a_disk_that_refuses_leaves_nothing",),
    ),
    Mutation(
        "export: the tokenizer ends a prompt as it ends a document",
        f"{_PACKAGE}/data/hf_tokenizer.py",
        "    backend.post_processor = processors.Sequence([])\n",
        "",
        (f"{_EXPORTS}::test_a_prompt_is_not_ended",),
    ),
    Mutation(
        "export: a tokenizer that made none of the run's tokens is accepted",
        f"{_PACKAGE}/commands/trained_run.py",
        "if not used or one.fingerprint in used}",
        "if used or one.fingerprint in used}",
        (f"{_EXPORTS}::test_the_tokenizer_is_the_one_that_made_the_tokens",),
    ),
]
