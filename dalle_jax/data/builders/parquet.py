"""Rows of parquet files that hold encoded pictures and captions, as img2dataset writes them."""

from collections.abc import Iterator, Sequence
from typing import Any

from dalle_jax.data.builders import tables
from dalle_jax.data.builders.items import Fields, Raw
from dalle_jax.types import UsageError

BYTES_FIELDS = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "img", "bytes")
KEY_FIELDS = ("key", "__key__", "id", "uid", "file_name", "filename")


def read_shard(path: str, name: str, fields: Fields) -> Iterator[Raw]:
    """The rows of one parquet file, 64 in memory at once; ids begin with `name`.

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
        yield Raw(name, problem="damaged parquet file", detail=str(error)[:200])
        return
    with file:
        columns = file.schema_arrow.names
        image = _column(
            path, columns, fields.image, BYTES_FIELDS, "--image_field", "holds pictures"
        )
        text = _column(
            path, columns, fields.text, tables.TEXT_FIELDS, "--text_field", "is the caption"
        )
        key = next((c for c in KEY_FIELDS if c in columns and c not in (image, text)), None)
        status = "status" if "status" in columns else None
        selected = [c for c in (image, text, key, status) if c]
        total, number = max(1, file.metadata.num_rows), 0
        try:
            for batch in file.iter_batches(batch_size=64, columns=selected):
                for row in batch.to_pylist():
                    number += 1
                    id = f"{name}/{row[key] if key and row[key] is not None else number - 1}"
                    values = _values(row[image], row[text], row.get(status) if status else None)
                    yield Raw(id, at=number / total, **values)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            yield Raw(
                f"{name}/{number}",
                problem="damaged parquet: the rest is lost",
                detail=str(error)[:200],
            )


def _values(image: Any, text: Any, status: Any) -> dict[str, Any]:
    """The other fields of a row's `Raw`."""
    if isinstance(image, dict):  # Hugging Face's image feature
        image = image.get("bytes")
    if not isinstance(image, bytes) or not image:
        detail = f"status {status}" if status not in (None, "success") else ""
        return dict(problem="no picture in the row", detail=detail)
    return dict(image=image, captions=tables.strings(text))


def _column(
    path: str, columns: Sequence[str], name: str, usual: Sequence[str], flag: str, role: str
) -> str:
    """The column called `name`, or without a name the first of the usual ones."""
    column = next((c for c in ([name] if name else usual) if c in columns), None)
    if column is None:
        raise UsageError(
            f"--input={path} has columns {', '.join(columns)[:200]}; which one {role}? Choose it "
            f"with {flag}=NAME. (A table of file names or URLs is not a set of pictures: fetch "
            "them with img2dataset first, or use --from=csv.)"
        )
    return column
