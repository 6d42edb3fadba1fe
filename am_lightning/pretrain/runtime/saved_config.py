"""The configuration that a run saved in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from am_lightning.pretrain.runtime.errors import RecipeError


def saved_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the run in `folder`; {} where none was saved.

    Raises:
        RecipeError: the file is not YAML.
    """
    for place in (folder / "logs", folder):
        path = place / "config.yaml"
        if path.is_file():
            try:
                found = yaml.safe_load(path.read_text())
            except yaml.YAMLError as error:
                raise RecipeError(f"{path} is not YAML: {error}") from error
            return found if isinstance(found, dict) else {}
    return {}
