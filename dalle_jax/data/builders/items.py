"""An item of a user's input, as every format yields it: an id, an encoded picture, its captions.

`formats` turns an input path into `Unit`s; each of them yields `Raw` items in a fixed order. An
item that cannot be used is yielded with its reason, so that it is counted and not lost.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
TEXT_SUFFIXES = (".txt", ".caption", ".text")
MAX_IMAGE_BYTES = 2**28  # 256 MiB of encoded picture
MAX_TEXT_BYTES = 2**20  # of caption file


@dataclasses.dataclass(frozen=True)
class Raw:
    """One item as stored by the user.

    Attributes:
      id: its path relative to the input, or its row: the same in every run.
      image: encoded bytes, or a file to read them from.
      captions: as written; cleaned later.
      problem: why it cannot be used; "" for a good item.
      detail: more about the problem, for skipped.jsonl.
      at: share of the unit that has been read after this item, for the time left.
    """

    id: str
    image: bytes | pathlib.Path | None = None
    captions: tuple[str, ...] = ()
    problem: str = ""
    detail: str = ""
    at: float = 1.0


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of the input.

    Attributes:
      key: changes when the piece's files change (names, sizes, times), so that finished work on
        an unchanged piece can be reused.
      share: of the input's total work; the shares of an input add up to 1.
      read: yields its items.
    """

    key: str
    share: float
    read: Callable[[], Iterator[Raw]]


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of columns or JSON fields; "" selects the first of the common names.

    Attributes:
      image: column of the picture or of its file name.
      text: column of the caption.
      root: folder that file names are relative to; "" is the folder of the table.
    """

    image: str = ""
    text: str = ""
    root: str = ""


def decode_text(data: bytes) -> str:
    """Text in UTF-8, with or without byte-order mark, or in UTF-16 with one.

    Raises:
      UnicodeDecodeError: for anything else.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")
