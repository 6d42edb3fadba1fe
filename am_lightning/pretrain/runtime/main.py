"""What every program of the recipes does around its work: no noise, and errors in words with an exit status."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator

from am_lightning.pretrain.runtime.atomic_files import DISK_FULL, disk_error
from am_lightning.pretrain.runtime.errors import RESUME, RecipeError, UsageError, first_line
from am_lightning.pretrain.runtime.stop_signals import early_signals

_NEEDED = ("jsonargparse", "lightning", "matplotlib", "numpy", "tensorboard", "torch", "transformers", "yaml")
EXTRA = "pip install 'am-lightning[recipes]', or '.[recipes]' in a checkout"


@contextlib.contextmanager
def command_line(*, imports: bool = True) -> Iterator[None]:
    """Run the block as the body of a program: what the user can help ends the process with a message.

    Args:
        imports: import first what training needs; a program that may not need it calls `import_training` itself.
    """
    with early_signals():  # the imports take seconds
        yield from _command_line(imports=imports)


def _command_line(*, imports: bool) -> Iterator[None]:
    for name in ("stdout", "stderr"):  # closed by whoever started it (>&-): there is nobody to tell
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (to the process's end)
    _quiet()
    if imports:
        import_training()
    try:
        yield
        _leave_group()
        sys.stdout.flush()  # here, where a closed pipe is still met in words
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RecipeError as error:
        sys.exit(f"error: {error}")
    except SystemExit as stopped:
        if not _is_sigterm(stopped):
            if type(stopped).__name__ == "Stopped":  # FaultTolerance's, on all ranks
                _leave_group()
            raise
        print(f"stopped by SIGTERM; {RESUME}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from stopped
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        missing = "jsonargparse" if "jsonargparse" in str(error) else error.name  # LightningCLI names it in words alone
        if missing not in _NEEDED:
            raise
        sys.exit(f"error: the recipes need {missing}: {EXTRA}")
    except pickle.UnpicklingError as error:  # torch.load(weights_only=True), whose text advises to switch that off
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0])
        sys.exit(f"error: the checkpoint holds more than tensors and plain values: {reason.strip()}")
    except Exception as error:
        from am_lightning.lightning.callback import SkippedStepsError

        if isinstance(error, SkippedStepsError):
            sys.exit(f"error: {error}")
        if "EADDRINUSE" in str(error):
            sys.exit(f"error: {first_line(error)}. Another run uses this port: give another MASTER_PORT.")
        # Whatever else was being written (the curves, the configuration) when the disk became full.
        refused = disk_error(error)
        if refused is None or refused.errno not in DISK_FULL:
            raise
        what = refused.filename or "the run's files"
        sys.exit(f"error: cannot write {what}: {refused.strerror}. Free some space; {RESUME}.")


def import_training() -> None:
    """Import what training needs, which takes seconds; ends the process with a message where a package is missing."""
    try:
        with _fonts_elsewhere():
            import am_lightning.pretrain.runtime.cli  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"error: the recipes need {error.name}: {EXTRA}")


def _leave_group() -> None:
    if "torch" in sys.modules:
        from am_lightning.pretrain.runtime.collective_errors import leave_group

        leave_group()


def _is_sigterm(stopped: SystemExit) -> bool:
    """Lightning's SIGTERMException: a SystemExit with status 0, which a scheduler would take for a finished run."""
    return type(stopped).__name__ == "SIGTERMException"


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
    """Take away messages that ask for nothing from the user of these programs."""
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
