"""DeepSpeed's first start on a CPU logs that it compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.package.tree import ROOT

pytest.importorskip("deepspeed")
OPERATOR = "deepspeed_shm_comm"
CODE = """
import os, sys
from lightning.pytorch.utilities import rank_zero_only
from am_lightning.pretrain.runtime.operator_build import announce_deepspeed_build
for folder in sys.argv[1:]:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    for rank_zero_only.rank in (0, 1):
        print("case", os.path.basename(folder), rank_zero_only.rank, file=sys.stderr, flush=True)
        announce_deepspeed_build()
"""


@pytest.mark.slow
def test_rank_0_says_that_deepspeed_compiles_and_only_where_it_does(tmp_path: Path) -> None:
    for name in ("empty", "locked", "built"):
        (tmp_path / name / OPERATOR).mkdir(parents=True)
    (tmp_path / "locked" / OPERATOR / "lock").touch()
    (tmp_path / "built" / OPERATOR / f"{OPERATOR}.so").touch()
    folders = [str(tmp_path / name) for name in ("empty", "locked", "built")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE, *folders], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("case", "DeepSpeed "))]
    said = {tuple(line.split()[1:]): after for line, after in zip(lines, [*lines[1:], "case"], strict=True)}
    said = {case: text for case, text in said.items() if text.startswith("DeepSpeed ") and len(case) == 2}
    assert set(said) == {("empty", "0"), ("locked", "0")}
    assert "compiles" in said["empty", "0"] and f"{tmp_path}/empty/{OPERATOR}" in said["empty", "0"]
    assert f"Remove {tmp_path}/locked/{OPERATOR}/lock" in said["locked", "0"]
