"""Every YAML parses, its model has the stated size, and each key's comment has the type and the true default."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from am_lightning import AdaptiveMemory
from am_lightning.pretrain.commands.plan.command import add_arguments
from am_lightning.pretrain.commands.plan.plan import make_plan
from am_lightning.pretrain.commands.plan.table import duration_text
from am_lightning.pretrain.model.shape import count_parameters
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.paths import recipe_files
from am_lightning.pretrain.runtime.recipe_text import merge_texts, recipe_text
from am_lightning.pretrain.runtime.run_config import RunConfig, _Parser, read_run_config
from am_lightning.pretrain.runtime.settings import read_recipe
from tests.recipes.test_network import FAMILY

CONFIGS = recipe_files()
COMMENT = re.compile(r"\((?P<type>[^,()]+)(, (?P<default>[^()]+))?\)(?P<words>.*)")
every_config = pytest.mark.parametrize("name", CONFIGS)


def settings_of(name: str) -> RunConfig:
    return read_run_config(["--config", str(CONFIGS[name])])


def keys(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield (dotted key, line from 0, value) of all keys, also in lists."""
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        yield path, key.start_mark.line, value
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from keys(value, f"{path}.")
        for item in value.value if isinstance(value, yaml.SequenceNode) else ():
            if isinstance(item, yaml.MappingNode):
                yield from keys(item, f"{path}.{item.value[0][1].value}.")  # the item's class_path


def comment_at(lines: list[str], line: int) -> tuple[re.Match[str] | None, str]:
    """Return (type, default) and all words of the comment at the end of the line and right above it."""
    comments = [lines[line].partition("#")[2].strip()]
    while line and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        comments.insert(0, lines[line].lstrip(" #"))
    found = next((match for comment in reversed(comments) if (match := COMMENT.match(comment))), None)
    return found, COMMENT.sub(r"\g<words>", " ".join(comments)).strip()


@every_config
def test_every_key_is_commented(name: str) -> None:
    text = recipe_text(CONFIGS[name])
    found = list(keys(yaml.compose(text)))
    assert len(found) > 80
    for path, line, _ in found:
        match, words = comment_at(text.splitlines(), line)
        assert match and words, f"{path} has no comment (type, default) what; why"


def words_of(hint: Any) -> set[str]:
    """Return the words that name this type in a comment."""
    if hint in (int, float, bool):
        return {hint.__name__} | ({"int"} if hint is float else set())
    if typing.get_origin(hint) is typing.Literal or hint in (str, Path):
        return {"str"}
    origin = typing.get_origin(hint)
    if origin in (list, dict):
        return {origin.__name__, "list of classes"}
    if hint is type(None):
        return set()
    if isinstance(hint, type) or not typing.get_args(hint):
        return {"class"}
    return {"class"} if "Callable" in str(origin) else set().union(*map(words_of, typing.get_args(hint)))


def bare_trainer() -> dict[str, Any]:
    """Return what Lightning's Trainer uses if its argument's default is None."""
    trainer = L.Trainer(accelerator="cpu", devices=1)
    return {
        "log_every_n_steps": trainer.log_every_n_steps,
        "val_check_interval": trainer.val_check_interval,
        "num_sanity_val_steps": trainer.num_sanity_val_steps,
        "enable_progress_bar": trainer.progress_bar_callback is not None,
        "enable_model_summary": any("Summary" in type(c).__name__ for c in trainer.callbacks),
        "logger": trainer.logger is not None,
        "default_root_dir": "working directory" if trainer.default_root_dir == str(Path.cwd()) else "?",
    }


@pytest.fixture(scope="module")
def truth() -> dict[str, tuple[set[str], Any]]:
    """Return key of the program -> (words for its type, default)."""
    parser = _Parser(["--config", str(CONFIGS["laptop"])])._parser("fit")
    defaults = parser.get_defaults()
    for key, value in bare_trainer().items():
        assert defaults[f"trainer.{key}"] is None
        defaults[f"trainer.{key}"] = value
    result = {}
    for action in parser._actions:
        hint = getattr(action, "_typehint", action.type)
        if action.dest in defaults and hint is not None:
            default = defaults[action.dest]
            result[action.dest] = (words_of(hint), getattr(default, "class_path", default))
    return result


def default_of_class(path: str) -> Any:
    """Return the default of a key KEY.CLASS_PATH.init_args.ARGUMENT, of a list, or KEY.init_args.ARGUMENT."""
    class_path, argument = path.split(".init_args.")
    module, _, name = class_path.rpartition(".")
    parameter = inspect.signature(getattr(importlib.import_module(module), name)).parameters[argument]
    return parameter.default


@every_config
def test_comments_say_the_true_type_and_default(name: str, truth: dict[str, tuple[set[str], Any]]) -> None:
    text = recipe_text(CONFIGS[name])
    config, checked = yaml.safe_load(text), 0
    for path, line, _ in keys(yaml.compose(text)):
        match, _ = comment_at(text.splitlines(), line)
        assert match
        if path in truth:
            words, default = truth[path]
            assert set(match["type"].split(" or ")) <= words, f"{path} is one of {words}"
        elif ".init_args." in path:
            default = default_of_class(_with_class(path, config))
        else:
            assert match["type"] in ("section", "str"), path  # a class_path
            continue
        checked += 1
        assert same(match["default"], default), f"{path}: the default is {default!r}"
    assert checked > 70


def _with_class(path: str, config: dict[str, Any]) -> str:
    """Return a key's path with the class in place of model.optimizer or trainer.strategy."""
    if path.startswith("trainer.callbacks."):
        return path.removeprefix("trainer.callbacks.")
    owner, _, argument = path.partition(".init_args.")
    for part in owner.split("."):
        config = config[part]
    return f"{config['class_path']}.init_args.{argument}"


