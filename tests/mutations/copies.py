"""Copies of the checkout, in which faults are planted."""

from __future__ import annotations

import compileall
import py_compile
import shutil
import subprocess
from pathlib import Path

from tests.mutations.mutation import Mutation

ROOT = Path(__file__).resolve().parents[2]


def copy_checkout(target: Path) -> Path:
    """Copy the files that git tracks, and those that it neither tracks nor ignores; return ``target``.

    Modules are compiled with the hash of their source, so that bytecode is used only for files without a fault.
    """
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        source, copy = ROOT / name, target / name
        if not source.is_file():  # deleted in the working tree, or a link to a folder
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy, follow_symlinks=False)
    for package in ("am_lightning", "tests"):
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(target / package, quiet=2, invalidation_mode=mode)
    return target


class Planted:
    """A fault in a copy, from ``plant`` until ``remove``."""

    def __init__(self, copy: Path, mutation: Mutation) -> None:
        self._file, self._mutation = copy / mutation.file, mutation
        self._before: bytes | None = None

    def plant(self) -> bool:
        """Write the fault; return False if it does not apply any more."""
        before = self._file.read_bytes() if self._file.is_file() else b""
        after = self._mutation.applied_to(before.decode())
        if after is None:
            return False
        self._before = before
        self._file.write_bytes(after.encode())
        return True

    def remove(self) -> None:
        """Restore the file's own text."""
        if self._before is not None:
            self._file.write_bytes(self._before)
            self._before = None
