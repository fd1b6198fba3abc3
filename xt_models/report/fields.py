"""JSON looked at with care: what is missing or wrong is told with its file, key and rule."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """A file that the report cannot read; the message is one sentence that names it."""


class Field:
    """A value in a JSON file and the keys that lead to it.

    Each look at it names the rule it must keep; RecordError says which one was broken where.
    """

    def __init__(self, value: Any, file: str, place: str = "") -> None:
        self.value, self.file, self.place = value, file, place

    @classmethod
    def read(cls, path: Path) -> Field:
        """The whole of one file."""
        try:
            return cls(json.loads(path.read_text()), path.name)
        except FileNotFoundError:
            raise RecordError(f"report: {path} is not there.") from None
        except (OSError, ValueError) as error:
            raise RecordError(f"report: {path.name} is no JSON ({error}).") from None

    def broken(self, rule: str) -> RecordError:
        got = json.dumps(self.value)
        got = got if len(got) < 60 else f"{got[:56]} .."
        return RecordError(
            f"report: {self.file}: {self.place or 'the file'} must be {rule}, got {got}."
        )

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and self.value.get(key) is not None

    def __getitem__(self, key: str) -> Field:
        place = f"{self.place}.{key}" if self.place else key
        return Field(self.mapping().get(key), self.file, place)

    def mapping(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.broken("an object")
        return self.value

    def items(self) -> Iterator[tuple[str, Field]]:
        """Keys and values of an object that is not empty."""
        if not self.mapping():
            raise self.broken("an object that holds something")
        return ((key, self[key]) for key in self.mapping())

    def __iter__(self) -> Iterator[Field]:
        """Values of a list that is not empty."""
        if not isinstance(self.value, list) or not self.value:
            raise self.broken("a list that holds something")
        for place, value in enumerate(self.value):
            yield Field(value, self.file, f"{self.place}[{place}]")

    def text(self, default: str | None = None) -> str:
        if self.value is None and default is not None:
            return default
        if not isinstance(self.value, str):
            raise self.broken("a text")
        return self.value

    def one_of(self, *choices: str) -> str:
        if self.value not in choices:
            raise self.broken(f"one of {', '.join(choices)}")
        return str(self.value)

    def number(self, least: float = -math.inf) -> float:
        value = self.value
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value < least:
            raise self.broken("a number" + (f" of at least {least:g}" if least > -math.inf else ""))
        return float(value)

    def positive(self) -> float:
        if self.number() <= 0:
            raise self.broken("a number above 0")
        return float(self.value)

    def whole(self, least: int = 0) -> int:
        if int(self.number(least)) != self.value:
            raise self.broken("a whole number")
        return int(self.value)

    def numbers(self) -> list[float]:
        return [item.number() for item in self]
