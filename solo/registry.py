"""Names to things. A name that is not known is an error that offers the nearest one."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from solo.errors import ConfigError
from solo.names import nearest

T = TypeVar("T")


def suggestion(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest known name, or nothing when none is near."""
    near = nearest(name, known)
    return f", did you mean {near!r}?" if near else ""


class UnknownName(ConfigError, KeyError):
    """A name that no registry row, entry point or ``module:Class`` answers to."""

    __str__ = Exception.__str__


class Registry(Mapping[str, T], Generic[T]):
    """A dictionary that also finds installed entry points of its group and ``"module:attribute"`` names.

    Args:
        group: the entry-point group, e.g. ``solo.methods``; also the name used in errors.
        kind: what ``"module:attribute"`` must be an instance of.
    """

    def __init__(self, group: str, kind: type = object) -> None:
        self.group, self.kind = group, kind
        self._rows: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files a thing under ``name``; a name taken by something else is an error."""

        def add(thing: T) -> T:
            if name in self._rows:
                raise ValueError(f"{name!r} is already registered in {self.group}: {self._rows[name]}")
            self._rows[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> T:
        if name in self._rows:
            return self._rows[name]
        if ":" in name:
            return self._imported(name)
        for point in entry_points(group=self.group, name=name):
            return self._rows.setdefault(name, point.load())
        known = {*self._rows, *entry_points(group=self.group).names}
        hint = suggestion(name, known) or f" (known: {', '.join(sorted(known))})"
        raise UnknownName(f"no {name!r} in {self.group}{hint}")

    def _imported(self, name: str) -> T:
        module, _, attribute = name.partition(":")
        try:
            thing: T = getattr(importlib.import_module(module), attribute)
        except Exception as error:          # of any kind: a plugin's file runs as it is imported
            raise UnknownName(f"{name!r} cannot be imported for {self.group}: {error}") from error
        if not isinstance(thing, self.kind):
            raise UnknownName(f"{name!r} is no {self.kind.__name__}")
        return thing

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
