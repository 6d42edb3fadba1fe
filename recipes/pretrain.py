"""Pretrain a small Llama: python recipes/pretrain.py fit --config recipes/configs/laptop.yaml [--KEY VALUE ...]

Everything that a run writes is below --trainer.default_root_dir. With --ckpt_path last the same command goes on from
the newest checkpoint there, or starts if there is none. --compare true trains AdamW beside it. `validate` scores
a checkpoint: python recipes/pretrain.py validate --config ... --ckpt_path last
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from errors import DISK_FULL, RecipeError, write_failure


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (sys.argv's where None); ends the process with a message where the user can help."""
    _keep_home_clean()
    _quiet()
    from cli import PretrainCLI  # after the two lines above: it imports matplotlib and lightning

    try:
        PretrainCLI(args)
    except RecipeError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        # Whatever else was being written (the curves, the configuration) when the disk became full.
        if error.errno not in DISK_FULL:
            raise
        sys.exit(f"error: {write_failure(Path(error.filename or '.').resolve(), error, 'Free some space.')}")


def _keep_home_clean() -> None:
    """matplotlib keeps a list of fonts in the home folder, and torchmetrics imports it: give it a folder that goes."""
    if "MPLCONFIGDIR" not in os.environ:
        os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")
        atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)


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
