"""Rows of caption tables: JSON-lines and CSV files that name picture files.

Columns are selected by the names in common use; docs/data.md lists them. A row that cannot be used
is yielded with its line number and a reason.
"""

import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from dalle_jax.data.builders import items
from dalle_jax.data.builders.items import Fields
from dalle_jax.types import UsageError

FILE_FIELDS = (
    "file_name", "filepath", "image_path", "image", "image_name", "filename", "file", "path", "img",
)  # fmt: skip
TEXT_FIELDS = ("text", "caption", "captions", "title", "comment", "sentence", "sentences", "prompt")
_MAX_LINE = 2**24


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a file name and captions, or a problem.

    Attributes:
      line: its number, from 1.
      end: bytes of the table that have been read after it.
      file: name of the picture file.
      captions: as written.
      problem: why the row cannot be used; "" for a good row.
      detail: more about the problem.
    """

    line: int
    end: int
    file: str = ""
    captions: tuple[str, ...] = ()
    problem: str = ""
    detail: str = ""


def captions_of(record: Any, field: str) -> tuple[str, ...]:
    """Captions of a JSON object: a string, or a list of strings or of {"text"/"raw"/…: string}."""
    if not isinstance(record, dict):
        return ()
    names = (field,) if field else TEXT_FIELDS
    value = next((record[n] for n in names if record.get(n) is not None), ())
    return strings(value)


def strings(value: Any) -> tuple[str, ...]:
    """Every string in a value: text, bytes, a JSON object with captions, or a list of these."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bytes):
        return (value.decode("utf-8"),)
    if isinstance(value, dict):
        return captions_of(value, "raw" if "raw" in value else "")
    if isinstance(value, (list, tuple)):
        return tuple(text for item in value for text in strings(item))
    return ()


def jsonl_rows(path: str, fields: Fields) -> Iterator[Row]:
    """Rows of a file with one JSON object per line, or with one JSON list of objects."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if start[:1] == b"[":
            yield from _json_list(path, file, fields)
            return
        end = 0
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
            end += len(line)
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield Row(number, end, problem="row is not UTF-8", detail=str(error))
            except (ValueError, RecursionError) as error:
                yield Row(number, end, problem="broken JSON", detail=str(error))
            else:
                yield _object_row(record, number, end, fields)


def _json_list(path: str, file: Any, fields: Fields) -> Iterator[Row]:
    try:
        records = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"--input={path} starts like a JSON list but is broken: {error}."
        ) from error
    size = os.path.getsize(path)
    for number, record in enumerate(records, 1):
        yield _object_row(record, number, round(size * number / len(records)), fields)


def _object_row(record: Any, number: int, end: int, fields: Fields) -> Row:
    if not isinstance(record, dict):
        return Row(number, end, problem="row is not a JSON object", detail=str(record)[:80])
    names = (fields.image,) if fields.image else FILE_FIELDS
    name = next((record[n] for n in names if isinstance(record.get(n), str) and record[n]), "")
    if not name:
        detail = f"has {', '.join(map(str, record))[:80]}; expected {' or '.join(names)}"
        return Row(number, end, problem="row names no picture", detail=detail)
    return Row(number, end, name, captions_of(record, fields.text))


def csv_rows(path: str, fields: Fields) -> Iterator[Row]:
    """Rows of a table separated by tabs, commas, semicolons or bars, with or without a header.

    Raises:
      UsageError: if it is not clear which column names pictures or which is the caption.
    """
    csv.field_size_limit(_MAX_LINE)
    # Bytes that are not UTF-8 become lone surrogates, so that a bad row does not end the reading.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        first = next(lines, "")
        if not first.strip():
            return
        separator = max("\t,;|", key=lambda c: (first.count(c), c == "\t"))
        header = [c.strip() for c in next(csv.reader([first], delimiter=separator), [])]
        columns = _columns(path, header, fields)
        body = iter(lines)
        if columns is None:  # no header: the first column names the file, the second is the caption
            columns, lines.pushed = (0, 1), [first]
        if separator == "\t":
            # Line by line: a caption that starts with a quotation mark can only spoil its own row.
            reader = (next(csv.reader([line], delimiter="\t"), []) for line in body)
        else:
            reader = csv.reader(body, delimiter=separator)
        number = int(not lines.pushed)
        while True:
            number += 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Row(number, lines.end, problem="broken row", detail=str(error))
                continue
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                continue
            yield _cells_row(cells, columns, number, lines.end)


def _cells_row(cells: Sequence[str], columns: tuple[int, int], number: int, end: int) -> Row:
    if len(cells) <= max(columns):
        return Row(number, end, problem="too few columns", detail=f"{len(cells)}")
    name, text = (cells[c].strip() for c in columns)
    try:
        (name + text).encode("utf-8")
    except UnicodeEncodeError:
        name = name.encode("utf-8", "replace").decode()
        return Row(number, end, name, problem="row is not UTF-8")
    if not name:
        return Row(number, end, problem="row names no picture")
    return Row(number, end, name, (text,))


def _columns(path: str, header: list[str], fields: Fields) -> tuple[int, int] | None:
    """The columns of file name and caption; None for a table without a header."""
    lower = [name.lower() for name in header]

    def find(name: str, usual: Sequence[str]) -> int | None:
        names = [name.lower()] if name else usual
        return next((lower.index(n) for n in names if n in lower), None)

    image, text = find(fields.image, FILE_FIELDS), find(fields.text, TEXT_FIELDS)
    if image is not None and text is not None:
        return image, text
    headless = len(header) >= 2 and lower[0].endswith(items.IMAGE_SUFFIXES)
    if headless and not fields.image and not fields.text:
        return None
    missing = "--image_field" if image is None else "--text_field"
    raise UsageError(
        f"--input={path} has columns {', '.join(header)[:200]}; which one "
        f"{'names the picture' if image is None else 'is the caption'}? Choose it with "
        f"{missing}=NAME."
    )


class _Lines:
    """Lines of a text file that counts the bytes read so far; `pushed` lines come first."""

    def __init__(self, file: Any):
        self._file, self.end, self.pushed = file, 0, []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self.pushed:
            return self.pushed.pop()
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.end += len(line.encode("utf-8", "surrogateescape"))
        return line.replace("\0", "")
