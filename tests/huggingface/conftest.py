"""Skip tests of what the installed Trainer cannot do."""

from tests.lacking import pytest_runtest_makereport  # noqa: F401
