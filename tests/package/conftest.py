"""A module whose packages are not installed skips the test that imports it."""

from tests.lacking import pytest_runtest_makereport  # noqa: F401
