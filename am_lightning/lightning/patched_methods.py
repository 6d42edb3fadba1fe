"""Replace methods of single objects for a time, through their classes, so that nothing is set on the objects."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

_PLACES: dict[tuple[type, str], _Place] = {}


class PatchedMethods:
    """Replace methods and property setters of single objects until ``undo``.

    Nothing is set on the objects, so their copies and pickles do not contain the replacements. The class that defines a
    method calls the replacement for this one object, and is restored when no replacement is left. Attributes that other
    code has set on an object stay. A copy of a PatchedMethods is empty.
    """

    def __init__(self) -> None:
        self._made: list[tuple[_Place, _Entry]] = []

    def add(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Call ``replacement(original, *args, **kwargs)`` in place of ``owner.name``; ``original`` is bound."""
        cls = next(cls for cls in type(owner).__mro__ if name in cls.__dict__)
        place = _PLACES.get((cls, name)) or _Place(cls, name)
        entry = _Entry(owner, replacement)
        place.entries.append(entry)
        self._made.append((place, entry))

    def undo(self) -> None:
        """Restore the methods of all objects."""
        while self._made:
            place, entry = self._made.pop()
            place.remove(entry)

    def __reduce__(self) -> tuple[type[PatchedMethods], tuple[()]]:
        return type(self), ()


class _Entry(NamedTuple):
    owner: Any
    replacement: Callable[..., Any]


class _Place:
    """A method or property of a class that looks up replacements as long as there are any."""

    def __init__(self, cls: type, name: str) -> None:
        self._key, self._original = (cls, name), cls.__dict__[name]
        self.entries: list[_Entry] = []
        is_property = isinstance(self._original, property)
        function: Any = self._original.fset if is_property else self._original

        @functools.wraps(function)
        def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
            method = function.__get__(owner, type(owner))
            for entry in self.entries:
                if entry.owner is owner:
                    method = functools.partial(entry.replacement, method)
            return method(*args, **kwargs)

        self._installed: Any = self._original.setter(call) if is_property else call
        setattr(cls, name, self._installed)
        _PLACES[self._key] = self

    def remove(self, entry: _Entry) -> None:
        self.entries = [other for other in self.entries if other is not entry]
        cls, name = self._key
        if not self.entries and _PLACES.get(self._key) is self:
            del _PLACES[self._key]
            if cls.__dict__.get(name) is self._installed:  # keep a later patch of other code
                setattr(cls, name, self._original)
