"""Pixels of TIFF files. Tiles and strips are fetched with `pread` and decoded one by one.

tifffile and imagecodecs decode, without a lock:

    4096 x 4096 x 3 uint8, 512 px tiles, two cores; Mpx/s with 1 and 2 threads    JPEG      deflate
    pread + TiffPage.decode                                                     277, 518   146, 274
    zarr.open(page.aszarr())                                                    226, 188   127, 115
"""

from __future__ import annotations

import io
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache, partial
from typing import Any

import numpy as np

from .base import Array, DamagedTileError, Empty, Window, expect, reason
from .files import FileSource, bands_first, read_rows
from .metadata import tiff_metadata
from .tiff_page import (
    BLACK_IS_ZERO,
    COMPRESSIONS,
    JPEG,
    PALETTE,
    PHOTOMETRICS,
    WHITE_IS_ZERO,
    Page,
    read_pages,
)

# Decoded tiles kept per source, only those that a window met in part. Walking in 256 px regions
# over 512 px tiles meets each tile four times; 24 MiB hold a row of such tiles of a 16,000 px image
# of 3 bands. Measured as above, one thread: 193 Mpx/s of JPEG and 113 of deflate where it holds the
# row, 128 and 67 with only the last tile kept. Twice as much would be a fifth of what streaming
# needs in all. Keeping whole tiles too costs 14 to 22 % where windows fit tiles, so windows aligned
# to `source.block` pass the cache by and are the fast ones.
CACHE_BYTES = 24 << 20


class _TileCache:
    """Decoded tiles, the last used kept within a byte budget; none is decoded twice at a time."""

    def __init__(self, budget: int) -> None:
        self._budget, self._bytes = budget, 0
        self._lock = threading.Lock()
        self._tiles: OrderedDict[tuple[int, int], Future[Array]] = OrderedDict()

    def get(self, key: tuple[int, int], decode: Callable[[], Array], keep: bool) -> Array:
        """The tile of `key`, decoded if it is not here; kept if other windows will want it too."""
        with self._lock:
            known = self._tiles.get(key)
            if known is not None:
                self._tiles.move_to_end(key)
            elif keep:
                mine = self._tiles[key] = Future()
        if known is not None:
            return known.result()
        if not keep:
            return decode()
        try:
            tile = decode()
        except BaseException as error:
            with self._lock:
                del self._tiles[key]
            mine.set_exception(error)
            raise
        with self._lock:
            mine.set_result(tile)
            self._bytes += tile.nbytes
            for old in list(self._tiles):
                if self._bytes <= self._budget:
                    break
                # The newest stays, whatever its size: a strip of the whole image is met again.
                if old != key and self._tiles[old].done():
                    self._bytes -= self._tiles.pop(old).result().nbytes
        return tile


