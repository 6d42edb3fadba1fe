"""A configuration must hold no secret, because a run writes it to config.yaml, the event file and the report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from am_lightning.pretrain.runtime.errors import RecipeError

_SECRET = re.compile(  # the last word of a key, also of authToken
    r"(^|[_-]|(?<=[a-z0-9])(?=[A-Z]))(?i:token|secret|password|passwd|passphrase|pwd|pat|credentials?|authorization|"
    r"bearer|cookie|sig|signature|(api|access|secret|account|private|sas)[_-]?key)$"
)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://(?P<login>[^/@\s]+:[^/@\s]+@)?", re.IGNORECASE)


def refuse_secrets(config: dict[str, Any]) -> None:
    """Raise a RecipeError that names the key, if a key looks like a secret's or a URL holds one."""
    for where in _secrets(config, ""):
        raise RecipeError(
            f"{where} looks like a secret, and a run writes its configuration to files that people pass on. Set it in"
            " the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, WANDB_API_KEY, COMET_API_KEY), and take it out here."
        )


def _secrets(value: Any, where: str) -> Iterator[str]:
    """Yield the keys of the secrets, without their values."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _secrets(inside, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for number, inside in enumerate(value):
            yield from _secrets(inside, f"{where}.{number}")
    elif isinstance(value, str) and value and (_SECRET.search(where.rpartition(".")[2]) or _in_url(value)):
        yield where


def _in_url(text: str) -> bool:
    """Return whether `text` is a URL with a password, or with a secret in its query, such as a signature."""
    if not (found := _URL.match(text)):
        return False
    query = parse_qsl(text.partition("?")[2].partition("#")[0])
    return bool(found["login"]) or any(_SECRET.search(key) for key, _ in query)
