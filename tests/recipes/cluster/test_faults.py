"""A rank that is killed, stopped or slow, and a DataLoader's worker; faults.py has all programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from .faults import KINDS, last_words, run


@pytest.mark.nightly("faults")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_one_rank_ends_the_run_or_nothing(kind: str, tmp_path: Path, corpus_folder: Path) -> None:
    status, _, said = run(tmp_path, corpus_folder, "pretrain_accelerate.py", kind)
    if kind == "slow":
        assert status == 0, said
    else:
        assert status not in (0, None), said
        assert last_words(said), said
