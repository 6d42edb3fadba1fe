"""Manifests: name, size and SHA-256 of every file of a checkpoint, written after all of them."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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

    Raises:
        RecipeError: the disk refuses.
    """
    files = {name: {"size": file.stat().st_size, "sha256": digest} for name, file, digest in _digests(path)}
    with replacing(target or manifest_of(path), HINT) as out:
        out.write(json.dumps({"version": 1, "files": files}, indent=1).encode())


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
        found = _differences(path, manifest)
    elif path.is_file():
        found = _damage_in_zip(path)
    else:
        found = f"it has no {NAME}: it was not finished" if ours or manifest_of(path).exists() else None
    if found is None:
        _found_whole.add(state)
    return found


def _state(path: Path) -> tuple[Any, ...]:
    manifest = manifest_of(path.resolve())
    states = [(str(f), f.stat()) for f in [*_files(path), *([manifest] if manifest.exists() else [])]]
    return (str(path), *((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in states))


def _manifest_at(path: Path) -> dict[str, Any] | None:
    """The manifest of `path` or, where that is a hard link, of the file it links to."""
    path = path.resolve()
    names = [path]
    if path.is_file() and not manifest_of(path).exists():
        names += [other for other in path.parent.glob(f"*{path.suffix}") if other.is_file() and other.samefile(path)]
    for name in names:
        try:
            return dict(json.loads(manifest_of(name).read_text())["files"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _differences(path: Path, manifest: dict[str, Any]) -> str | None:
    files = {"": path} if path.is_file() else {name: path / name for name in manifest}
    wanted = dict(zip(files, manifest.values(), strict=False))
    for name, file in files.items():
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted[name]["size"]:
            return f"{name or 'it'} has {file.stat().st_size} bytes, not {wanted[name]['size']}"
    try:
        for name, _, digest in _digests(path, files.items()):
            if digest != wanted[name]["sha256"]:
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
