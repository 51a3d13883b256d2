"""Read typed fields of a JSON object; every error names the field by its path."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_Value = TypeVar("_Value")


class FieldError(ValueError):
    """Raised when a field of a report is missing or holds the wrong type of value."""


class Fields:
    """Reader of a JSON object's fields, each with its expected type.

    Args:
        value: The parsed object.
        path: Where it stands in the document, for errors; "" for the whole document.

    Raises:
        FieldError: If `value` is not an object.

    >>> Fields({"size": "big"}, "splits.test").integer("size")
    Traceback (most recent call last):
    ...
    hf_adafocal.report.fields.FieldError: splits.test.size must be a whole number, found 'big'.
    """

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, Mapping):
            raise FieldError(f"{path or 'The document'} must be an object, found {_shown(value)}.")
        for name in value:
            if not isinstance(name, str):
                raise FieldError(f"{path or 'The document'} must have text as names, found {_shown(name)}.")
        self.value, self.path = value, path
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null; counts as read."""
        self._read.add(name)
        return self.value.get(name) is not None

    def text(self, name: str) -> str:
        """Read a string."""
        return self._checked(name, "text", lambda value: isinstance(value, str))

    def boolean(self, name: str) -> bool:
        """Read true or false."""
        return self._checked(name, "true or false", lambda value: isinstance(value, bool))

    def integer(self, name: str) -> int:
        """Read an integer."""
        return self._checked(name, "a whole number", lambda value: type(value) is int)

    def number(self, name: str) -> float:
        """Read a finite number."""
        return self._checked(name, "a finite number", is_finite_number)

    def numbers(self, name: str) -> list[float]:
        """Read a list of finite numbers."""
        kind = "a list of finite numbers"
        return self._checked(name, kind, lambda v: isinstance(v, list) and all(map(is_finite_number, v)))

    def texts(self, name: str) -> list[str]:
        """Read a list of strings."""
        kind = "a list of texts"
        return self._checked(name, kind, lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v))

    def json(self, name: str) -> Any:
        """Read any JSON value without NaN and infinity."""
        return self._checked(name, "a JSON value without NaN or infinity", is_json)

    def fields(self, name: str) -> "Fields":
        """Read an object."""
        self._read.add(name)
        return Fields(self.value.get(name), self._path(name))

    def list_of(self, name: str, read: Callable[["Fields"], _Value]) -> list[_Value]:
        """Read a list of objects, each with a function."""
        values = self._checked(name, "a list", lambda value: isinstance(value, list))
        return [read(Fields(value, f"{self._path(name)}[{index}]")) for index, value in enumerate(values)]

    def map_of(self, name: str, read: Callable[["Fields"], _Value]) -> dict[str, _Value]:
        """Read an object of objects, each with a function."""
        inner = self.fields(name)
        return {key: read(inner.fields(key)) for key in inner.value}

    def metrics(self) -> dict[str, float]:
        """Read every field as a finite number."""
        return {name: self.number(name) for name in self.value}

    def refuse_others(self) -> None:
        """Reject fields that were not read."""
        others = sorted(set(self.value) - self._read)
        if others:
            raise FieldError(f"{self._path(others[0])} is not a field of a report.")

    def _path(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def _checked(self, name: str, kind: str, fits: Callable[[Any], bool]) -> Any:
        self._read.add(name)
        if name not in self.value:
            raise FieldError(f"{self._path(name)} is missing; it must be {kind}.")
        value = self.value[name]
        if not fits(value):
            raise FieldError(f"{self._path(name)} must be {kind}, found {_shown(value)}.")
        return value


def is_finite_number(value: Any) -> bool:
    """Whether a value is an int or a finite float, and not a bool."""
    if type(value) is int:
        return abs(value) < 2**1023
    return type(value) is float and math.isfinite(value)


def is_json(value: Any) -> bool:
    """Whether a value is JSON without NaN and infinity."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and is_json(inner) for name, inner in value.items())
    if isinstance(value, list):
        return all(map(is_json, value))
    return value is None or isinstance(value, str | bool) or is_finite_number(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
