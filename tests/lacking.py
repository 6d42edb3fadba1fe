"""Features that a supported release lacks with any optimizer, recognised by the error that it raises.

A conftest that has :func:`pytest_runtest_makereport` turns a failure by such an error into a skip with the reason. A
release that can do it raises no such error, so nothing is skipped there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from importlib.util import find_spec
from typing import Any

import pytest

# The release's error -> why the test is skipped.
LACKS = {
    "'Stream' object has no attribute 'record_event'": "FSDP2 of this torch does not run on a CPU",
    "fully_shard() got an unexpected keyword argument 'ignored_params'": "fully_shard of this torch ignores nothing",
    "'DeviceMesh' object has no attribute '_unflatten'": "this torch cannot split a dimension of a mesh",
    "Only single local shard is supported": "this torch saves no FSDP1 model of which a rank has no element",
    "(tagged with cpu:0)": "this Trainer loads to 'cpu:0' on several CPU processes, which this torch refuses",
    "When using FSDP2, a model and optimizer must be passed together": "this Trainer does not know FSDP2",
    "T5Tokenizer requires the SentencePiece library": "T5Tokenizer of this transformers needs sentencepiece",
    "this Trainer does not support optimizer factories": "this Trainer knows no optimizer factories",
}
# Packages that a stack may lack. Any other missing package is a failure, for example a wrong name in an import.
PACKAGES = {
    *("datasets", "deepspeed", "expecttest", "hatchling", "jsonargparse", "kubeflow_trainer_api", "latex2mathml"),
    *("linkcheck", "mkdocs", "pyarrow", "rich", "schedulefree", "scipy", "sentencepiece", "sklearn", "timm"),
    *("torchtitan", "triton"),
}
# How imports, frameworks and our programs name a missing package.
MISSING = re.compile(r"(?:No module named|Requirement|the recipes need|the data need|deepspeed needs) '?([A-Za-z_]\w*)")


def lacking(error: str) -> str | None:
    """Return why a release cannot do what ended in ``error``, or None for every other error."""
    for words, reason in LACKS.items():
        if words in error:
            return reason
    named = PACKAGES.intersection(map(str.lower, MISSING.findall(error)))
    missing = sorted(name for name in named if find_spec(name) is None)
    return f"{missing[0]} is not installed" if missing else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo is not None and (reason := lacking(str(call.excinfo.value))):
        path, line, _ = item.location
        report.outcome, report.longrepr = "skipped", (path, (line or 0) + 1, f"Skipped: {reason}")
    return report


class Lacking:
    """Replace results that the installed releases cannot give: a test that reads one is skipped."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getitem__(self, key: object) -> Any:
        pytest.skip(self.reason)


def unless_lacking(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return what ``run`` returns, or a :class:`Lacking`."""
    try:
        return run(*args, **options)
    except Exception as error:
        reason = lacking(str(error))
        if reason is None:
            raise
        return Lacking(reason)
