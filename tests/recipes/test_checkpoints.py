"""Files are complete or absent, and incomplete ones are named."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from am_lightning.pretrain.checkpoints import AtomicCheckpointIO, RunCheckpoint
from am_lightning.pretrain.checkpoints.atomic import replace_with_link
from am_lightning.pretrain.checkpoints.manifest import manifest_of, write_manifest
from am_lightning.pretrain.checkpoints.resume import check_readable, newest_first, newest_whole, saved_step
from am_lightning.pretrain.checkpoints.writer import CheckpointWriter
from am_lightning.pretrain.runtime.atomic_files import replacing
from am_lightning.pretrain.runtime.errors import RecipeError

from .small_run import Options, run

SMALL = {"global_step": 7, "weights": torch.zeros(2000)}  # 8 kB


_CLOCK = itertools.count(2_000_000_000, -100)


def save(path: Path, step: int = 7) -> Path:
    """Save with a clock that runs backwards, so that later checkpoints seem older."""
    AtomicCheckpointIO().save_checkpoint({**SMALL, "global_step": step}, path)
    time = next(_CLOCK)
    for file in (path, manifest_of(path)):
        os.utime(file, (time, time))
    return path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [truncate, flip, lambda p: os.truncate(p, 0), lambda p: p.write_bytes(b"no checkpoint")]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "a.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == saved_step(path) == 7
    assert {p.name for p in path.parent.iterdir()} == {"a.ckpt", "a.ckpt.manifest.json"}
    assert json.loads(manifest_of(path).read_text())["files"] == {
        "a.ckpt": {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    }


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("manifest", [True, False])
def test_the_newest_whole_one_is_chosen_and_the_broken_ones_are_named(
    tmp_path: Path, damage: Callable[[Path], None], manifest: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """Without a manifest, as after a kill just after the rename, the checksums inside the file decide."""
    save(tmp_path / "step-000001.ckpt", 1)
    whole = save(tmp_path / "step-000002.ckpt", 2)
    newest = save(tmp_path / "step-000003.ckpt", 3)
    replace_with_link(newest, tmp_path / "last.ckpt")
    if not manifest:
        manifest_of(newest).unlink()
    assert newest_whole(tmp_path) == tmp_path / "last.ckpt"
    damage(newest)
    assert newest_whole(tmp_path) == whole
    (told,) = [str(w.message) for w in recwarn]
    assert f"{tmp_path / 'last.ckpt'} is broken" in told
    assert f"resuming from {whole}" in told
    damage(whole)
    damage(tmp_path / "step-000001.ckpt")
    with pytest.raises(RecipeError, match=r"no checkpoint in .* is whole: .*Start again") as caught:
        newest_whole(tmp_path)
    assert all(name in str(caught.value) for name in ("last.ckpt", "step-000002.ckpt", "step-000001.ckpt"))


def test_without_last_ckpt_the_newest_step_is_chosen(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    save(tmp_path / "step-000001.ckpt")
    newest = save(tmp_path / "step-000002.ckpt")
    assert newest_whole(tmp_path) == newest


@pytest.mark.parametrize("manifests", ["of an older version", "lost"])
def test_checkpoints_without_numbers_go_by_their_steps(tmp_path: Path, manifests: str) -> None:
    """A copy may also lose the files' times. A checkpoint that is written afterwards is the newest."""
    paths = [save(tmp_path / f"step-{step:06d}.ckpt", step) for step in (9, 10, 8)]
    for path in paths:
        content = json.loads(manifest_of(path).read_text())
        del content["number"]
        manifest_of(path).write_text(json.dumps(content))
        if manifests == "lost":
            manifest_of(path).unlink()
    shutil.copyfile(paths[1], tmp_path / "last.ckpt")
    assert newest_first(list(tmp_path.glob("step-*.ckpt"))) == [paths[1], paths[0], paths[2]]
    assert saved_step(newest_whole(tmp_path) or tmp_path) == 10
    earlier = save(tmp_path / "step-000004.ckpt", 4)  # after a return to an earlier step
    assert newest_whole(tmp_path) == earlier


