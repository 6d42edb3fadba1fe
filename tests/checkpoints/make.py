"""Write tests/checkpoints/saved: ``python -m tests.checkpoints.make [NAME ...]``, by default all of them.

The files were written once, by the code before its core was reorganised, and must not be rewritten to make a test pass:
the tests assert that a later version reads them. Write a new file only for a new kind of checkpoint.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.checkpoints.layouts import LAYOUTS, ZERO
from tests.checkpoints.plain import PLAIN
from tests.checkpoints.saved import pack, write
from tests.deepspeed.build import build_operator
from tests.sharding.pool import Pool


def make_plain(name: str, folder: Path) -> None:
    write(PLAIN[name](), folder)


def make_framework(name: str, folder: Path) -> None:
    importlib.import_module(f"tests.checkpoints.{name}_run").save(folder)


def make_layout(name: str, folder: Path) -> None:
    _on_ranks("tests.checkpoints.layouts:save", name, folder)


def make_zero(name: str, folder: Path) -> None:
    build_operator()
    _on_ranks("tests.checkpoints.zero:save", name, folder)
    if name.endswith("_universal"):
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        saved, universal = folder / "checkpoint" / "saved", folder / "checkpoint" / "universal"
        command += ["--input_folder", str(saved), "--output_folder", str(universal)]
        subprocess.run(command, check=True)
        shutil.rmtree(saved)


def _on_ranks(function: str, name: str, folder: Path) -> None:
    pool = Pool(2)
    try:
        pool.run(function, timeout=300, name=name, folder=str(folder))
    finally:
        pool.stop()


def main(names: list[str]) -> None:
    """Write the files and print each with its size."""
    makers: list[tuple[Iterable[str], Callable[[str, Path], None]]] = [
        (PLAIN, make_plain),
        (("lightning", "accelerate"), make_framework),
        (LAYOUTS, make_layout),
        (ZERO, make_zero),
    ]
    for cases, make in makers:
        for name in cases:
            if not names or name in names:
                with tempfile.TemporaryDirectory() as folder:
                    make(name, Path(folder))
                    path = pack(Path(folder), name)
                print(f"{path.stat().st_size:8,} {path.name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