class TiffSource(FileSource):
    """TIFF and BigTIFF: tiles or strips, interleaved or planar, with pyramid levels."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._cache = _TileCache(CACHE_BYTES)
        self._pages, others = read_pages(self._file)
        base = self._pages[0]
        self._palette = _palette(base) if base.photometric == PALETTE else None
        bands = base.samples if self._palette is None else 3
        self._set_size([page.size for page in self._pages], bands, base.dtype)
        self.block = (1, self.width) if base.in_rows else (base.rows, base.columns)
        self.metadata = {
            "format": "tiff",
            "compression": COMPRESSIONS[base.compression][0],
            "photometric": PHOTOMETRICS[base.photometric],
            **({"other_pages": others} if others else {}),
            **tiff_metadata(base.directory),
        }

    def close(self) -> None:
        super().close()
        self._cache = _TileCache(0)

    def _read(self, window: Window, level: int, empty: Empty) -> Array:
        self._file.check_unchanged()
        page = self._pages[level]
        if page.in_rows:
            layout = (page.grid[0], page.width, page.plane_samples)
            place = partial(_strip_row, page)
            out = read_rows(self._file, place, layout, page.dtype, window, empty)
        else:
            out = self._read_segments(page, level, window, empty)
        if self._palette is not None:
            return self._palette[:, out[0, :, :, 0]]
        bands = bands_first(out)
        if page.dtype.kind == "b":
            bands = bands * np.uint8(255)
        bands = bands.astype(self.dtype, copy=False)
        is_inverted = page.photometric == WHITE_IS_ZERO and self.dtype.kind == "u"
        return ~bands if is_inverted else bands

    def _read_segments(self, page: Page, level: int, window: Window, empty: Empty) -> Array:
        """A window `[planes, height, width, samples]`, put together from tiles or strips."""
        top, left, height, width = window
        bottom, right = top + height, left + width
        shape = (page.grid[0], height, width, page.plane_samples)
        out = empty(shape, page.dtype.newbyteorder("="))
        for plane in range(page.grid[0]):
            for row in range(top // page.rows, -(-bottom // page.rows)):
                for column in range(left // page.columns, -(-right // page.columns)):
                    place = plane, row, column
                    y, x = row * page.rows, column * page.columns  # of the tile in the image
                    y0, y1 = max(top, y), min(bottom, y + page.rows)
                    x0, x1 = max(left, x), min(right, x + page.columns)
                    is_part = (y1 - y0, x1 - x0) != page.size_inside(row, column)
                    decode = partial(self._decode, page, level, place)
                    tile = self._cache.get((level, page.index(*place)), decode, keep=is_part)
                    out[plane, y0 - top : y1 - top, x0 - left : x1 - left] = tile[
                        y0 - y : y1 - y, x0 - x : x1 - x
                    ]
        return out

    def _decode(self, page: Page, level: int, place: tuple[int, int, int]) -> Array:
        """The tile or strip at (plane, row, column), `[rows, columns, samples]`, native order."""
        index, (_, row, column) = page.index(*place), place
        offset, count = int(page.offsets[index]), int(page.counts[index])
        inside = page.size_inside(row, column)
        if not count:
            shape = (*inside, page.plane_samples)
            return np.full(shape, page.fill, page.dtype.newbyteorder("="))
        data = self._file.pread(offset, count)
        size = (page.rows, page.columns) if page.tiled else inside
        jfif = False
        try:
            if page.compression == JPEG:
                size = _jpeg_size(data, size, inside)
                jfif = data[6:10] == b"JFIF"
            with self.spans("decode"):
                tile = _decoder(_small_tiff(page, *size, jfif))(data, page.jpeg_tables)
            if tile.shape != (*size, page.plane_samples):
                raise ValueError(f"pixels of {list(tile.shape)}")
            return tile
        except MemoryError:
            raise
        except Exception as error:
            what = f"{page.segment} {index} (row {row}, column {column})"
            where = f"{count:,} bytes at byte {offset:,}"
            raise DamagedTileError(
                f"{self.name}: expected {what} of level {level} in {where}, "
                f"found damaged data ({reason(error)})."
            ) from error


def _strip_row(page: Page, plane: int, row: int) -> tuple[int, int]:
    """Byte offset of an uncompressed row, and the rows left in its strip."""
    strip, inside = divmod(row, page.rows)
    offset = int(page.offsets[page.index(plane, strip, 0)])
    return offset + inside * page.segment_bytes(1), page.rows - inside


def _palette(page: Page) -> Array:
    """Colour map, uint8 `[3, 256]`."""
    values = page.directory.array("palette", 3 * 256)
    whole = values is not None and values.dtype.kind == "u" and values.shape == (3 * 256,)
    expect(whole, page.name, "a palette of 3 x 256 numbers", "another")
    colours = np.asarray(values).astype(np.uint16).reshape(3, 256)
    # Some writers store 8-bit colours in the 16-bit fields.
    return (colours >> (8 if colours.max() > 255 else 0)).astype(np.uint8)


def _jpeg_size(data: bytes, most: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that a JPEG stream claims, before it is decoded.

    A stream that is cut off or overwritten decodes to grey without an error, so it must also end
    with the end marker.
    """
    if not data.startswith(b"\xff\xd8") or not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("JPEG without a start or an end marker")
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            rows, columns = struct.unpack(">HH", data[at + 5 : at + 9])
            if not (least[0] <= rows <= most[0] and least[1] <= columns <= most[1]):
                raise ValueError(f"JPEG of {rows} x {columns} px instead of {most[0]} x {most[1]}")
            return rows, columns
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # without a length
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ValueError("JPEG without a frame header")


def _small_tiff(page: Page, rows: int, columns: int, jfif: bool) -> bytes:
    """The header of a TIFF whose only strip is one tile or strip of a page, without its pixels.

    tifffile gets this header, written from checked numbers, never the header of the file. A plane
    of its own is a grey image.
    """
    order, count = page.directory.order, page.directory.count
    start = b"\xff\xd8\xff\xe0\0\x10JFIF\0\0" if jfif else bytes(12)  # tifffile looks for JFIF
    photometric = BLACK_IS_ZERO if page.planar else page.photometric
    has_extra = count("extra_samples") > 0 and not page.planar
    kind = {"b": 1, "u": 1, "i": 2, "f": 3}[page.dtype.kind]
    tags = [(256, columns), (257, rows), (258, page.bits), (259, page.compression)]
    tags += [(262, photometric), (266, page.fill_order), (273, 8), (277, page.plane_samples)]
    tags += [(278, rows), (279, len(start)), (284, 1), (317, page.predictor)]
    tags += [*([(338, 0)] if has_extra else []), (339, kind)]
    header = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(start))
    body = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    return header + start + struct.pack(order + "H", len(tags)) + body + bytes(4)


@lru_cache(maxsize=256)
def _decoder(small_tiff: bytes) -> Callable[[bytes, bytes | None], Array]:
    """tifffile's decoder for the strip of a small TIFF; (stored bytes, JPEG tables) -> pixels."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(small_tiff)) as file:
        decode: Callable[..., Any] = file.pages[0].decode

    def decode_segment(data: bytes, jpeg_tables: bytes | None) -> Array:
        tile: Array = decode(data, 0, jpegtables=jpeg_tables)[0][0]
        return tile

    return decode_segment
