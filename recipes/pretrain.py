"""Pretrain a small Llama: python recipes/pretrain.py fit --config recipes/configs/laptop.yaml [--KEY VALUE ...]

Everything that a run writes is below --trainer.default_root_dir. With --ckpt_path last the same command goes on from
the newest checkpoint there, or starts if there is none. --compare true trains AdamW beside it. `validate` scores
a checkpoint: python recipes/pretrain.py validate --config ... --ckpt_path last
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator

from am_lightning.recipes.errors import RecipeError
from am_lightning.recipes.files import DISK_FULL


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (sys.argv's where None); ends the process with a message where the user can help."""
    _quiet()
    with _fonts_elsewhere():
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        from am_lightning.recipes.cli import PretrainCLI

    try:
        PretrainCLI(args)
    except SIGTERMException as stopped:  # a SystemExit with status 0, which a scheduler would take for a finished run
        print("stopped by SIGTERM; --ckpt_path last goes on from the newest checkpoint", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from stopped
    except RecipeError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        # Whatever else was being written (the curves, the configuration) when the disk became full.
        if error.errno not in DISK_FULL:
            raise
        what = error.filename or "the run's files"
        sys.exit(f"error: cannot write {what}: {error.strerror}. Free some space; --ckpt_path last goes on from there.")


@contextlib.contextmanager
def _fonts_elsewhere() -> Iterator[None]:
    """matplotlib, which torchmetrics imports, writes a list of fonts into the home folder: give it one that goes."""
    if "MPLCONFIGDIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="matplotlib-") as os.environ["MPLCONFIGDIR"]:
        yield
    del os.environ["MPLCONFIGDIR"]


def _quiet() -> None:
    """Take away messages that ask for nothing from the user of this program."""
    for text in (
        ".*does not have many workers.*",  # a row is a slice of a memory map
        ".*Checkpoint directory .* exists and is not empty.*",  # so it is after every resume
        ".*LightningCLI's args parameter is intended.*",  # the comparison runs are made from within
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",  # inside Lightning
        ".*no last checkpoint available.*",  # --ckpt_path last starts where there is none, by design
    ):
        warnings.filterwarnings("ignore", message=text)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())


if __name__ == "__main__":
    main()
