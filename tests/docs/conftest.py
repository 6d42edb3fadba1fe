"""Skip a test whose program of the pages needs a package that is not installed."""

from tests.lacking import pytest_runtest_makereport  # noqa: F401
