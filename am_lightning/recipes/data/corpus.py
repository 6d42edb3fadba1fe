"""Documents to train on: the running Python's own standard library, or a folder of text files."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from am_lightning.recipes.errors import RecipeError

# Left out of the standard library: its tests, what others installed, what is not source. `config-*` and
# `_sysconfigdata*` describe the machine that built this Python, so they would differ from one machine to the next.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
# Source and the documents that are always installed (pydoc's topics are a .py file).
_STDLIB_SUFFIXES = {".py", ".txt", ".rst"}
_BINARY_PROBE = 8192  # bytes; a file with a NUL among them is not text


@dataclass(frozen=True)
class Corpus:
    """Documents as files below one folder.

    Attributes:
        root: the folder.
        names: the documents' paths relative to `root`, with `/`, sorted.
        description: what it is, for messages.
        fingerprint: changes when a document's name, size or time of change does; says when a token file is out of date.
    """

    root: Path
    names: tuple[str, ...]
    description: str
    fingerprint: str

    def documents(self, *, validation: bool, percent: float) -> Iterator[bytes]:
        """The documents of one side of the split, as bytes without NUL. The whole set is never in memory.

        Raises:
            RecipeError: a file cannot be read.
        """
        for name in self.names:
            if is_validation(name, percent) == validation:
                yield _read(self.root / name)


def is_validation(name: str, percent: float) -> bool:
    """Whether a document is held out: a pure function of its relative path, `percent` % of all paths."""
    bucket = int(hashlib.md5(name.encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()[:8], 16)
    return bucket % 10_000 < percent * 100


def find_corpus(source: str) -> Corpus:
    """The corpus called `source`: "stdlib", or a folder's path.

    Raises:
        RecipeError: the folder is missing or holds no text.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        names = _walk(root, suffixes=_STDLIB_SUFFIXES)
        description = f"the standard library of Python {platform.python_version()}"
        cure = "This Python comes without its source: set data.source to a folder of text files."
    else:
        root = Path(source).expanduser()
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise RecipeError(f'data.source {source} {what}. Allowed: "stdlib" or a folder of text files.')
        names = _walk(root, suffixes=None)
        description = f"the text files in {source}"
        cure = "Put text files there (binary and hidden ones are passed over), or set data.source to another folder."
    if not names:
        raise RecipeError(f"data.source {source}: found no text in {root}. {cure}")
    return Corpus(root, names, description, _fingerprint(root, names))


def _walk(root: Path, suffixes: set[str] | None) -> tuple[str, ...]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [f for f in subfolders if not _is_skipped(f, suffixes is not None)]
        for file in files:
            path = Path(folder, file)
            if _is_skipped(file, suffixes is not None) or not path.is_file():
                continue
            if (path.suffix in suffixes) if suffixes is not None else _is_text(path):
                names.append(path.relative_to(root).as_posix())
    return tuple(sorted(names))


def _is_skipped(name: str, stdlib: bool) -> bool:
    if name.startswith("."):
        return True
    return stdlib and (name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_PREFIXES))


def _is_text(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            probe = file.read(_BINARY_PROBE)
    except OSError as error:
        raise _unreadable(path, error) from error
    return bool(probe) and b"\0" not in probe


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().replace(b"\0", b"")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> RecipeError:
    return RecipeError(f"cannot read {path}: {error.strerror}. Make it readable, or take it out of data.source.")


def _fingerprint(root: Path, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        stat = (root / name).stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
