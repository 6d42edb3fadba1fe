"""A signal to a rank that waits for ranks that never come ends it at once, although Python runs no handler there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.python import PYTHON

from .commands import RECIPES, arguments

pytestmark = pytest.mark.slow


def start(program: str, rank: int, port: int, root: Path, source: Path) -> subprocess.Popen[str]:
    """Start one of two ranks, as torchrun does."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [PYTHON, str(RECIPES / program), *arguments(root, source, 5, "--trainer.devices", "2")],
        cwd=root.parent,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_store(process: subprocess.Popen[str], port: int) -> None:
    """Wait until rank 0 waits for the other rank in the store."""
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "there is no rendezvous"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)


@pytest.mark.parametrize("program", ["pretrain.py", "pretrain_accelerate.py", "pretrain_hf_trainer.py"])
def test_a_rank_that_waits_for_others_ends_at_a_signal(program: str, tmp_path: Path, corpus_folder: Path) -> None:
    port = free_port()
    process = start(program, 0, port, tmp_path / "run", corpus_folder)
    try:
        wait_for_store(process, port)
        process.terminate()
        _, said = process.communicate(timeout=25)  # the rendezvous waits for half an hour
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM outside training: there was nothing to save" in said


def test_a_rank_whose_store_does_not_answer_ends_at_ctrl_c(tmp_path: Path, corpus_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as silent:
        process = start("pretrain_hf_trainer.py", 1, silent.getsockname()[1], tmp_path / "run", corpus_folder)
        try:
            silent.settimeout(120)
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=25)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT, said
    assert "stopped by SIGINT outside training" in said


def test_a_process_whose_stderr_nobody_reads_ends_at_a_signal() -> None:
    """The launcher was killed, so the process cannot write the line about its end."""
    code = "import os, time; from am_lightning.pretrain.runtime.stop_signals import StopSignals\n"
    code += "StopSignals().take(); os.write(1, b'taken'); time.sleep(60)"
    process = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        assert process.stdout.read(5) == b"taken"
        process.stderr.close()
        process.terminate()
        try:
            assert process.wait(20) == 128 + signal.SIGTERM
        finally:
            process.kill()