def test_what_a_kill_left_without_a_manifest_is_the_newest(tmp_path: Path) -> None:
    older = save(tmp_path / "step-000002.ckpt", 2)
    replace_with_link(older, tmp_path / "last.ckpt")
    newest = save(tmp_path / "step-000003.ckpt", 3)
    manifest_of(newest).unlink()
    assert newest_whole(tmp_path) == newest


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {}}',
        '{"files": {"a": 7}}',
        '{"files": {"a": {"size": "x", "sha256": "y"}}}',
        '{"files": {"a": {"size": 7}}}',
        '{"number": null, "files": {"a": {"size": 7, "sha256": "y"}}}',
    ],
)
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.filterwarnings("ignore:the checkpoint:UserWarning")
def test_a_manifest_that_is_none_stops_nothing(tmp_path: Path, content: str, folder: bool) -> None:
    """A file has checksums of its own, but a folder without a manifest cannot be verified."""
    make = save_folder if folder else save
    older, newest = (make(tmp_path / f"step-{step:06d}.ckpt", step) for step in (1, 2))
    replace_with_link(newest, tmp_path / "last.ckpt")
    manifest_of(newest).write_text(content)
    assert (newest_whole(tmp_path) or tmp_path).samefile(older if folder else newest)
    assert newest_whole(tmp_path) is not None and manifest_of(save(tmp_path / "step-000003.ckpt", 3)).exists()


def save_folder(path: Path, step: int) -> Path:
    """Save a folder as CheckpointWriter leaves a sharded one."""
    (path / "sub").mkdir(parents=True)
    torch.save({"global_step": step}, path / "meta.pt")
    (path / "sub" / "__0_0.distcp").write_bytes(os.urandom(1000))
    (path / ".metadata").write_bytes(b"metadata")
    write_manifest(path)
    return path


def rename_in_manifest(folder: Path, prefix: str) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sub/', f'"{prefix}'))


FOLDER_DAMAGES: list[Callable[[Path], None]] = [
    lambda p: truncate(p / "sub" / "__0_0.distcp"),
    lambda p: flip(p / "sub" / "__0_0.distcp"),
    lambda p: (p / ".metadata").unlink(),
    lambda p: (p / "manifest.json").unlink(),
    lambda p: truncate(p / "manifest.json"),
    lambda p: rename_in_manifest(p, f"../{p.name}/sub/"),  # the same files, by paths that leave the folder
    lambda p: rename_in_manifest(p, f"{p}/sub/"),
]


