"""Typed fields of one line of a pair file. Each mistake is a PairError that names file, line, key and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import kind, read_rows

MAX_TOKEN_ID = 2**31 - 1  # ids are stored as int32


@dataclass(frozen=True)
class Fields:
    """One line of a file. The getters check what they return."""

    source: str  # "file:line"
    line: int  # from 1
    values: dict[str, Any]

    def error(self, message: str) -> PairError:
        return PairError(f"{self.source}: {message}")

    def require(self, *keys: str) -> None:
        """Raises PairError if one of the keys is missing."""
        for key in keys:
            if key not in self.values:
                found = ", ".join(sorted(self.values)) or "none"
                raise self.error(
                    f'key "{key}" is missing (found: {found}); add it, or set data.format to the right one'
                )

    def text(self, key: str) -> str:
        """A string that is not blank; returned unchanged."""
        value = self.values[key]
        if not isinstance(value, str):
            raise self.error(f'"{key}" must be a string, not {kind(value)}')
        if not value.strip():
            raise self.error(f'"{key}" is empty; fill it in or remove the line')
        return value

    def name(self, *keys: str) -> str | None:
        """The first of the keys with a value, a string or a whole number, as a string; None if none has one."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, bool) or not isinstance(value, str | int | None):
                raise self.error(f'"{key}" must be a string or a whole number, not {kind(value)}')
            if value is not None and str(value).strip():
                return str(value)
        return None

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of the choices; the first if the key is absent."""
        value = self.values.get(key, choices[0])
        if value not in choices:
            raise self.error(f'"{key}" is {json.dumps(value)}; it must be one of {", ".join(choices)}')
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; empty if the key is absent or null."""
        value = self.values.get(key)
        if not isinstance(value, dict | None):
            raise self.error(f'"{key}" must be an object, not {kind(value)}')
        return value or {}

    def token_ids(self, key: str) -> list[int]:
        """At least one token id."""
        value = self.values[key]
        if not isinstance(value, list) or set(map(type, value)) - {int}:
            raise self.error(f'"{key}" must be a list of whole numbers (token ids)')
        if not value:
            raise self.error(f'"{key}" is empty; fill it in or remove the line')
        if min(value) < 0 or max(value) > MAX_TOKEN_ID:
            wrong = min(value) if min(value) < 0 else max(value)
            raise self.error(f'"{key}" holds {wrong}, outside the range of token ids (0 to {MAX_TOKEN_ID})')
        return value


def read_fields(path: Path) -> Iterator[Fields]:
    """The objects of a pair file. Raises PairError for the first line that is not one."""
    is_empty = True
    for line, values in read_rows(path):
        is_empty = False
        yield Fields(f"{path}:{line}", line, values)
    if is_empty:
        raise PairError(f"{path}: the file holds no pair; write one JSON object a line, or remove it from data.pairs")
