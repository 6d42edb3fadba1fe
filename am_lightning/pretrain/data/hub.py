"""The Hugging Face hub is asked once whether it answers: its library would try again for a minute, or for ever."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from am_lightning.pretrain.runtime.errors import first_line

_PATIENCE = 5.0  # seconds; HF_HUB_ETAG_TIMEOUT, the hub library's own setting, is taken where it is set


def no_answer() -> str | None:
    """Why nothing can be had from the hub; None where it answers, whatever it says. It is asked once in a process."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _ask()


@functools.lru_cache(maxsize=1)
def _ask() -> str | None:
    from huggingface_hub import constants, get_session

    chosen = constants.HF_HUB_ETAG_TIMEOUT
    seconds = _PATIENCE if chosen == constants.DEFAULT_ETAG_TIMEOUT else float(chosen)
    said: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
            said.append(None)
        except Exception as error:  # of requests or httpx, by the library's version
            said.append(f"{constants.ENDPOINT} cannot be reached ({first_line(error)})")

    thread = threading.Thread(target=ask, daemon=True)  # no timeout holds while a name is looked up
    thread.start()
    thread.join(seconds)
    silence = f"{constants.ENDPOINT} does not answer within {seconds:g} s; HF_HUB_ETAG_TIMEOUT=SECONDS waits longer"
    return said[0] if said else silence


@contextlib.contextmanager
def from_the_cache_alone(*configs: Any) -> Iterator[None]:
    """In the block, modules with a HF_HUB_OFFLINE, and huggingface_hub, are as if it were set."""
    from huggingface_hub import constants

    modules = [constants, *configs]
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def offline_text(what: str, why: str, local: str) -> str:
    """The error's text. ``local`` is what to give instead."""
    return (
        f"{what} is not, or not whole, in this machine's cache, and {why}. Load it once where there is"
        f" a network (prepare_data.py does), in the same HF_HOME, or give {local}."
    )
