"""In which settings runs differ."""

from __future__ import annotations

from typing import Any

# Where a run was written differs by its nature and says nothing about it.
_FOLDERS = ("trainer.default_root_dir", "checkpoint.dirpath", "data.cache_dir", "config", "ckpt_path", "compare")
# They follow the model's, and not every program writes them out.
_LINKED = ("data.seq_len", "data.vocab_size")
_SECTIONS = ("model", "data", "seed_everything", "trainer")
ABSENT = "–"  # noqa: RUF001
_LISTED = "yes"  # the value of a class in a list


def flatten(config: dict[str, Any]) -> dict[str, str]:
    """Dotted path -> value as text. An entry of a list of classes is named by its class, not by its place."""
    flat: dict[str, str] = {}
    _walk(config, "", flat)
    return flat


def differences(configs: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Dotted path -> the value in each configuration (ABSENT where it has none), where these are not all the same.

    The model's settings come first. Of a class that one configuration lists and another does not, its arguments are
    left out; so is a key that is null here and absent there.
    """
    flat = [flatten(config) for config in configs]
    keys = sorted(dict.fromkeys(key for values in flat for key in values), key=_section)
    rows = {key: [values.get(key, ABSENT) for values in flat] for key in keys if key not in _FOLDERS + _LINKED}
    rows = {key: values for key, values in rows.items() if len(set(values)) > 1 and set(values) != {"null", ABSENT}}
    unlisted = tuple(f"{key}." for key, values in rows.items() if set(values) == {_LISTED, ABSENT})
    return {key: values for key, values in rows.items() if not key.startswith(unlisted)}


def _section(path: str) -> int:
    first = path.partition(".")[0]
    return _SECTIONS.index(first) if first in _SECTIONS else len(_SECTIONS)


def _walk(value: Any, path: str, flat: dict[str, str]) -> None:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _walk(inner, f"{path}.{key}" if path else str(key), flat)
    elif isinstance(value, list) and any(isinstance(entry, dict) and "class_path" in entry for entry in value):
        for entry in value:
            made = entry if isinstance(entry, dict) else {"class_path": entry}
            place = _unused(f"{path}.{str(made.get('class_path')).rpartition('.')[2]}", flat)
            flat[place] = _LISTED
            if made.get("init_args"):
                _walk(made["init_args"], place, flat)
    else:
        flat[path] = _text(value)


def _unused(path: str, flat: dict[str, str]) -> str:
    """The second entry of a class is `Class#2`."""
    number, place = 1, path
    while place in flat:
        number += 1
        place = f"{path}#{number}"
    return place


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)
