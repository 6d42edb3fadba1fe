"""The C++ loop is built where torch builds extensions: the same variables and the same default decide."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from am_lightning.optim.kernels.cpu import build as compiler
from am_lightning.optim.kernels.cpu import compiler as calls
from tests.processes import wait_for_end
from tests.python import PYTHON


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def _folder() -> Path:
    return compiler._folder.__wrapped__()


@pytest.mark.parametrize("xdg", [None, "caches"])
def test_the_default_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xdg: str | None) -> None:
    pytest.importorskip("setuptools")  # torch.utils.cpp_extension imports it
    from torch.utils.cpp_extension import get_default_build_root

    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / xdg))
    assert os.path.realpath(_folder()) == os.path.join(get_default_build_root(), "am_lightning")


def test_the_variable_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert _folder() == tmp_path / "extensions" / "am_lightning"


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The XDG specification requires this; torch would write into the working directory."""
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(compiler.sys, "platform", "linux")
    assert _folder() == tmp_path / "home" / ".cache" / "torch_extensions" / "am_lightning"


def test_a_mac_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler.sys, "platform", "darwin")
    assert _folder() == tmp_path / "home" / "Library" / "Caches" / "torch_extensions" / "am_lightning"


def test_a_folder_that_refuses_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert _folder().name.startswith("am_lightning_")


def test_the_folder_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder is private also under a umask that lets others write."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    before = os.umask(0)
    try:
        assert _folder().stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_one_that_others_may_write_to_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "am_lightning").mkdir()
    (tmp_path / "am_lightning").chmod(mode)
    used = _folder()
    assert used.name.startswith("am_lightning_") and used.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_one_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "am_lightning").mkdir(mode=0o700)
    os.chown(tmp_path / "am_lightning", 12345, -1)
    assert _folder().name.startswith("am_lightning_")


def test_one_in_a_folder_that_everybody_may_write_to_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Other users could replace the folder there. In a sticky one such as /tmp they cannot."""
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(shared))
    shared.chmod(0o1777)
    assert _folder() == shared / "am_lightning"
    shared.chmod(0o777)
    assert _folder().name.startswith("am_lightning_")


def test_a_link_is_not_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "am_lightning").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert _folder().name.startswith("am_lightning_")


def test_without_a_home_a_folder_of_this_process_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    assert _folder().name.startswith("am_lightning_")


def test_a_compiler_that_hangs_is_killed_with_what_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hanging = tmp_path / "hanging"
    hanging.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo hanging 1.0;; *) sleep 100 & echo $! >> {tmp_path}/pids; wait;; esac\n"
    )
    hanging.chmod(0o755)
    monkeypatch.setattr(calls, "_SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"hanging .* took more than 1 s"):
        calls.compile_library([str(hanging)], tmp_path / "library.so")
    assert time.monotonic() - start < 30
    wait_for_end(map(int, (tmp_path / "pids").read_text().split()))
    assert {path.name for path in tmp_path.iterdir()} == {"hanging", "pids"}


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_library_that_another_user_planted_is_built_again(tmp_path: Path) -> None:
    """A planted library would run with this user's rights. One without our functions is also rebuilt."""
    program = "from am_lightning.optim.kernels.cpu.build import load_library; print(load_library().description)"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}

    def build() -> str:
        done = subprocess.run([PYTHON, "-c", program], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    built = build()
    (path,) = (tmp_path / "am_lightning").glob("kernels_*.so")
    empty = tmp_path / "empty.so"
    subprocess.run(["c++", "-shared", "-x", "c++", "/dev/null", "-o", str(empty)], check=True)
    for owner, planted in ((12345, path.read_bytes()), (0, b"no library"), (0, empty.read_bytes())):
        path.unlink()  # a loaded library must not be overwritten
        path.write_bytes(planted)
        os.chown(path, owner, -1)
        assert build() == built
        assert path.stat().st_uid == 0 and path.read_bytes()[:4] == b"\x7fELF"
