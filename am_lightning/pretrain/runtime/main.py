"""The frame of every recipe program: it filters warnings and ends with a one-line error and an exit status."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from am_lightning.pretrain.runtime.atomic_files import DISK_FULL, NO_ACCESS, disk_error
from am_lightning.pretrain.runtime.errors import RESUME, RecipeError, UsageError, first_line, require_encodable
from am_lightning.pretrain.runtime.stop_signals import Stopped, early_signals

_NEEDED = ("jsonargparse", "lightning", "matplotlib", "numpy", "tensorboard", "torch", "transformers", "yaml")
EXTRA = "pip install 'am-lightning[recipes]', or '.[recipes]' in a checkout"


@contextlib.contextmanager
def command_line(*, imports: bool = True) -> Iterator[None]:
    """Run the block as the body of a program: an error that the user can mend ends the process with a message.

    Args:
        imports: import first what training needs; a program that may not need it calls `import_training` itself.
    """
    for name in ("stdout", "stderr"):  # None if the caller has closed it (>&-)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (to the process's end)
    _quiet()
    with early_signals():  # the imports take seconds
        try:
            for word in sys.argv[1:]:
                require_encodable("the argument", word)
            if imports:
                import_training()
            try:
                yield
                leave_group()
            except SystemExit:  # argparse's help raises it, for example
                sys.stdout.flush()
                raise
            sys.stdout.flush()  # here, so that a closed pipe is handled below
        except Stopped:  # all ranks have stopped
            leave_group()
            raise
        except BrokenPipeError:  # the reader of the pipe, such as head, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest is flushed at exit
            raise SystemExit(1) from None
        except Exception as error:
            text = _message(error)
            if text is None:
                raise
            _end(f"error: {text}", 2 if isinstance(error, UsageError) else 1)


def _message(error: Exception) -> str | None:
    """Return the text for an error that the user can mend, or None if it needs its traceback."""
    callback = sys.modules.get("am_lightning.lightning.callback")  # only if it is imported already
    training = "am_lightning.pretrain.runtime.cli" in sys.modules
    if isinstance(error, RecipeError) or (callback is not None and isinstance(error, callback.SkippedStepsError)):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        missing = "jsonargparse" if "jsonargparse" in str(error) else error.name  # LightningCLI names it in the text
        return f"the recipes need {missing}: {EXTRA}" if missing in _NEEDED else None
    if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to set weights_only=False
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0])
        return f"the checkpoint holds more than tensors and plain values: {reason.strip()}"
    if "EADDRINUSE" in str(error):
        return f"{first_line(error)}. Another run uses this port: give another MASTER_PORT."
    if isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename:
        path = os.fsdecode(error.filename)
        return f"no access to {path}: {error.strerror}. Change its mode or choose another path."
    # The disk became full while another file was written, such as the curves or the configuration.
    refused = disk_error(error)
    if refused is None or refused.errno not in DISK_FULL:
        return None
    what = refused.filename or ("the run's files" if training else "the output")
    return f"cannot write {what}: {refused.strerror}. Free some space{f'; {RESUME}' if training else ''}."


def _end(text: str, status: int) -> NoReturn:
    """Print an error and end the process."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun's: START/RANK/error.json
    if file and "TORCHELASTIC_RUN_ID" in os.environ:
        _print_once(text, Path(file).parents[1])
    elif status == 1:
        sys.exit(text)
    else:
        print(f"{text}\n", end="", file=sys.stderr, flush=True)
    raise SystemExit(status)


def _print_once(text: str, folder: Path) -> None:
    """Print an error unless another rank has, with the same `folder`, which torchrun makes for each start."""
    import fcntl  # POSIX only, like torchrun's signals

    name = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()  # a path need not be Unicode
    try:
        with (folder / f"error-{name}").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # torchrun kills the other ranks after the first has ended
            if os.fstat(file.fileno()).st_size == 0:
                print(f"{text}\n", end="", file=sys.stderr, flush=True)
                file.write(b"printed")
    except OSError:  # there is no lock or no space: the text may be printed twice, but it is printed
        print(f"{text}\n", end="", file=sys.stderr, flush=True)


def import_training() -> None:
    """Import what training needs, which takes seconds. RecipeError: if a package is missing."""
    with contextlib.ExitStack() as afterwards:
        if "MPLCONFIGDIR" not in os.environ:  # torchmetrics imports matplotlib, which writes its fonts to the home
            folder = tempfile.TemporaryDirectory(prefix="matplotlib-")
            os.environ["MPLCONFIGDIR"] = afterwards.enter_context(folder)
            afterwards.callback(os.environ.pop, "MPLCONFIGDIR")
        try:
            import am_lightning.pretrain.runtime.cli  # noqa: F401
        except ModuleNotFoundError as error:
            raise RecipeError(f"the recipes need {error.name}: {EXTRA}") from error


def leave_group() -> None:
    """Leave the process group, if there is one. Collective.

    The barrier lets gloo's threads free their last tensors. A process that ends before that is aborted, and torchrun
    then starts all processes again.
    """
    dist = sys.modules.get("torch.distributed")  # without this module there is no group
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _quiet() -> None:
    """Filter out messages that the users of these programs need not act on."""
    for text in (
        ".*does not have many workers.*",  # a row is a slice of a memory map
        ".*Checkpoint directory .* exists and is not empty.*",  # this is so after every resume
        ".*LightningCLI's args parameter is intended.*",  # the runs of --compare are started in this process
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",  # inside Lightning
        ".*no last checkpoint available.*",  # --ckpt_path last then starts from step 0, by design
    ):
        warnings.filterwarnings("ignore", message=text)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
