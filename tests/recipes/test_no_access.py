"""A run's folder that this user may not read or write: one line that names it, never a start from step 0."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from am_lightning.pretrain.checkpoints.resume import newest_whole
from am_lightning.pretrain.runtime.main import command_line
from tests.python import COLD  # a fork server would keep the rights that setpriv takes away

from .commands import RECIPES, arguments


@pytest.mark.parametrize("closed", [".", "checkpoints"])
def test_checkpoints_that_may_not_be_read_are_not_none_yet(nobodys_folder: Path, closed: str) -> None:
    (nobodys_folder / "run" / "checkpoints").mkdir(parents=True)
    (nobodys_folder / "run" / closed).chmod(0)
    try:
        wanted = pytest.raises(SystemExit, match=r"^error: no access to .*/run.*: Permission denied\. Change its mode")
        with wanted, command_line(imports=False):
            newest_whole(nobodys_folder / "run" / "checkpoints")
    finally:
        (nobodys_folder / "run" / closed).chmod(0o700)


@pytest.mark.nightly("no access")
@pytest.mark.parametrize("program", ["pretrain.py", "pretrain_accelerate.py", "pretrain_hf_trainer.py"])
@pytest.mark.parametrize("mode", [0o500, 0])
def test_programs_name_the_folder(program: str, mode: int, tmp_path: Path, corpus_folder: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    root.chmod(mode)
    command = [COLD, str(RECIPES / program), *arguments(root, corpus_folder, 4, "--ckpt_path", "last")]
    if os.geteuid() == 0:  # root may read and write everything
        setpriv = shutil.which("setpriv") or pytest.skip("root needs setpriv to give up its rights")
        command = [setpriv, "--bounding-set=-all", "--inh-caps=-all", *command]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    root.chmod(0o700)
    assert done.returncode == 1
    assert f" {root}" in done.stderr.splitlines()[-1], done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
