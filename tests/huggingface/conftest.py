"""What the installed Trainer cannot do skips its test."""

from tests.lacking import pytest_runtest_makereport  # noqa: F401
