"""Durable files: on the disk once synced, and with a checksum taken while they are written.

A checkpoint must survive a power cut right after the save, and damage by a disk or network must be found on load.
"""

from __future__ import annotations

import io
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.schema.files import open_regular

_CHUNK = 1 << 22
_phases = logging.getLogger("danling_conf.checkpoint.phase")

STAGING, WRITING, MAKING_DURABLE = "staging", "writing", "making durable"
RENAMING, PRUNING, IDLE = "renaming", "pruning", "idle"
"""The phases of a save, in this order."""


def enter(phase: str) -> None:
    """Log, at debug level, that a save enters a phase."""
    _phases.debug(phase)


@dataclass(frozen=True)
class Sum:
    """Size in bytes and CRC-32 of a file."""

    size: int
    crc32: int


class SummedFile(io.RawIOBase):
    """A file that is written sequentially, and knows the size and checksum of what was written.

    The checksum is taken from memory, so that it also reveals damage on the way to the disk. Reading the file back
    would hit the page cache, and cost a second pass over a large checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by close
        self._size, self._crc = 0, 0
        self._path = path
        self.failed: OSError | None = None
        """The error of a failed write: torch's zip writer hides it behind "unexpected pos"."""

    @property
    def sum(self) -> Sum:
        return Sum(self._size, self._crc)

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        done = 0
        try:
            while done < len(view):  # an unbuffered write may be short: Linux writes at most 2 GiB per call
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            error.filename = str(self._path)
            self.failed = error
            raise
        self._crc = zlib.crc32(view, self._crc)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def create(path: Path) -> Iterator[SummedFile]:
    """A file to write; durable after `sync`. Raises OSError with the path where it cannot be written."""
    file = SummedFile(path)
    try:
        with file:
            yield file
    except Exception as error:
        if file.failed is not None and error is not file.failed:
            raise file.failed from error
        raise


def write_file(path: Path, content: bytes) -> Sum:
    """Write a file; durable after `sync`. Raises OSError with the path."""
    with create(path) as file:
        file.write(content)
    return file.sum


def size_of(path: Path) -> int:
    """Bytes of a regular file. Raises FileNotFoundError, or Damaged for anything that is none."""
    descriptor = open_regular(path)
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def sum_of(path: Path) -> Sum:
    """Size and checksum of a regular file as it is read. Raises OSError, or Damaged for anything that is none."""
    size, crc = 0, 0
    with open(open_regular(path), "rb", buffering=0) as file:
        while block := file.read(_CHUNK):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return Sum(size, crc)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    # A rename changes the folder, not the file: without an fsync of the folder, a crash may undo it.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Logs the start and the end of a phase of a save."""
    enter(name)
    try:
        yield
    finally:
        enter(IDLE)
