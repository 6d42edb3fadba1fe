"""Files that are whole or not there, and what is said about those that are not whole."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from am_lightning.recipes.checkpoints import (
    AtomicCheckpointIO,
    RunCheckpoint,
    check_readable,
    replace_with_link,
    saved_step,
)
from am_lightning.recipes.errors import RecipeError
from am_lightning.recipes.files import replacing

SMALL = {"global_step": 7, "weights": torch.zeros(2000)}  # 8 kB


def save(path: Path, step: int = 7, age: int = 0) -> Path:
    AtomicCheckpointIO().save_checkpoint({**SMALL, "global_step": step}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
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
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named_with_the_newest_whole_one(tmp_path: Path, damage: object) -> None:
    save(tmp_path / "step-1.ckpt", age=30)
    older = save(tmp_path / "step-2.ckpt", age=20)
    also_broken = save(tmp_path / "step-3.ckpt", age=10)
    newest = save(tmp_path / "step-4.ckpt")
    replace_with_link(newest, tmp_path / "last.ckpt")
    for path in (also_broken, newest):  # last.ckpt is the same file as the newest
        damage(path)  # type: ignore[operator]
    with pytest.raises(RecipeError) as caught:
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert f"the checkpoint {tmp_path / 'last.ckpt'} is broken" in str(caught.value)
    assert str(caught.value).endswith(f"--ckpt_path {older}")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone.ckpt: there is no such file.*no other whole checkpoint"):
        check_readable(tmp_path / "gone.ckpt")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(RecipeError, match=r"other.ckpt is no checkpoint of this program"):
        saved_step(tmp_path / "other.ckpt")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path, "cure") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


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
    with pytest.raises(RecipeError, match=r"cannot write .*last.ckpt: No space left.*MB free.*last good checkpoint"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    assert saved_step(path) == 7
    assert list(small_disk.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"cannot write .*a.ckpt: Not a directory|File exists"):
        save(tmp_path / "file" / "a.ckpt")


def test_the_link_is_replaced_and_is_the_same_file(tmp_path: Path) -> None:
    first, second, last = save(tmp_path / "1.ckpt"), save(tmp_path / "2.ckpt"), tmp_path / "last.ckpt"
    for target in (first, second, second):
        replace_with_link(target, last)
        assert last.samefile(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.ckpt", "2.ckpt", "last.ckpt"]


@pytest.mark.parametrize("argument", [{"keep": 0}, {"every_n_train_steps": 0}, {"every_n_train_steps": -3}])
def test_a_wrong_argument_is_named(argument: dict[str, int]) -> None:
    (name, value) = next(iter(argument.items()))
    with pytest.raises(RecipeError, match=rf"checkpoint.{name} is {value}; allowed: "):
        RunCheckpoint(**argument)
