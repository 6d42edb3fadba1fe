"""The settings in which runs differ."""

from __future__ import annotations

import itertools
import json
from typing import Any

# Folders always differ and tell nothing about a run.
_FOLDERS = ("trainer.default_root_dir", "checkpoint.dirpath", "data.cache_dir", "config", "ckpt_path", "compare")
# These follow the model's settings, and not every program writes them.
_LINKED = ("data.seq_len", "data.vocab_size")
_SECTIONS = ("model", "data", "seed_everything", "trainer")
ABSENT = "–"  # noqa: RUF001
_LISTED = "yes"  # the value of a class in a list


def differences(configs: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return dotted path -> the value in each configuration, or ABSENT, of all settings that differ.

    The model's settings come first. The arguments of a class that only some configurations list are left out, and so is
    a key that is null in some and absent in the others.
    """

    def section(key: str) -> int:
        first = key.partition(".")[0]
        return (*_SECTIONS, first).index(first)

    flat: list[dict[str, str]] = [{} for _ in configs]
    for config, found in zip(configs, flat, strict=True):
        _flatten(config, "", found)
    keys = sorted(dict.fromkeys(key for values in flat for key in values), key=section)
    rows = {key: [values.get(key, ABSENT) for values in flat] for key in keys if key not in _FOLDERS + _LINKED}
    rows = {key: values for key, values in rows.items() if len(set(values)) > 1 and set(values) != {"null", ABSENT}}
    unlisted = tuple(f"{key}." for key, values in rows.items() if set(values) == {_LISTED, ABSENT})
    return {key: values for key, values in rows.items() if not key.startswith(unlisted)}


def _flatten(value: Any, path: str, flat: dict[str, str]) -> None:
    """Add dotted path -> value as text. An entry of a list of classes is called `Class`, its second one `Class#2`."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(inner, f"{path}.{key}" if path else str(key), flat)
    elif isinstance(value, list) and any(isinstance(entry, dict) and "class_path" in entry for entry in value):
        for entry in value:
            made = entry if isinstance(entry, dict) else {"class_path": entry}
            name = f"{path}.{str(made.get('class_path')).rpartition('.')[2]}"
            places = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
            place = next(place for place in places if place not in flat)
            flat[place] = _LISTED
            if made.get("init_args"):
                _flatten(made["init_args"], place, flat)
    else:
        flat[path] = _text(value)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
