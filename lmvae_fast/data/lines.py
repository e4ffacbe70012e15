"""The lines of a file, gzip too, with errors that name the line."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lmvae_fast.documents import check_regular
from lmvae_fast.errors import DataError
from lmvae_fast.limits import limit, refuse
from lmvae_fast.memory import check_memory

# A line of the file: its number from 1, and its text without the line break.
Line = tuple[int, str]


def open_file(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed where its name ends in ``.gz``; DataError where it cannot be opened."""
    check_regular(path)
    try:
        if path.suffix.lower() == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot open {path}: {error.strerror or error}", remedy="check its permissions") from error


def check_inflated(path: Path) -> None:
    """Raises DataError where what a zip archive (``.npz``, ``.pt``) inflates to is over the limit, before any of it is read."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{path} is a damaged archive: {error}", remedy="get it anew") from error
    if size > limit("inflated"):
        raise refuse("inflated", f"{path} inflates to too much", size)
    check_memory(f"what {path} inflates to", "write it in parts", size)


def decoded_lines(file: IO[bytes], path: Path) -> Iterator[Line]:
    """The file's lines as text. Bytes are split first, so that an undecodable line is known by its number."""
    number = 0
    try:
        for number, raw in enumerate(_split(file, path), 1):
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                raw = raw[3:]
            if b"\0" in raw:
                raise DataError(
                    f"{path}, line {number}: there is a byte 0, which text does not have",
                    remedy="for UTF-16 convert the file, for example with: iconv -f utf-16 -t utf-8",
                )
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8",
                    value=f"byte 0x{raw[error.start]:02x} at byte {error.start} of the line ({error.reason})",
                    remedy="convert the file, for example with: iconv -f latin1 -t utf-8",
                ) from None
            yield number, text.rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: reading stopped after line {number}: {error}",
            remedy="the file is cut off or damaged: get it anew",
        ) from error


def one_line(text: str) -> str:
    """The text without blanks around it; line breaks within it, which would break every line-based output, are spaces."""
    return text.replace("\n", " ").replace("\r", " ").strip()


def _split(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Lines that end as Unix, Windows or old Macintosh files end them; DataError for one, or for a file, over the limits."""
    longest, most, records = limit("line"), limit("inflated"), limit("records")
    inflated = path.suffix.lower() == ".gz"
    number = size = 0
    while raw := file.readline(longest + 1):
        number, size = number + 1, size + len(raw)
        if len(raw) > longest:
            raise refuse("line", f"{path}, line {number} is too long", f"over {longest} bytes")
        if inflated and size > most:
            raise refuse("inflated", f"{path} inflates to too much", f"over {most} bytes")
        if number > records:
            raise refuse("records", f"{path} has too many lines", f"over {records}", unit="lines")
        if b"\r" in raw.rstrip(b"\r\n"):
            yield from raw.rstrip(b"\r\n").split(b"\r")
        else:
            yield raw