def same(written: str, default: Any) -> bool:
    value = yaml.safe_load(written)
    if isinstance(value, str) and isinstance(default, float):
        value = float(value)  # YAML 1.1 reads 1e-3 as text
    if isinstance(value, list):
        value = tuple(value)
    return bool(value == default) or str(value) == str(default)


@every_config
def test_a_recipe_over_its_base_is_the_whole_text(name: str, tmp_path: Path) -> None:
    """jsonargparse's result for the two files is what `cp` writes; a recipe repeats little of its base."""
    whole = tmp_path / "whole.yaml"
    whole.write_text(recipe_text(CONFIGS[name]))
    assert read_run_config(["--config", str(whole)]).config == settings_of(name).config
    assert read_run_config(["--config", name]).config == settings_of(name).config
    assert read_recipe(CONFIGS[name]) == yaml.safe_load(whole.read_text())
    assert len(CONFIGS[name].read_text().splitlines()) < len(whole.read_text().splitlines()) * 2 / 3
    assert max(map(len, whole.read_text().splitlines())) <= 120


BASE = """# the base

# how to read it

steps: 10  # (int) how many; why

model:  # (section) the model
  # (int) the width
  width: 4
  depth: 2      # (int) layers
  optimizer:  # (class) any
    name: AdamW  # (str) which
    lr: 0.1      # (float) peak
  callbacks:  # (list)
    - name: one  # (str) the first
"""
DIFFERENCE = """# mine
# base: base.yaml

model:
  width: 8
  depth: 12  # (int) many; because
  optimizer: null  # (class) none
  callbacks:
    - name: two
    - name: three
more: 1
"""
MERGED = """# mine

# how to read it

steps: 10  # (int) how many; why

model:  # (section) the model
  # (int) the width
  width: 8
  depth: 12     # (int) many; because
  optimizer: null  # (class) none
  callbacks:  # (list)
    - name: two
    - name: three
more: 1
"""


def test_texts_are_merged_with_their_comments() -> None:
    assert merge_texts(BASE, DIFFERENCE) == MERGED
    with pytest.raises(RecipeError, match="model: give each key"):
        merge_texts(BASE, "# mine\n\nmodel: {width: 8}\n")


def test_a_new_size_is_a_short_yaml_and_a_lost_base_is_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("# base: base.yaml\n\nmodel: {num_layers: 3}\ntrainer: {max_steps: 7}\n")
    with pytest.raises(RecipeError, match=r"mine.yaml holds only what differs from .*base.yaml, which does not exist"):
        read_run_config(["--config", str(mine)])
    (tmp_path / "base.yaml").write_text((CONFIGS["60m"].parent / "base.yaml").read_text())
    settings = read_run_config([f"--config={mine}", "--trainer.max_steps", "8"])
    assert settings.shape == dataclasses.replace(settings_of("60m").shape, num_layers=3)
    assert settings.steps == 8 and settings.config["data"] == settings_of("60m").config["data"]


PUBLIC = ["am_lightning.AdaptiveMemory", "am_lightning.lightning.AdaptiveMemory"]


@pytest.mark.parametrize("path", PUBLIC)
def test_a_saved_configuration_names_the_callback_as_any_version_knows_it(path: str, tmp_path: Path) -> None:
    """Both possible names are public, unlike the class's module. Some versions of jsonargparse use the shorter one."""
    callbacks = f'--trainer.callbacks=[{{"class_path": "{path}"}}]'
    settings = read_run_config(["--config", str(CONFIGS["laptop"]), callbacks])
    settings.save(tmp_path / "config.yaml")
    again = read_run_config(["--config", str(tmp_path / "config.yaml")])
    for read in (settings, again):
        (callback,) = read.config["trainer"]["callbacks"]
        assert callback["class_path"] in PUBLIC
        assert isinstance(read._memory, AdaptiveMemory)


@every_config
def test_the_model_has_the_published_shape(name: str) -> None:
    settings = settings_of(name)
    if name == "laptop":
        assert count_parameters(settings.shape) == 857_216
        return
    shape, parameters = FAMILY[name]
    assert settings.shape == shape
    assert count_parameters(settings.shape) == parameters
    assert settings._module.schedule.warmup_fraction == 0.0


@every_config
def test_the_header_says_what_plan_says(name: str) -> None:
    """The header has tokens, tokens per parameter, and the time for the GPUs and the MFU that it names."""
    header = " ".join(line.lstrip("# ") for line in recipe_text(CONFIGS[name]).partition("\n\n")[0].splitlines())
    if name == "laptop":
        assert "0.86 M parameters" in header
        return
    found = re.search(
        r"(\d+) steps are (.*?) tokens, (.*?) per parameter.*; (\S+ \S+) on (\d+) H100"
        r" at an assumed MFU of (\S+)\.",
        header,
    )
    assert found, header
    steps, tokens, ratio, time, gpus, mfu = found.groups()
    settings = settings_of(name)
    plan = make_plan(settings, plan_arguments(name, "--gpus", gpus, "--mfu", mfu))
    assert plan.steps == int(steps)
    assert float(tokens.split()[0]) * 1e9 == pytest.approx(plan.steps * plan.speed.tokens_per_step, rel=0.005)
    assert float(ratio) == pytest.approx(plan.steps * plan.speed.tokens_per_step / plan.parameters, rel=0.01)
    assert time == duration_text(plan.speed.days * 86400)
    assert plan.fits
    # If the YAML has the numbers of nodes and devices, the header has the same.
    trainer = settings.config["trainer"]
    if trainer["devices"] != "auto":
        assert trainer["devices"] * trainer["num_nodes"] == int(gpus)


def plan_arguments(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(args)
