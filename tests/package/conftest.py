"""Skip a test that imports a module whose packages are not installed."""

from tests.lacking import pytest_runtest_makereport  # noqa: F401
