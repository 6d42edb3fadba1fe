"""Faults of the readers' intervals, of what is saved of them, and of the run's history."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_TALLY = "am_lightning/optim/step_stats.py"
_INTERVALS = "am_lightning/optim/intervals.py"
_READER = "am_lightning/loggers/reader.py"
_METRICS = "am_lightning/loggers/metrics.py"
_HISTORY = "am_lightning/loggers/history.py"
_TRAINER = "am_lightning/huggingface/trainer.py"

_TESTS = "tests/loggers/test_intervals.py"
_OF_HISTORY = "tests/loggers/test_history.py"
_OF_HF = "tests/huggingface/test_intervals.py"

MUTATIONS = [
    Mutation(
        "a reading does not empty the tally",
        _TALLY,
        "        emptied(self.numbers)\n        return taken",
        "        return taken",
        (f"{_TESTS}::test_each_reader_has_an_interval_of_its_own",),
    ),
    Mutation(
        "steps in which a tensor took no part count in its lowest beta_t",
        _TALLY,
        "torch.where(active, beta, self._nan)",
        "beta",
        (f"{_TESTS}::test_what_a_tensor_took_no_part_in_is_not_in_its_numbers",),
    ),
    Mutation(
        "a number of the host is copied to the device at every step",
        _TALLY,
        "torch.where(active, beta, self._nan)",
        'torch.where(active, beta, float("nan"))',
        (f"{_TESTS}::test_a_step_costs_six_operations_however_many_tensors_there_are",),
    ),
    Mutation(
        "a changed cap is not used",
        _TALLY,
        "if cap is not self._cap or",
        "if self._cap is None or",
        (f"{_TESTS}::test_a_changed_cap_is_the_one_that_is_met",),
    ),
    Mutation(
        "the tallies of an earlier layout are lost",
        _TALLY,
        'until they are read."""\n        self._of_layout = {}',
        'until they are read."""\n        self._of_layout, self._tallies = {}, {}',
        (f"{_TESTS}::test_tensors_that_are_named_or_moved_between_readings_lose_nothing[cast]",),
    ),
    Mutation(
        "tallies of earlier names are kept forever",
        _TALLY,
        "if id(tally) in in_use}",
        "if id(tally) in in_use or True}",
        (f"{_TESTS}::test_tallies_of_earlier_names_are_forgotten_when_they_are_read",),
    ),
    Mutation(
        "the steps before tensors were named are lost",
        _INTERVALS,
        "if not pairs and len(names) == len(names_of_part):",
        "if False:",
        (f"{_TESTS}::test_tensors_that_are_named_or_moved_between_readings_lose_nothing[rename]",),
    ),
    Mutation(
        "the highest beta_t of two parts is that of the first",
        _INTERVALS,
        "torch.fmax(one[5:], other[5:])",
        "one[5:]",
        (f"{_TESTS}::test_tensors_that_are_named_or_moved_between_readings_lose_nothing[cast]",),
    ),
    Mutation(
        "a user's own reading ends the logger's interval",
        _READER,
        "self if step is None else self.history)",
        "self.history)",
        (f"{_TESTS}::test_each_reader_has_an_interval_of_its_own",),
    ),
    Mutation(
        "the interval in a checkpoint is counted twice",
        _READER,
        "self._carried, self._loaded = ([], nothing(_HOST, 0)), False",
        "pass",
        (f"{_TESTS}::test_saving_takes_nothing_from_an_interval",),
    ),
    Mutation(
        "steps that a return to a checkpoint takes back are counted",
        _READER,
        "        if not self._loaded:\n",
        "        if False:\n",
        (f"{_TESTS}::test_a_return_to_an_earlier_checkpoint_leaves_out_what_came_after_it",),
    ),
    Mutation(
        "the mean is over tensors and not over their steps",
        _METRICS,
        "mean = total / steps\n",
        "mean = total / len(self.names)\n",
        (f"{_TESTS}::test_a_writer_gets_the_mean_and_the_ends_of_the_interval[7]",),
    ),
    Mutation(
        "the lowest of a layer is that of its first tensor",
        _METRICS,
        '"inf")).scatter_reduce(0, self._of, interval.lowest, "amin")',
        '"inf")).index_copy(0, self._of.flip(0), interval.lowest.flip(0))',
        (f"{_TESTS}::test_a_writer_gets_the_mean_and_the_ends_of_the_interval[7]",),
    ),
    Mutation(
        "a run whose length is not known is drawn at every reading",
        _HISTORY,
        "int(math.log(max(self.step, 1)) / math.log(_GROWTH))",
        "self.step",
        (f"{_OF_HISTORY}::test_a_run_has_some_pictures_and_never_more_than_forty",),
    ),
    Mutation(
        "the last of the dips of a layer is named, not the deepest",
        _HISTORY,
        "if value < self._dips.get(layer, Dip(math.inf, 0, 0)).lowest:",
        "if value < math.inf:",
        (f"{_OF_HISTORY}::test_the_sentence_names_the_deepest_layers_and_when",),
    ),
    Mutation(
        "HF Trainer: a resumed run's first interval has the steps since the resume only",
        _TRAINER,
        'self._reader.load_state_dict(saved["reader"])',
        "pass",
        (f"{_OF_HF}::test_a_resumed_trainer_continues_in_its_interval",),
    ),
    Mutation(
        "HF Trainer: a run resumed from an older version's checkpoint saves no interval",
        _TRAINER,
        ".setdefault(type(self).__name__, {})",
        ".get(type(self).__name__, {})",
        (f"{_OF_HF}::test_a_resumed_trainer_continues_in_its_interval",),
    ),
    Mutation(
        "HF Trainer: the line of a second train() covers both",
        _TRAINER,
        "self._reader.history = RunHistory()",
        "pass",
        (f"{_OF_HF}::test_a_second_train_is_a_run_of_its_own",),
    ),
    Mutation(
        "a page of TensorBoard replaces the pages of other programs",
        "am_lightning/loggers/custom_scalars.py",
        "written |= pages",
        "written = pages",
        ("tests/loggers/test_custom_scalars.py::test_what_is_written_later_leaves_what_is_there",),
    ),
    Mutation(
        "a resumed run has as many pictures as one that begins",
        _HISTORY,
        'self._drawn, self._pictures = state_dict["pictures"]',
        'state_dict["pictures"]',
        (f"{_OF_HISTORY}::test_a_run_that_is_resumed_again_and_again_has_those_of_one_that_is_not",),
    ),
]
