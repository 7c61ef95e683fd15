"""Rows of caption tables: jsonl and csv files that name pictures, parquet files that hold them.

Fields are found by the names in common use; see docs/data.md. A row that cannot be used keeps its
line number and reason.
"""

import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from dalle_jax.types import UsageError

FILE_FIELDS = (
    "file_name", "filepath", "image_path", "image", "image_name", "filename", "file", "path", "img",
)  # fmt: skip
TEXT_FIELDS = ("text", "caption", "captions", "title", "comment", "sentence", "sentences", "prompt")
BYTES_FIELDS = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "img", "bytes")
KEY_FIELDS = ("key", "__key__", "id", "uid", "file_name", "filename")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_MAX_LINE = 2**24


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: a file name and captions, or a problem. `end`: bytes of the table read so far."""

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
    return _strings(value)


def _strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bytes):
        return (value.decode("utf-8"),)
    if isinstance(value, dict):
        return captions_of(value, "raw" if "raw" in value else "")
    if isinstance(value, (list, tuple)):
        return tuple(text for item in value for text in _strings(item))
    return ()


def jsonl_rows(path: str, fields: Any) -> Iterator[Row]:
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


def _json_list(path: str, file: Any, fields: Any) -> Iterator[Row]:
    try:
        records = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"--input={path} starts like a JSON list but is broken: {error}."
        ) from error
    size = os.path.getsize(path)
    for number, record in enumerate(records, 1):
        yield _object_row(record, number, round(size * number / len(records)), fields)


def _object_row(record: Any, number: int, end: int, fields: Any) -> Row:
    if not isinstance(record, dict):
        return Row(number, end, problem="row is not a JSON object", detail=str(record)[:80])
    names = (fields.image,) if fields.image else FILE_FIELDS
    name = next((record[n] for n in names if isinstance(record.get(n), str) and record[n]), "")
    if not name:
        detail = f"has {', '.join(map(str, record))[:80]}; wanted {' or '.join(names)}"
        return Row(number, end, problem="row names no picture", detail=detail)
    return Row(number, end, name, captions_of(record, fields.text))


def csv_rows(path: str, fields: Any) -> Iterator[Row]:
    """Rows of a table separated by tabs, commas, semicolons or bars, with or without a header.

    Raises:
      UsageError: if no column of pictures or of captions can be told.
    """
    csv.field_size_limit(_MAX_LINE)
    # What is not UTF-8 becomes lone surrogates, so that one bad row does not end the reading.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        first = next(lines, "")
        if not first.strip():
            return
        separator = max("\t,;|", key=lambda c: (first.count(c), c == "\t"))
        header = [c.strip() for c in next(csv.reader([first], delimiter=separator), [])]
        columns = _columns(path, header, fields)
        body = iter(lines)
        if columns is None:  # no header: name, then caption
            columns, lines.pushed = (0, 1), [first]
        if separator == "\t":
            # Line by line: a caption that starts with a quotation mark spoils its own row at most.
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


def _columns(path: str, header: list[str], fields: Any) -> tuple[int, int] | None:
    """Columns of name and caption; None for a table without header."""
    lower = [name.lower() for name in header]

    def find(wanted: str, usual: Sequence[str]) -> int | None:
        names = [wanted.lower()] if wanted else usual
        return next((lower.index(name) for name in names if name in lower), None)

    image, text = find(fields.image, FILE_FIELDS), find(fields.text, TEXT_FIELDS)
    if image is not None and text is not None:
        return image, text
    headless = len(header) >= 2 and lower[0].endswith(_SUFFIXES)
    if headless and not fields.image and not fields.text:
        return None
    missing = "--image_field" if image is None else "--text_field"
    raise UsageError(
        f"--input={path} has columns {', '.join(header)[:200]}; which one "
        f"{'names the picture' if image is None else 'is the caption'}? Say it with {missing}=NAME."
    )


class _Lines:
    """Lines of a text file with the bytes read so far; `pushed` lines come first."""

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


def parquet_items(path: str, name: str, fields: Any) -> Iterator[dict[str, Any]]:
    """Rows of one parquet file as keyword arguments of formats.Raw; 64 rows in memory at once.

    Raises:
      UsageError: if pyarrow is missing, or no column holds pictures or captions.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(
            "--from=parquet needs pyarrow, which is not installed: pip install pyarrow."
        ) from error
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        yield dict(id=name, problem="damaged parquet file", detail=str(error)[:200])
        return
    with file:
        columns = file.schema_arrow.names
        image = _column(
            path, columns, fields.image, BYTES_FIELDS, "--image_field", "holds pictures"
        )
        text = _column(path, columns, fields.text, TEXT_FIELDS, "--text_field", "is the caption")
        key = next((c for c in KEY_FIELDS if c in columns and c not in (image, text)), None)
        status = "status" if "status" in columns else None
        wanted = [c for c in (image, text, key, status) if c]
        total, number = max(1, file.metadata.num_rows), 0
        try:
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    id = f"{name}/{row[key] if key and row[key] is not None else number - 1}"
                    item = _parquet_item(row[image], row[text], row.get(status) if status else None)
                    yield dict(id=id, at=number / total, **item)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            yield dict(
                id=f"{name}/{number}",
                problem="damaged parquet: the rest is lost",
                detail=str(error)[:200],
            )


def _parquet_item(image: Any, text: Any, status: Any) -> dict[str, Any]:
    if isinstance(image, dict):  # Hugging Face's image feature
        image = image.get("bytes")
    if not isinstance(image, bytes) or not image:
        detail = f"status {status}" if status not in (None, "success") else ""
        return dict(problem="no picture in the row", detail=detail)
    return dict(image=image, captions=_strings(text))


def _column(
    path: str, columns: Sequence[str], wanted: str, usual: Sequence[str], flag: str, role: str
) -> str:
    found = next((c for c in ([wanted] if wanted else usual) if c in columns), None)
    if found is None:
        raise UsageError(
            f"--input={path} has columns {', '.join(columns)[:200]}; which one {role}? Say it with "
            f"{flag}=NAME. (A table of file names or URLs is not a set of pictures: fetch them "
            "with img2dataset first, or use --from=csv.)"
        )
    return found
