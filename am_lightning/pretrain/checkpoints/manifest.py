"""Write and check manifests: size and SHA-256 of each file of a checkpoint, and a number that counts checkpoints."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from am_lightning.pretrain.runtime.atomic_files import checksum, replacing

NAME = "manifest.json"  # inside a folder; FILE.manifest.json beside a file
_THREADS = 8  # hashing releases the GIL
HINT = "Free some space and give the same command with --ckpt_path last: the last good checkpoint is still there."


def manifest_of(path: Path) -> Path:
    """Return the path of the manifest of the checkpoint `path`, a file or a folder."""
    return path / NAME if path.is_dir() else path.with_name(f"{path.name}.{NAME}")


def write_manifest(path: Path, folder: Path | None = None) -> None:
    """Write the manifest of the checkpoint at `path`.

    Its number is one above the highest in `folder`, by default that of `path`. The newest checkpoint is found without a
    clock and without the times of files, which a copy may lose.

    Raises:
        RecipeError: if the disk refuses.
    """
    folder = folder or path.parent
    beside = [*folder.glob(f"*.{NAME}"), *folder.glob(f"*/{NAME}")]
    number = 1 + max((found.number for found in map(_read, beside) if found), default=0)
    files = _files(path)
    sizes = [file.stat().st_size for file in files.values()]
    entries = zip(files, sizes, _digests(files.values()), strict=True)
    content = {name: {"size": size, "sha256": digest} for name, size, digest in entries}
    with replacing(manifest_of(path), HINT) as out:
        out.write(json.dumps({"version": 1, "number": number, "files": content}, indent=1).encode())


def damage(path: Path, *, ours: bool = True) -> str | None:
    """Read all of the checkpoint at `path`, and return its damage as text, or None if it is whole.

    A file without a manifest (a copy, or a kill just before) is compared with the CRC-32 checksums inside it, because
    torch.save writes a zip archive. A folder without a manifest was not finished, unless it is not `ours`.
    """
    found = (*_files(path).values(), manifest_of(path.resolve()))
    states = [(str(file), file.stat()) for file in found if file.exists()]
    return _damage(path, ours, tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in states))


@lru_cache  # a resume asks several times, and files may be large
def _damage(path: Path, ours: bool, states: tuple[Any, ...]) -> str | None:
    manifest = manifest_at(path)
    if manifest is not None:
        return _differences(path, manifest.files)
    if path.is_file():
        return _damage_in_zip(path)
    if manifest_of(path).exists():
        return f"its {NAME} cannot be read"
    return f"it has no {NAME}: it was not finished" if ours else None


class Manifest(NamedTuple):
    """The number of a checkpoint (0 if an older version wrote it), and size and SHA-256 of each file by its name."""

    number: int
    files: dict[str, tuple[int, str]]


def manifest_at(path: Path) -> Manifest | None:
    """Return the manifest of `path`, or of a file that it is a hard link to. None if it cannot be read."""
    path = path.resolve()
    names = [path]
    if path.is_file() and not manifest_of(path).exists():
        names += [other for other in path.parent.glob(f"*{path.suffix}") if other.is_file() and other.samefile(path)]
    return next((found for name in names if (found := _read(manifest_of(name)))), None)


def _read(manifest: Path) -> Manifest | None:
    """Return None if the file is missing or has other content."""
    try:
        content = json.loads(manifest.read_text())
        files = {str(name): (int(of["size"]), str(of["sha256"])) for name, of in content["files"].items()}
        inside = not any(Path(name).is_absolute() or ".." in Path(name).parts for name in files)
        return Manifest(int(content.get("number", 0)), files) if files and inside else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _differences(path: Path, wanted: dict[str, tuple[int, str]]) -> str | None:
    files = {name: path if path.is_file() else path / name for name in wanted}
    for name, file in files.items():
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted[name][0]:
            return f"{name} has {file.stat().st_size} bytes, not {wanted[name][0]}"
    try:
        digests = _digests(files.values())
    except OSError as error:
        return str(error)
    wrong = [name for name, digest in zip(files, digests, strict=True) if digest != wanted[name][1]]
    return f"wrong checksum of {wrong[0]}" if wrong else None


def _files(path: Path) -> dict[str, Path]:
    """Return the files of a checkpoint by their names in its manifest."""
    if path.is_file():
        return {path.name: path}
    found = sorted(file for file in path.rglob("*") if file.is_file() and file != path / NAME)
    return {str(file.relative_to(path)): file for file in found}


def _digests(files: Iterable[Path]) -> list[str]:
    """Return the SHA-256 of each file."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(checksum, files))


def _damage_in_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        return f"{path.stat().st_size} bytes: {error}"
    return f"wrong checksum in {member}" if member else None


def sync_files(path: Path) -> None:
    """Flush each file in the folder `path` to the disk."""
    for file in _files(path).values():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
