"""Text of your own on disk, read a document at a time: plain files, and JSON lines."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from attn_core.engine.inputs import find_inputs

JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".html", ".xml", ".json", ".csv", *JSON_LINES)
FIELD = "text"  # of each JSON line


def files_of(text: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files given, and those below the folders given whose ending is one of ``TEXT_SUFFIXES``, in a fixed order.

    Raises:
        ValueError: nothing is given, a path does not exist, or a folder holds no text.
    """
    paths = [Path(text)] if isinstance(text, str | Path) else [Path(file) for file in text]
    return [item.path for item in find_inputs(paths, TEXT_SUFFIXES, what="files of text")]


def documents(files: Sequence[Path]) -> Iterator[bytes]:
    """A plain file as it is; of JSON lines, gzipped or not, the field ``"text"`` of each with a line break behind it.

    Raises:
        ValueError: a line that is no JSON, or has no such field or no string in it; a damaged archive.
    """
    for file in files:
        if not file.name.lower().endswith(JSON_LINES):
            yield file.read_bytes()
            continue
        with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as lines:
            try:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_of(line, f"{file}, line {number}").encode(errors="surrogatepass") + b"\n"
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{file} is damaged: {error}") from None


def _text_of(line: bytes, where: str) -> str:
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    text = record.get(FIELD) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"has the fields {', '.join(map(repr, record))}" if isinstance(record, dict) else f"is {line[:40]!r}"
        raise ValueError(f"{where} needs a string in the field {FIELD!r}; it {found}")
    return text


def parts_of(files: Sequence[Path], part: int) -> Iterator[bytes]:
    """Documents of one part of all text: the first eight tenths of its bytes (0), the ninth (1), or the last (2).

    A document that lies across a border is cut there, between two characters. All files are read twice, one document
    at a time.
    """
    total = sum(map(len, documents(files)))
    borders = [0, total * 8 // 10, total * 9 // 10, total]
    begin, end = borders[part : part + 2]
    position = 0
    for document in documents(files):
        first, last = (_between(document, border - position) for border in (begin, end))
        if first < last:
            yield document[first:last]
        position += len(document)
        if position >= end:
            return


def _between(document: bytes, place: int) -> int:
    """The place, within the document, moved back to where a character of UTF-8 begins."""
    place = min(max(place, 0), len(document))
    while 0 < place < len(document) and document[place] & 0xC0 == 0x80:
        place -= 1
    return place