@pytest.mark.parametrize("damage", FOLDER_DAMAGES)
def test_a_folder_is_whole_only_with_all_of_its_files(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    older, newest = (save_folder(tmp_path / f"step-{step:06d}.ckpt", step) for step in (1, 2))
    last = tmp_path / "last.ckpt"
    for target in (older, newest):
        replace_with_link(target, last)
        assert last.is_symlink()
        assert saved_step(last) == saved_step(target)
    assert newest_whole(tmp_path) == last
    damage(newest)
    with pytest.warns(UserWarning, match="is broken"):
        assert newest_whole(tmp_path) == older


def test_another_tools_folder_needs_no_manifest(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "theirs.ckpt", 3)
    (folder / "manifest.json").unlink()
    check_readable(folder)


def test_a_new_file_is_never_beside_an_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may be killed at any time while it overwrites a checkpoint."""
    path = save(tmp_path / "a.ckpt", 1)
    real = os.replace

    def killed(source: Any, target: Any) -> None:
        real(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({**SMALL, "global_step": 2}, path)
    assert saved_step(path) == 2
    check_readable(path)


def test_the_oldest_go_with_their_manifests(tmp_path: Path) -> None:
    """The order is that of writing: after a return to an early step, its successors are the newest."""
    callback = RunCheckpoint(str(tmp_path), keep=2)
    for step in (10, 30, 20, 25):
        callback._publish(save(tmp_path / f"step-{step:06d}.ckpt", step))
    kept = ["step-000020.ckpt", "step-000025.ckpt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["last.ckpt", *kept, *(f"{name}.manifest.json" for name in kept)]
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named_with_the_newest_whole_one(tmp_path: Path, damage: object) -> None:
    save(tmp_path / "step-1.ckpt")
    older = save(tmp_path / "step-2.ckpt")
    also_broken = save(tmp_path / "step-3.ckpt")
    newest = save(tmp_path / "step-4.ckpt")
    replace_with_link(newest, tmp_path / "last.ckpt")
    for path in (also_broken, newest):  # last.ckpt is the same file as the newest
        damage(path)  # type: ignore[operator]
    with pytest.raises(RecipeError) as caught:
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert f"the checkpoint {tmp_path / 'last.ckpt'} is broken" in str(caught.value)
    assert str(caught.value).endswith(f"--ckpt_path {older}")


def test_a_link_to_a_checkpoint_that_is_gone_is_no_older_one(tmp_path: Path) -> None:
    (tmp_path / "step-2.ckpt").write_bytes(b"half of one")
    (tmp_path / "step-3.ckpt").symlink_to(tmp_path / "gone")
    with pytest.raises(RecipeError, match=r"step-2.ckpt is broken .* no other whole checkpoint"):
        check_readable(tmp_path / "step-2.ckpt")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone.ckpt: there is no such file or folder.*no other whole checkpoint"):
        check_readable(tmp_path / "gone.ckpt")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(RecipeError, match=r"other.ckpt is not a checkpoint of this program"):
        saved_step(tmp_path / "other.ckpt")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path, "cure") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Yield what happens to files: "flushed NAME" and "renamed NAME", with the old name."""
    happened: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        happened.append(f"flushed {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        happened.append(f"renamed {Path(source).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return happened


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to tell a descriptor's file from")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may lose the content but keep the rename, which would leave an empty file of the right name."""
    happened = watched(monkeypatch)
    save(tmp_path / "a.ckpt")
    parts = [f".{name}.{os.getpid()}.part" for name in ("a.ckpt", "a.ckpt.manifest.json")]
    assert happened == [
        text for part in parts for text in (f"flushed {part}", f"renamed {part}", f"flushed {tmp_path.name}")
    ]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to tell a descriptor's file from")
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-000001.ckpt"
    part = CheckpointWriter._part(path)
    save_folder(part, 1)
    writer = CheckpointWriter.__new__(CheckpointWriter)
    writer.folders, writer.published = True, lambda path: None
    happened = watched(monkeypatch)
    writer._finish(path)
    assert happened.index(f"renamed {part.name}") == len(happened) - 2
    assert {"flushed __0_0.distcp", "flushed meta.pt", "flushed .metadata"} <= set(happened[:-2])
    assert happened[-1] == f"flushed {tmp_path.name}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]).returncode:
        pytest.skip("cannot mount here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_names_the_file_and_leaves_the_old_one(small_disk: Path) -> None:
    path = save(small_disk / "last.ckpt")
    before = sorted(small_disk.iterdir())
    with pytest.raises(RecipeError, match=r"cannot write .*last.ckpt: No space left.*4.0 MB are needed.*MB free"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    other = {str(i): 0 for i in range(300_000)}  # the check of free space counts tensors only
    with pytest.raises(RecipeError, match=r"cannot write .*last.ckpt: No space left.*MB free.*last good checkpoint"):
        AtomicCheckpointIO().save_checkpoint({"other": other}, path)
    assert saved_step(path) == 7
    check_readable(path)
    assert sorted(small_disk.iterdir()) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"cannot write .*a.ckpt: Not a directory|File exists"):
        save(tmp_path / "file" / "a.ckpt")


def test_the_link_is_replaced_and_is_the_same_file(tmp_path: Path) -> None:
    first, second, last = save(tmp_path / "1.ckpt"), save(tmp_path / "2.ckpt"), tmp_path / "last.ckpt"
    for target in (first, second, second):
        replace_with_link(target, last)
        assert last.samefile(target)
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["1.ckpt", "2.ckpt", "last.ckpt"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("argument", [{"keep": 0}, {"every_n_train_steps": 0}, {"every_n_train_steps": -3}])
def test_a_wrong_argument_is_named(argument: dict[str, int]) -> None:
    (name, value) = next(iter(argument.items()))
    with pytest.raises(RecipeError, match=rf"checkpoint.{name} is {value}; allowed: "):
        RunCheckpoint(**argument)


class MakesFile:
    """An object whose unpickling runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    assert run(Options(str(tmp_path), steps=2)) == "finished"
    last = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    AtomicCheckpointIO().save_checkpoint({**checkpoint, "more": MakesFile(tmp_path / "ran")}, last)
    with pytest.raises(pickle.UnpicklingError):
        run(Options(str(tmp_path), steps=4))
    assert not (tmp_path / "ran").exists()


def test_what_fails_in_the_background_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends no later than the next checkpoint, and the previous checkpoint stays."""
    real = AtomicCheckpointIO.save_checkpoint

    def refused(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Any, *args: Any) -> None:
        if checkpoint["global_step"] == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(self, checkpoint, path, *args)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", refused)
    ended = run(Options(str(tmp_path), steps=30, asynchronous=True))
    assert ended.startswith(f"error: cannot write {tmp_path / 'checkpoints' / 'step-000006.ckpt'}: No space left")
    assert saved_step(tmp_path / "checkpoints" / "last.ckpt") == 3
    assert {p.name for p in (tmp_path / "checkpoints").glob("*.ckpt")} == {"last.ckpt", "step-000003.ckpt"}


def test_without_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is in the foreground, also if the writing is in the background."""
    full = SimpleNamespace(free=100)
    begun: list[Any] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", lambda self, checkpoint, path: begun.append(path))
    ended = run(Options(str(tmp_path), steps=30, asynchronous=True))
    assert "step-000003.ckpt: No space left on device: about 0.0 MB are needed" in ended
    assert begun == []
