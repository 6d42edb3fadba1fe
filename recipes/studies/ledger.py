"""A ledger of a study's runs, a line of JSON for each, with which an interrupted study continues."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import platform
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from am_lightning.bench.table import processor
from am_lightning.pretrain.runtime.errors import RecipeError, require

Config = dict[str, Any]
Result = dict[str, Any]


class Ledger:
    """Finished runs in a file of JSON lines ``{"config": ..., "result": ..., "made": ...}``.

    Args:
        path: path of the file. It is created when the first run ends.
        setup: what all of its runs have in common and no configuration has, such as a hash of the data. It is kept in
            a file beside, and these runs are not continued with another setup.

    Raises:
        RecipeError: if the file's runs were made with another setup, or a line is not a run.
    """

    def __init__(self, path: Path, setup: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._results: dict[str, Result] = {}
        self._made: set[tuple[str, ...]] = set()
        self._setup = dict(setup or {})
        self._check_setup()
        if path.exists():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                self._read(number, line)

    @classmethod
    def begun_with(cls, earlier: Path | None, path: Path, setup: Mapping[str, str]) -> Ledger:
        """Return the ledger at `path`, which begins with the runs of `earlier` (gzip) if it does not exist yet."""
        if earlier and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.decompress(earlier.read_bytes()))
        return cls(path, setup)

    def _read(self, number: int, line: str) -> None:
        try:
            entry = json.loads(line)
            self._results[_key(entry["config"])] = entry["result"]
            if "made" in entry:
                self._made.add(tuple(entry["made"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RecipeError(f"{self.path}:{number} is not a finished run ({error}). Delete the line.") from error

    def _check_setup(self) -> None:
        beside = self.path.with_suffix(".setup.json")
        if not self._setup or not beside.exists():
            return
        before = json.loads(beside.read_text())
        other = [
            f"{key} {before.get(key)} -> {self._setup.get(key)}"
            for key in sorted({*before, *self._setup})
            if before.get(key) != self._setup.get(key)
        ]
        if other:
            raise RecipeError(f"{self.path} has runs of another setup ({'; '.join(other)}). Give another --out.")

    def _check_versions(self) -> None:
        """Raise a RecipeError if runs were made with another torch or Python, whose standard library is the data."""
        here = _made({})[2:]
        if self._setup and (other := sorted({made[2:] for made in self._made} - {here})):
            names = " and ".join(" with Python ".join(versions) for versions in other)
            raise RecipeError(
                f"{self.path} has runs of torch {names}, and this is torch {' with Python '.join(here)}. Runs can only"
                " be compared within one pair of versions: use the earlier one, or give another --out."
            )

    def made(self) -> str:
        """Return where and when the runs were made, for a page."""
        known = sorted(self._made) or [_made({})]
        return "; ".join(
            f"{device}, torch {torch_version}, Python {python}, {day}" for day, device, torch_version, python in known
        )

    def __contains__(self, config: Config) -> bool:
        return _key(config) in self._results

    def __getitem__(self, config: Config) -> Result:
        """Return the result of a configuration, or raise KeyError if it has not been run."""
        return self._results[_key(config)]

    def add(self, config: Config, result: Result) -> None:
        """Keep a finished run, and write it to the disk at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._setup and not self._results:
            self.path.with_suffix(".setup.json").write_text(json.dumps(self._setup, indent=1))
        made = _made(config)
        with open(self.path, "a") as file:
            file.write(json.dumps({"config": config, "result": result, "made": made}) + "\n")
        self._made.add(made)
        self._results[_key(config)] = result

    def run(self, configs: Iterable[Config], run: Callable[[Config], Result], *, workers: int = 1) -> None:
        """Run the ``configs`` that are missing, in ``workers`` processes.

        Each process has one thread, so that a result does not depend on the number of workers.

        Args:
            configs: configurations of plain values, as JSON holds them.
            run: picklable function from a configuration to its result of plain values.
            workers: processes at a time.

        Raises:
            RecipeError: if ``workers`` is below 1, or the earlier runs were made with other versions.
        """
        require(workers >= 1, "--workers", workers, "a whole number >= 1")
        missing = list({_key(c): c for c in configs if c not in self}.values())
        if not missing:
            return
        self._check_versions()
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(workers, len(missing)), torch.set_num_threads, (1,)) as pool:
            jobs = pool.imap_unordered(partial(_finished, run), missing)
            for config, result in tqdm(jobs, total=len(missing), desc="runs", unit="run"):
                self.add(config, result)


def _finished(run: Callable[[Config], Result], config: Config) -> tuple[Config, Result]:
    return config, run(config)


def _made(config: Config) -> tuple[str, ...]:
    """Return day, device and versions."""
    device = str(config.get("device", "cpu"))
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{processor()}, one thread a run"
    return date.today().isoformat(), name, torch.__version__.partition("+")[0], platform.python_version()


def _key(config: Config) -> str:
    return json.dumps(config, sort_keys=True)
