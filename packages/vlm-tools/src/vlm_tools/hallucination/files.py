"""JSON files of benchmarks: read whole, with one message for everything that can be wrong with them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Field = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Whether a field holds text."""
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Whether a field holds an integer, as a number or as text."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and value.strip().isdecimal()
    )


def is_texts(value: Any) -> bool:
    """Whether a field holds a list of texts."""
    return isinstance(value, list) and all(map(is_text, value))


def read_text(path: Path, caller: str) -> str:
    """A text file in UTF-8, with or without a mark at its start.

    Raises:
        ValueError: it cannot be read, or is no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{caller}: {path}: {error.strerror or error}") from None
    except ValueError:  # not UTF-8, or a null byte in the name
        raise ValueError(f"{caller}: {path} is no text in UTF-8") from None


def read_json(path: Path, caller: str) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it cannot be read, or is no JSON.
    """
    return _parsed(read_text(path, caller), caller, str(path))


def read_rows(path: Path, caller: str, fields: Mapping[str, Field]) -> list[dict[str, Any]]:
    """Records of a file: one JSON array, or one JSON object per line.

    Args:
        fields: what every record must hold, and of what kind.

    Raises:
        ValueError: it cannot be read, is neither, or a record lacks a field; the message says which one.
    """
    text = read_text(path, caller)
    rows: list[tuple[str, Any]] = list(_records(text, caller, path))
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{caller}: {path}, {place} is no object with {', '.join(fields)}")
        for name, fits in fields.items():
            if name not in row:
                raise ValueError(f"{caller}: {path}, {place} has no {name!r}")
            if not fits(row[name]):
                raise ValueError(f"{caller}: {path}, {place}: {name!r} cannot be {str(row[name])[:60]!r}")
    return [row for _, row in rows]


def _records(text: str, caller: str, path: Path) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        found: Sequence[Any] = _parsed(text, caller, str(path))
        yield from ((f"record {number}", row) for number, row in enumerate(found, 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"line {number}", _parsed(line, caller, f"{path}, line {number}")


def _parsed(text: str, caller: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{caller}: {place} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{caller}: {place} is no JSON ({error})") from None
