"""Build hook of hatchling, which adds the C++ loop to a wheel if there is a compiler.

Such a wheel is for one operating system and architecture, and for every Python. Without a compiler, and with
``HATCH_BUILD_NO_HOOKS=true``, the wheel is for all systems, and the loop is built at its first use. Nothing is built
for an editable installation.
"""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_COMPILER = Path(__file__).with_name("compiler.py")


def _compiler() -> ModuleType:
    """Import compiler.py by its path, because the package imports torch, which is missing while a wheel is built."""
    spec = importlib.util.spec_from_file_location("am_lightning_cpu_compiler", _COMPILER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CppLoop(BuildHookInterface[Any]):
    """Adds ``kernels_<key of the sources>.so`` beside the sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library before the files are collected. ``version`` is "standard" or "editable"."""
        if version == "editable":
            return
        compiler = _compiler()
        self._folder = tempfile.TemporaryDirectory(prefix="am_lightning_wheel_")
        library = Path(self._folder.name, f"kernels_{compiler.source_key()}.so")
        try:
            command = compiler.find_compiler()
            if command is None:
                raise RuntimeError(compiler.NO_COMPILER)
            compiler.compile_library(command, library)
        except (OSError, RuntimeError, ValueError) as error:
            self.app.display_warning(f"The wheel has no C++ loop, which is built at its first use instead: {error}")
            return
        place = _COMPILER.relative_to(self.root).parent / library.name
        build_data["force_include"][str(library)] = str(place)
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder after the wheel was written."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
