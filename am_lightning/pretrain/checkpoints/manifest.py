"""Manifests: name, size and SHA-256 of every file of a checkpoint, written after them and numbered in order."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from am_lightning.pretrain.runtime.atomic_files import replacing

NAME = "manifest.json"  # inside a folder; FILE.manifest.json beside a file
_BLOCK = 1 << 20
_THREADS = 8  # hashing releases the interpreter's lock
HINT = "Free some space and give the same command with --ckpt_path last: the last good checkpoint is still there."

_found_whole: set[tuple[Any, ...]] = set()  # states of files that this process has read already


def manifest_of(path: Path) -> Path:
    """Where the manifest of the checkpoint `path` (a file or a folder) is, or would be."""
    return path / NAME if path.is_dir() else path.with_name(f"{path.name}.{NAME}")


def write_manifest(path: Path, target: Path | None = None) -> None:
    """Describe the checkpoint at `path`; for a file, in the manifest of `target`, by default its own.

    Its number is one above the highest in the same folder: which checkpoint is the newest needs no clock, and no times
    of files, which a copy may lose.

    Raises:
        RecipeError: the disk refuses.
    """
    beside = [*path.parent.glob(f"*.{NAME}"), *path.parent.glob(f"*/{NAME}")]
    number = 1 + max((found.number for found in map(_read, beside) if found), default=0)
    files = {name: {"size": file.stat().st_size, "sha256": digest} for name, file, digest in _digests(path)}
    with replacing(target or manifest_of(path), HINT) as out:
        out.write(json.dumps({"version": 1, "number": number, "files": files}, indent=1).encode())


def number_of(path: Path) -> int | None:
    """How many checkpoints of its folder had been written when `path` was; 0 of an older version's, which did not say.
    None: it has no manifest that can be read."""
    manifest = _manifest_at(path)
    return None if manifest is None else manifest.number


def remove_manifest(path: Path) -> None:
    """Of a file that is about to be replaced: a kill in between must not leave new bytes beside an old manifest."""
    manifest_of(path).unlink(missing_ok=True)


def damage(path: Path, *, ours: bool = True) -> str | None:
    """What is wrong with the checkpoint at `path`, which is there; None where it is whole. Reads all of it.

    A file without a manifest (copied by itself, or the process was killed just before) is compared with the checksums
    inside it (CRC-32, torch.save's format is a zip archive). A folder without one was not finished, if it is `ours`;
    others' may have none.
    """
    state = (ours, *_state(path))
    if state in _found_whole:
        return None
    manifest = _manifest_at(path)
    if manifest is not None:
        found = _differences(path, manifest.files)
    elif path.is_file():
        found = _damage_in_zip(path)
    else:
        there = manifest_of(path).exists()
        found = f"its {NAME} cannot be read" if there else f"it has no {NAME}: it was not finished" if ours else None
    if found is None:
        _found_whole.add(state)
    return found


def _state(path: Path) -> tuple[Any, ...]:
    manifest = manifest_of(path.resolve())
    states = [(str(f), f.stat()) for f in [*_files(path), *([manifest] if manifest.exists() else [])]]
    return (str(path), *((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in states))


class _Manifest(NamedTuple):
    number: int
    files: dict[str, tuple[int, str]]  # name -> size, SHA-256


def _manifest_at(path: Path) -> _Manifest | None:
    """The manifest of `path` or, where that is a hard link, of the file it links to."""
    path = path.resolve()
    names = [path]
    if path.is_file() and not manifest_of(path).exists():
        names += [other for other in path.parent.glob(f"*{path.suffix}") if other.is_file() and other.samefile(path)]
    return next((found for name in names if (found := _read(manifest_of(name)))), None)


def _read(manifest: Path) -> _Manifest | None:
    """None: it is not there, or says something else than a manifest."""
    try:
        content = json.loads(manifest.read_text())
        files = {str(name): (int(of["size"]), str(of["sha256"])) for name, of in content["files"].items()}
        inside = not any(Path(name).is_absolute() or ".." in Path(name).parts for name in files)
        return _Manifest(int(content.get("number", 0)), files) if files and inside else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _differences(path: Path, wanted: dict[str, tuple[int, str]]) -> str | None:
    if path.is_file():
        wanted = {"": next(iter(wanted.values()))}
    files = {name: path / name for name in wanted}
    for name, file in files.items():
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted[name][0]:
            return f"{name or 'it'} has {file.stat().st_size} bytes, not {wanted[name][0]}"
    try:
        for name, _, digest in _digests(path, files.items()):
            if digest != wanted[name][1]:
                return f"wrong checksum{f' of {name}' if name else ''}"
    except OSError as error:
        return str(error)
    return None


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and file != path / NAME)


def _digests(path: Path, files: Iterable[tuple[str, Path]] | None = None) -> list[tuple[str, Path, str]]:
    """(name relative to a folder, path, SHA-256) of every file."""
    if files is None:
        files = [(str(f.relative_to(path)) if path.is_dir() else path.name, f) for f in _files(path)]
    files = list(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_sha256, (file for _, file in files)))
    return [(name, file, digest) for (name, file), digest in zip(files, digests, strict=True)]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _damage_in_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        return f"{path.stat().st_size} bytes: {error}"
    return f"wrong checksum in {member}" if member else None


def sync_files(path: Path) -> None:
    """Flush every file below the folder `path` to the disk."""
    for file in _files(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
