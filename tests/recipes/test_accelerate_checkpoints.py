"""Checkpoint folders of Accelerate, the HF Trainer and strategies that shard."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from am_lightning.pretrain.checkpoints import AtomicCheckpointIO
from am_lightning.pretrain.checkpoints.accelerate import AccelerateCheckpoints
from am_lightning.pretrain.checkpoints.manifest import write_manifest
from am_lightning.pretrain.runtime.errors import RecipeError
from tests.sharding.pool import pools


@pytest.mark.slow
def test_a_step_saved_again_replaces_the_first_and_clears_what_a_kill_left(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in (".step-000004.part", ".step-000005.old.part"):
        (folder / name).mkdir(parents=True)
        (folder / name / "half").touch()
    with pools() as start:
        ends = start(2).run("tests.recipes.accelerate_checkpoints:save_one_step_twice", timeout=60, folder=str(folder))
    assert ends == [(["step-000005"], True)] * 2


class Code:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def checkpoints_of_one_process(folder: Path) -> AccelerateCheckpoints:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    accelerator.prepare(model, optimizer)
    return AccelerateCheckpoints(accelerator, folder, 2, {"schedule": schedule})


@pytest.fixture
def checkpoints(tmp_path: Path) -> Any:
    yield checkpoints_of_one_process(tmp_path / "checkpoints")
    AcceleratorState._reset_state()
    PartialState._reset_state()


def test_no_file_of_a_checkpoint_runs_code(checkpoints: AccelerateCheckpoints, tmp_path: Path) -> None:
    """Whoever can write to the folder can write its manifest, too."""
    path = checkpoints.save(1)
    names = {file.name for file in path.iterdir()} - {"manifest.json"}
    assert {"states.pt", "optimizer.bin", "random_states_0.pkl"} <= names
    for name in sorted(names | {"custom_checkpoint_0.pkl"}):
        before = (path / name).read_bytes() if name in names else None
        for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))):
            write(Code(tmp_path / "ran"), path / name)
            write_manifest(path)
            try:
                checkpoints.load("last")
            except Exception as error:  # safetensors and Accelerate have errors of their own
                theirs = name in ("model.safetensors", "custom_checkpoint_0.pkl")
                assert theirs or isinstance(error, pickle.UnpicklingError), name
            assert not (tmp_path / "ran").exists(), name
        if before is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(before)
    write_manifest(path)
    assert checkpoints.load("last") == path
    pickle.loads(pickle.dumps(Code(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # the planted pickle does run code


def test_a_checkpoint_of_another_engine_is_refused(checkpoints: AccelerateCheckpoints) -> None:
    path = checkpoints.save(1)
    (path / "model.safetensors").rename(path / "pytorch_model_fsdp_0")
    write_manifest(path)
    with pytest.raises(RecipeError, match=r"step-000001 has no .*: resume with the engine of Accelerate"):
        checkpoints.load("last")


def test_a_resume_begins_with_a_whole_step(checkpoints: AccelerateCheckpoints) -> None:
    """accumulate_grad_batches was 3 and is 4. Two other micro-batches are forgotten, like those of a new process."""
    accelerator = checkpoints.accelerator
    model = torch.nn.Linear(3, 3)

    def steps(micro_batches: int, accumulate: int) -> list[bool]:
        accelerator.gradient_accumulation_steps = accumulate
        found = []
        for _ in range(micro_batches):
            with accelerator.accumulate(model):
                found.append(accelerator.sync_gradients)
        return found

    steps(6, 3)
    checkpoints.save(2)
    steps(2, 3)
    checkpoints.load("last")
    assert steps(8, 4) == 2 * [False, False, False, True]


def test_documents_that_are_gone_end_all_ranks(tmp_path: Path) -> None:
    """One process of the machine looks for them."""
    with pools() as start:
        ends = start(2).run(
            "tests.recipes.accelerate_checkpoints:open_missing_documents", timeout=60, folder=str(tmp_path)
        )
    assert ends[0] == ends[1]
    threads, error = ends[0]
    assert threads == 2 and f"data.source {tmp_path}/gone does not exist" in error


def test_the_newest_go_by_their_numbers_and_a_damaged_one_is_passed_over(checkpoints: AccelerateCheckpoints) -> None:
    for number, step in enumerate((7, 9, 8)):  # 8 after a return to an earlier step
        path = checkpoints.save(step)
        for file in (path, path / "manifest.json"):
            os.utime(file, (2e9 - number, 2e9 - number))
    folder = checkpoints.folder
    torch.save({}, folder / "step-000010.ckpt")  # pretrain.py's, which is not loaded and not removed
    checkpoints.save(8)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000008", "step-000009", "step-000010.ckpt"]
    assert checkpoints.newest() == checkpoints.load("last") == folder / "step-000008"
    for name in ("random_states_0.pkl", "states.pt"):
        content = bytearray((folder / "step-000008" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "step-000008" / name).write_bytes(content)
        with pytest.warns(UserWarning, match=rf"step-000008 is broken \(wrong checksum of .*{name}"):
            assert checkpoints.load("last") == folder / "step-000009"
        with pytest.raises(RecipeError, match=r"Resume from an older one: --ckpt_path .*step-000009"):
            checkpoints.load(str(folder / "step-000008"))
        content[len(content) // 2] ^= 1
        (folder / "step-000008" / name).write_bytes(content)
    with pytest.raises(
        RecipeError, match=r"there is no such file or folder\. Resume from an older one: --ckpt_path .*-000008"
    ):
        checkpoints.load(str(folder / "step-000010"))


def test_shards_are_refused_where_a_file_is_loaded(tmp_path: Path) -> None:
    """The run had FSDP2 and resumes in one process."""
    (tmp_path / "step-000002.ckpt").mkdir()
    torch.save({"global_step": 2}, tmp_path / "step-000002.ckpt" / "meta.pt")
    write_manifest(tmp_path / "step-000002.ckpt")
    with pytest.raises(RecipeError, match=r"is a folder, and trainer\.strategy loads a file"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step-000002.ckpt")
