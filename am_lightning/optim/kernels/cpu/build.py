"""Loading of the C++ loop: from the wheel, or built at its first use, once for each machine and compiler.

torch.utils.cpp_extension.load is not used, because it needs ninja, and because a process that is killed during a build
leaves a lock for which all later ones wait. Here each process compiles into its own file and renames it, so no process
waits and none sees an incomplete library.
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

from am_lightning.distributed.shard import my_rank
from am_lightning.optim.kernels.cpu.compiler import (
    NO_COMPILER,
    compile_library,
    find_compiler,
    source_key,
    version_of,
)


class Library:
    """The loaded C++ loop.

    Attributes:
        sums, update: the two passes, as C functions.
        paths: ``name -> number`` of the instruction sets in the library that this CPU supports, the best last.
        path: number of the instruction set in use. All of them give the same bits.
        parallel: address of GOMP_parallel, which runs a function in several threads, or None if torch has no OpenMP.
        description: a description for users.
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
    """Load the C++ loop of the package, or build it unless an earlier process has.

    Raises:
        RuntimeError: if there is no compiler or if it fails. The message has its output.
    """
    shipped = Path(__file__).with_name(f"kernels_{source_key()}.so")
    if (library := _loaded(shipped, "of the wheel")) is not None:
        return library
    command = find_compiler()
    if command is None:
        raise RuntimeError(NO_COMPILER)
    try:
        version = version_of(command)
        # Machines of several kinds may share a home folder.
        key = source_key(version, *command, platform.machine(), *platform.libc_ver())
        path = _folder() / f"kernels_{key}.so"
        library = _loaded(path, version) if path.exists() and _is_ours_alone(path) else None
        if library is None:  # missing or damaged
            # Loading from ``path`` would return a library that this process has loaded from there before.
            fresh = path.with_name(f"{path.stem}_{os.getpid()}.so")
            _announce_build(command[0], path.parent)
            try:
                compile_library(command, fresh)
                library = Library(fresh, version)
                os.replace(fresh, path)
            finally:
                fresh.unlink(missing_ok=True)
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"the C++ loop cannot be built or loaded: {error}") from error
    return library


def _announce_build(compiler: str, folder: Path) -> None:
    """Print on rank 0 that this step waits for the compiler, which otherwise prints nothing for several seconds."""
    if my_rank() == 0 and os.environ.get("RANK", "0") == "0":  # RANK: launched, but without a process group
        print(
            f"am_lightning compiles its optimizer kernel for CPUs with {compiler} in {folder}. This happens once and "
            "takes several seconds.",
            file=sys.stderr,
            flush=True,
        )


def why_not(kind: object = None) -> str:
    """Return the reason why the C++ loop does not work, or "". Builds it unless an earlier process has."""
    try:
        load_library()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def require_compiler() -> None:
    """Require a compiler or a library in the package. Nothing is built yet if there is a compiler.

    Raises:
        RuntimeError: if there is neither. The message says what to install.
        ValueError: if ``$CXX`` is not a valid command line.
    """
    if find_compiler() is None and (reason := why_not()):
        raise RuntimeError(f"fused=True on the CPU needs a C++ compiler, but {reason}, or use fused=None")


def _loaded(path: Path, origin: str) -> Library | None:
    """Load a library. Returns None if it is missing, damaged, or built for another C library."""
    try:
        return Library(path, origin)
    except (OSError, AttributeError):
        return None


@functools.cache
def _folder() -> Path:
    """Return the folder of built libraries, in torch's cache of extensions.

    A temporary folder is used if the cache cannot be written, or if another user owns it or may write to it, because
    its files are loaded as code.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    try:
        folder = (Path(root) if root else _user_cache() / "torch_extensions") / "am_lightning"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            if _is_ours_alone(folder) and not _can_be_renamed(folder):
                return folder
    except (OSError, RuntimeError):  # RuntimeError: no home folder is known
        pass
    return Path(tempfile.mkdtemp(prefix="am_lightning_"))


def _is_ours_alone(path: Path) -> bool:
    """Return whether this user owns the path and no other user may write to it."""
    found = path.lstat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _can_be_renamed(folder: Path) -> bool:
    """Return whether other users may replace the folder, because its parent is writable without a sticky bit."""
    mode = folder.parent.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _user_cache() -> Path:
    """Return the cache folder of this user, as torch does. Windows is not covered, because nothing is built there."""
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _openmp() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP runtime of torch, or None.

    The runtimes of GCC, LLVM and Intel have this function. The one of torch is used because threads of a second runtime
    would keep cores spinning.
    """
    for path in _openmp_runtimes():
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _openmp_runtimes() -> list[str]:
    """Return the paths of loaded OpenMP runtimes, those of torch first."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # macOS
        return [str(path) for path in Path(torch.__file__).parent.glob("lib/lib*omp*.dylib")]
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and ".so" in line)
    names = ("libgomp", "libiomp5", "libomp")
    found = [path for name in names for path in paths if Path(path).name.startswith(name)]
    homes = (str(Path(torch.__file__).parent) + os.sep, str(Path(torch.__file__).parents[1] / "torch.libs"))
    return sorted(found, key=lambda path: not path.startswith(homes))
