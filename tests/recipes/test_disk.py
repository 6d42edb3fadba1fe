"""A disk that becomes full in the middle of a run."""

from __future__ import annotations

import errno
import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from am_lightning.pretrain.runtime.atomic_files import disk_error
from tests.sharding.pool import pools

from .commands import arguments, load, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return 4 MiB: room for the token file, the curves and a few checkpoints of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]).returncode:
        pytest.skip("cannot mount here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(disk: Path, tmp_path: Path, corpus_folder: Path) -> None:
    args = arguments(disk / "run", corpus_folder, 30, "--checkpoint.every_n_train_steps", "1")
    result = run(args, tmp_path)
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith(f"error: cannot write {disk}/run/checkpoints/step-"), result.stderr
    assert "No space left on device" in error
    assert "MB free" in error
    assert "Traceback" not in result.stderr
    steps = sorted((disk / "run" / "checkpoints").glob("step-*.ckpt"))
    assert len(steps) > 3
    last = load(disk / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert steps[-1].name == f"step-{last:06d}.ckpt"
    assert not list((disk / "run" / "checkpoints").glob(".*"))
    for step in steps[:-1]:
        step.unlink()
    resumed = run(arguments(disk / "run", corpus_folder, last + 2, "--ckpt_path", "last"), tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert load(disk / "run" / "checkpoints" / "last.ckpt")["global_step"] == last + 2


@pytest.mark.slow
def test_accelerates_checkpoints_fail_on_all_ranks_and_leave_the_good_ones(disk: Path) -> None:
    """Only rank 0 finds the disk full; the other rank would wait for it."""
    with pools() as start:
        ends = start(2).run(
            "tests.recipes.accelerate_checkpoints:save_until_the_disk_is_full", timeout=60, folder=str(disk / "c")
        )
    assert len(set(ends)) == 1, ends
    made, error = ends[0]
    assert 0 < made < 8
    assert error.startswith(f"cannot write {disk}/c/step-{made + 1:06d}: No space left on device"), error
    assert sorted(path.name for path in (disk / "c").iterdir()) == [f"step-{n:06d}" for n in range(1, made + 1)]


def test_a_file_that_torch_opens_itself_finds_the_disk_full(disk: Path) -> None:
    """The HF Trainer passes paths to torch.save, whose error has no number of the system's then."""
    with pytest.raises(RuntimeError) as caught:
        torch.save(torch.zeros(8_000_000), disk / "optimizer.pt")
    found = disk_error(caught.value)
    assert found is not None and found.errno == errno.ENOSPC


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_the_systems_reason_is_kept_if_torch_has_it(number: int) -> None:
    class Small(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 1000:
                raise OSError(number, os.strerror(number))
            return super().write(data)

    with pytest.raises(RuntimeError) as caught:
        torch.save(torch.zeros(8000), Small())
    found = disk_error(caught.value)
    assert found is not None and found.errno == number
