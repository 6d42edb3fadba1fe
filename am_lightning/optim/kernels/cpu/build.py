"""The CPU's C++ loop: that of the wheel, else one built at its first use, once for each machine and compiler.

Not torch.utils.cpp_extension.load: it needs ninja, and a process killed while it builds leaves a lock for which all
later ones wait. Here every process compiles into a file of its own and renames it: nothing waits, and no half-written
library is ever seen.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch

from am_lightning.optim.kernels.cpu.compiler import (
    NO_COMPILER,
    compile_library,
    find_compiler,
    source_key,
    version_of,
)


class Library:
    """The loaded loop.

    Attributes:
        sums, update: the passes, as C functions.
        paths: the instruction sets of the library that this CPU has, by name, and their numbers; the best last.
        path: the number of the one that is used. All give the same bits.
        parallel: address of the function that runs another in several threads; None: torch has none here.
        description: for people.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self._loaded = ctypes.CDLL(str(path))
        self.sums, self.update = self._loaded.am_sums, self._loaded.am_update
        self.sums.restype = self.update.restype = None
        self._loaded.am_path.restype = ctypes.c_char_p
        self.paths = {name.decode(): number for number, name in self._names() if name}
        name, self.path = list(self.paths.items())[-1]
        self.parallel = _openmp()
        threads = "OpenMP" if self.parallel else "one thread, for torch has no OpenMP here"
        self.description = f"C++ loop ({name}, {origin}, {threads})"

    def _names(self) -> Iterator[tuple[int, bytes]]:
        for number in count():
            name: bytes | None = self._loaded.am_path(number)
            if name is None:
                return
            yield number, name


@functools.cache
def load_library() -> Library:
    """Load the loop that came with the package, or build it where no earlier process has.

    Raises:
        RuntimeError: there is no compiler, or it fails; the text holds what it said.
    """
    shipped = Path(__file__).with_name(f"kernels_{source_key()}.so")
    if (library := _loaded(shipped, "of the wheel")) is not None:
        return library
    command = find_compiler()
    if command is None:
        raise RuntimeError(NO_COMPILER)
    try:
        version = version_of(command)
        # A home folder may be shared by machines of several kinds.
        key = source_key(version, *command, platform.machine(), *platform.libc_ver())
        path = _folder() / f"kernels_{key}.so"
        library = _loaded(path, version) if path.exists() and _is_ours_alone(path) else None
        if library is None:  # also where it is damaged
            fresh = path.with_name(f"{path.stem}_{os.getpid()}.so")  # what was loaded from a path is loaded again
            try:
                compile_library(command, fresh)
                library = Library(fresh, version)
                os.replace(fresh, path)
            finally:
                fresh.unlink(missing_ok=True)
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"the C++ loop cannot be built or loaded: {error}") from error
    return library


def why_not(kind: object = None) -> str:
    """The reason why the loop cannot be had, "" where it can. Builds it where no earlier process has."""
    try:
        load_library()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def require_compiler() -> None:
    """Raise where ``fused=True`` cannot be had; nothing is built yet.

    Raises:
        RuntimeError: there is no compiler, and no library in the package; the text says what to install.
        ValueError: ``$CXX`` is no command line.
    """
    if find_compiler() is None and (reason := why_not()):
        raise RuntimeError(f"fused=True on the CPU needs a C++ compiler, but {reason}, or use fused=None")


def _loaded(path: Path, origin: str) -> Library | None:
    """None where there is none, or where it is damaged or was made for another C library."""
    try:
        return Library(path, origin)
    except (OSError, AttributeError):
        return None


@functools.cache
def _folder() -> Path:
    """In torch's cache of extensions; a folder of this process's where that cannot be written, or others can.

    What lies there is loaded as code: a folder that another user owns or may write to is not used.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    try:
        folder = (Path(root) if root else _user_cache() / "torch_extensions") / "am_lightning"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            if _is_ours_alone(folder) and not _can_be_renamed(folder):
                return folder
    except (OSError, RuntimeError):  # no home folder is known
        pass
    return Path(tempfile.mkdtemp(prefix="am_lightning_"))


def _is_ours_alone(path: Path) -> bool:
    """This user owns it, and nobody else may write to it."""
    found = path.lstat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _can_be_renamed(folder: Path) -> bool:
    """Everybody may put another in its place."""
    mode = folder.parent.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _user_cache() -> Path:
    """Where programs of this user keep what they can make again, as torch finds it. Nothing is built on Windows."""
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _openmp() -> int | None:
    """The address of GOMP_parallel, which the runtimes of GCC, LLVM and Intel have, in the one that torch uses.

    Its threads are those of torch's own operators: threads of another runtime would keep cores spinning.
    """
    for path in _openmp_runtimes():
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _openmp_runtimes() -> list[str]:
    """Files that are loaded, torch's own before any other's."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # macOS
        return [str(path) for path in Path(torch.__file__).parent.glob("lib/lib*omp*.dylib")]
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and ".so" in line)
    names = ("libgomp", "libiomp5", "libomp")
    found = [path for name in names for path in paths if Path(path).name.startswith(name)]
    homes = (str(Path(torch.__file__).parent) + os.sep, str(Path(torch.__file__).parents[1] / "torch.libs"))
    return sorted(found, key=lambda path: not path.startswith(homes))
