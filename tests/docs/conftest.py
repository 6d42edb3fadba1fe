"""What a program of the pages needs and is not installed skips its test."""

from tests.lacking import pytest_runtest_makereport  # noqa: F401
