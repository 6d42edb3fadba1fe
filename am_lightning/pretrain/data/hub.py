"""Ask the Hugging Face hub once whether it answers, because its library would retry for a minute or longer."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from am_lightning.pretrain.runtime.errors import RecipeError, first_line

_PATIENCE = 5.0  # seconds; HF_HUB_ETAG_TIMEOUT, the hub library's own setting, is used if it is set


@contextlib.contextmanager
def hub_errors(what: str, library: str, *configs: Any, remote: bool, hint: str, instead: str) -> Iterator[None]:
    """Turn an error of a library that loads something into a RecipeError.

    If the hub does not answer, the library uses its cache only.

    Args:
        what: the setting and its value.
        library: name of the library.
        configs: modules of the library that have a HF_HUB_OFFLINE, beside huggingface_hub.
        remote: whether the hub is needed.
        hint: end of the error if the hub answers or is not needed.
        instead: what to give instead of something on the hub.

    Raises:
        RecipeError: if it cannot be loaded.
    """
    from huggingface_hub import constants

    offline = None if not remote else "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _no_answer()
    before = [(module, module.HF_HUB_OFFLINE) for module in (constants, *configs)]
    try:
        for module, value in before:
            module.HF_HUB_OFFLINE = value or offline is not None
        yield
    except Exception as error:  # an error of the library, the network, the hub or a file
        if offline is None:
            raise RecipeError(f"{what}: {library} cannot load it ({first_line(error)}). {hint}") from error
        raise RecipeError(
            f"{what} is missing or incomplete in this machine's cache, and {offline}. Load it once where there is"
            f" a network (prepare_data.py does), in the same HF_HOME, or give {instead}."
        ) from error
    finally:
        for module, value in before:
            module.HF_HUB_OFFLINE = value


@functools.lru_cache(maxsize=1)
def _no_answer() -> str | None:
    """Return why nothing can be had from the hub, or None if it gives any answer. A process asks once."""
    from huggingface_hub import constants, get_session

    chosen = constants.HF_HUB_ETAG_TIMEOUT
    seconds = _PATIENCE if chosen == constants.DEFAULT_ETAG_TIMEOUT else float(chosen)
    answers: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
            answers.append(None)
        except Exception as error:  # an error of requests or httpx, depending on the library's version
            answers.append(f"{constants.ENDPOINT} cannot be reached ({first_line(error)})")

    thread = threading.Thread(target=ask, daemon=True)  # the timeout does not cover the look-up of a name
    thread.start()
    thread.join(seconds)
    silence = f"{constants.ENDPOINT} does not answer within {seconds:g} s; HF_HUB_ETAG_TIMEOUT=SECONDS waits longer"
    return answers[0] if answers else silence
