"""`.gz` and `.zst` files of JSON lines, also of several members or frames."""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dispatcher.errors import UsageError
from dispatcher.storage.inputs.fingerprints import fingerprint_of_file
from dispatcher.storage.inputs.reader import BLOCK_BYTES, CopyStop, InputReader, missing_package

FIRST_BYTES = {b"\x1f\x8b": ("gzip", ".gz"), b"\x28\xb5\x2f\xfd": ("zstd", ".zst")}
"""What such files begin with, and no text in UTF-8 does; what they are, and end in by name."""

_ZSTD_PIECE_BYTES = (1 << 6, 1 << 8, 1 << 12)
"""What is decoded at once, at least, at first and at most: a few bytes may grow by thousands."""
_ZSTD_GROWN_BYTES = 1 << 18


class CompressedReader(InputReader):
    """A compressed file; its text is what the lines are."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._raw: BinaryIO | None = None
        self._size = 0
        self._text_bytes = 0

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the compressed file."""
        return fingerprint_of_file(self._path)

    def blocks(self, stop: CopyStop) -> Iterator[bytes]:
        """Yield the text."""
        with self._path.open("rb") as self._raw:
            self._size = os.fstat(self._raw.fileno()).st_size
            for block in self._text(self._raw):
                stop.check()
                self._text_bytes += len(block)
                yield block

    def share_read(self) -> float | None:
        """Return which share of the compressed file has been read."""
        if self._raw is None or not self._size:
            return None
        return 1.0 if self._raw.closed else self._raw.tell() / self._size

    @abstractmethod
    def _text(self, raw: BinaryIO) -> Iterator[bytes]:
        """Yield the text in blocks."""

    def _no_such_kind(self, why: str) -> UsageError:
        return UsageError(f"the input {self.name} is {why}; name it by what it is, or make it anew")

    def _refuse(self, why: str) -> UsageError:
        if not self._text_bytes:
            return UsageError(
                f"the input {self.name} is {why}, and none of its text could be read; copy or make "
                "it anew"
            )
        return UsageError(
            f"the input {self.name} is {why}, after {self._text_bytes:,} bytes of text that could "
            "be read; copy or make it anew, or cut it to what is whole and name that"
        )


class GzipReader(CompressedReader):
    """A file that gzip made."""

    kind = "gzip"

    def _text(self, raw: BinaryIO) -> Iterator[bytes]:
        if not self._size:
            return
        try:
            with gzip.GzipFile(fileobj=raw, mode="rb") as file:
                # Not more than is there already: of a damaged file that is what can be read.
                while block := file.read1(BLOCK_BYTES):
                    yield block
        except gzip.BadGzipFile as error:
            if not self._text_bytes:
                raise self._no_such_kind("no gzip file") from error
            raise self._refuse(f"damaged ({error})") from error
        except zlib.error as error:
            raise self._refuse(f"damaged ({error})") from error
        except EOFError as error:
            raise self._refuse("cut off") from error


class ZstdReader(CompressedReader):
    """A file that zstd made."""

    kind = "zstd"

    def _text(self, raw: BinaryIO) -> Iterator[bytes]:
        new_frame, zstd_error = zstd_decoder(f"the input {self.name}")
        frame = new_frame()
        is_within = False
        gathered = bytearray()
        least, length, most = _ZSTD_PIECE_BYTES
        while piece := raw.read(length):
            had = len(gathered)
            while piece:
                try:
                    gathered += frame.decompress(piece)
                except zstd_error as error:
                    self._text_bytes += len(gathered)
                    if self._text_bytes or is_within:
                        raise self._refuse(f"damaged ({error})") from error
                    raise self._no_such_kind(f"no zstd file ({error})") from error
                is_within = not frame.eof
                piece = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = new_frame()
            grown = max(1, len(gathered) - had) / length
            length = int(min(max(least, _ZSTD_GROWN_BYTES / grown), 2 * length, most))
            if len(gathered) >= BLOCK_BYTES:
                yield bytes(gathered)
                gathered.clear()
        if gathered:
            yield bytes(gathered)
        if is_within:
            raise self._refuse("cut off")


def zstd_decoder(what: str) -> tuple[Callable[[], Any], type[Exception]]:
    """Return what makes a decoder of one frame, and the error it raises. Raises UsageError."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        options = {zstd.DecompressionParameter.window_log_max: 31}
        return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError
    try:
        import zstandard
    except ImportError as error:
        raise missing_package(what, "zstandard", "zstd") from error
    # As much as zstd --long=31 asks for, which a file must be made with.
    whole = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return whole.decompressobj, zstandard.ZstdError
