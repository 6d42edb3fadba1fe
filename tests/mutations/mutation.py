"""A planted fault: one replacement in one file, and the tests that must fail with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A fault that a change of the code could bring.

    Attributes:
        name: one line that describes the fault.
        file: path relative to the checkout.
        old: text that occurs exactly once in the file.
        new: text that replaces it.
        tests: node ids, relative to the checkout, of which at least one must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied_to(self, text: str) -> str | None:
        """Return the file's text with the fault, or None if ``old`` does not occur exactly once, or changes nothing."""
        if text.count(self.old) != 1 or self.old == self.new:
            return None
        return text.replace(self.old, self.new)
