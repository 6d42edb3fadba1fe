"""Run a program of recipes/ with data.mode litdata, record the rows that this process gets, and optionally die.

    python recorded.py FOLDER DIES PROGRAM ARGUMENTS...

Each micro-batch adds a line {"step", "rows"} to FOLDER/rank-R.jsonl: its optimizer step, and hashes of its rows. The
process is killed by SIGKILL when it requests the first micro-batch of step DIES (-1: never).
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from am_lightning.pretrain.data.litdata_loader import LitdataLoader

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def record(folder: Path, dies: int) -> None:
    """Make every LitdataLoader record what it yields."""
    real = LitdataLoader.__iter__

    def recorded(loader: LitdataLoader) -> Iterator[Any]:
        order = loader.order
        for number, batch in enumerate(real(loader), order.first_step() * order.accumulate):
            step = number // order.accumulate
            if step == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            rows = batch["input_ids"] if isinstance(batch, dict) else batch
            hashes = [hashlib.sha256(bytes(row)).hexdigest()[:16] for row in rows.numpy()]
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{order.rank}.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "rows": hashes}) + "\n")
            yield batch

    LitdataLoader.__iter__ = recorded  # type: ignore[method-assign]


def main() -> None:
    folder, dies, program = Path(sys.argv[1]), int(sys.argv[2]), str(RECIPES / sys.argv[3])
    record(folder, dies)
    sys.argv = [program, *sys.argv[4:]]
    sys.path.insert(0, str(RECIPES))
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
