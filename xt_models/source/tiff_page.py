"""Pages of TIFF files: what the tags say of an image, held against the file before any decoding.

Numbers are judged before arrays and arrays before data, so that a header that claims millions of
tiles costs no more than the bytes that it really has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .base import DTYPES, MAX_SEGMENT_BYTES, MAX_SEGMENTS, MAX_SUB_IFDS, Array, SourceError, expect
from .files import File
from .tiff_directory import Directory, read_directory, walk_directories

JPEG, _FAX = 7, (2, 3, 4)
# TIFF compression -> (name, the most decoded bytes that one stored byte can give). Deflate stays
# below 1032, LZW packs at most 4095 bytes into 12 bits, a JPEG block takes 2 bits or more.
COMPRESSIONS = {
    1: ("none", 1),
    2: ("ccitt-rle", 1 << 20),
    3: ("ccitt-g3", 1 << 20),
    4: ("ccitt-g4", 1 << 20),
    5: ("lzw", 2800),
    JPEG: ("jpeg", 2048),
    8: ("deflate", 1032),
    32773: ("packbits", 64),
    32946: ("deflate", 1032),
    34925: ("lzma", 20_000),
    50000: ("zstd", 50_000),
}
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
PHOTOMETRICS = {
    WHITE_IS_ZERO: "white is zero",
    BLACK_IS_ZERO: "black is zero",
    RGB: "RGB",
    PALETTE: "palette",
    YCBCR: "YCbCr",
}
_REFUSED_COLOURS = {4: "a mask", 5: "CMYK", 8: "CIELab", 32803: "a sensor mosaic"}
_REDUCED, _MASK = 1, 4  # bits of subfile


@dataclass
class Page:
    """What a directory says of its image, checked by `read_pages`; a segment is a tile or strip."""

    directory: Directory
    height: int
    width: int
    samples: int
    dtype: np.dtype[Any]  # file byte order; bool for 1-bit
    compression: int
    photometric: int
    planar: bool
    predictor: int
    fill_order: int
    tiled: bool
    rows: int  # of a segment
    columns: int
    subfile: int
    # Bytes, one per segment, row by row, plane by plane:
    offsets: Array = field(default_factory=lambda: np.empty(0, np.uint64))
    counts: Array = field(default_factory=lambda: np.empty(0, np.uint64))
    jpeg_tables: bytes | None = None
    fill: Any = None  # value of tiles that a sparse file leaves out

    @property
    def name(self) -> str:
        return self.directory.file.name

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def segment(self) -> str:
        """What to call one."""
        return "tile" if self.tiled else "strip"

    @property
    def grid(self) -> tuple[int, int, int]:
        """Planes, and segments down and across."""
        planes = self.samples if self.planar else 1
        return planes, -(-self.height // self.rows), -(-self.width // self.columns)

    @property
    def plane_samples(self) -> int:
        return 1 if self.planar else self.samples

    @property
    def in_rows(self) -> bool:
        """Plain rows of whole pixels, which need no decoding."""
        plain = self.compression == self.predictor == self.fill_order == 1
        return plain and not self.tiled and self.dtype.kind != "b"

    @property
    def bits(self) -> int:
        return 1 if self.dtype.kind == "b" else 8 * self.dtype.itemsize

    def index(self, plane: int, row: int, column: int) -> int:
        """Where a segment stands in `offsets` and `counts`."""
        _, down, across = self.grid
        return (plane * down + row) * across + column

    def segment_bytes(self, rows: int) -> int:
        """Decoded bytes of a segment of so many rows."""
        return rows * -(-self.columns * self.plane_samples * self.bits // 8)

    def size_inside(self, row: int, column: int) -> tuple[int, int]:
        """Rows and columns of a segment inside the image; strips end there, tiles are padded."""
        height = min(self.rows, self.height - row * self.rows)
        return height, min(self.columns, self.width - column * self.columns)


def read_pages(file: File) -> tuple[list[Page], int]:
    """The pages of the pyramid, largest first, and the number of other pages.

    What is returned is sensible in itself and held against the file: every segment lies inside it,
    and its byte count can hold its pixels.
    """
    chain = walk_directories(file)
    first = next(chain)
    base = _parse_page(first)
    _check_segments(base, 0)
    offsets = first.array("sub_ifds", MAX_SUB_IFDS)
    below = [] if offsets is None else [int(offset) for offset in offsets.flat]
    found = [(read_directory(file, first.order, first.big, offset), True) for offset in below]
    found += [(directory, False) for directory in chain]
    levels: dict[tuple[int, int], Page] = {}
    others = 0
    for directory, is_sub_ifd in found:
        try:
            page = _parse_page(directory)
        except SourceError:  # a thumbnail or label in a form that we do not read
            others += 1
            continue
        twin = (page.size, page.samples, page.dtype) == (base.size, base.samples, base.dtype)
        twin = twin and not page.subfile & (_REDUCED | _MASK)
        again = f"a stack (a second page of {page.height} x {page.width} px); split it"
        expected = "one image, with smaller pages as its levels"
        expect(not twin, file.name, expected, f"{again}, or pass an array")
        if _is_level(base, page, is_sub_ifd) and page.size not in levels:
            levels[page.size] = page
        else:
            others += 1
    pages = [base, *(levels[size] for size in sorted(levels, reverse=True))]
    for level, page in enumerate(pages[1:], start=1):
        _check_segments(page, level)
    return pages, others


def _is_level(base: Page, page: Page, is_sub_ifd: bool) -> bool:
    """Whether a page shows the image of `base`, smaller by the same factor in both directions."""
    marked = is_sub_ifd or bool(page.subfile & _REDUCED) or (base.tiled and page.tiled)
    colours = {base.photometric, page.photometric}
    alike = (page.samples, page.dtype) == (base.samples, base.dtype)
    alike = alike and (len(colours) == 1 or colours == {RGB, YCBCR}) and not page.subfile & _MASK
    fits = page.height <= base.height and page.width <= base.width
    smaller = fits and page.size != base.size
    # One pixel of rounding in either size.
    skew = abs(page.height * base.width - page.width * base.height)
    return marked and alike and smaller and skew <= base.width + base.height


def _parse_page(directory: Directory) -> Page:
    """Read the fields that describe the image; anything we do not support raises."""
    name, number = directory.file.name, directory.number
    height, width, samples = number("height", 0), number("width", 0), number("samples", 1)
    found = f"{height} x {width} px, {samples} bands"
    filled = min(height, width, samples) > 0
    expect(filled, name, "at least one row, column and band", found)
    compression = number("compression", 1)
    codecs = ", ".join(sorted({text for text, _ in COMPRESSIONS.values()}))
    hint = f'number {compression} (backend="rasterio" or "openslide" may read it)'
    expect(compression in COMPRESSIONS, name, f"TIFF compression of {codecs}", hint)
    dtype = _sample_dtype(directory, samples)

    tiled = "tile_width" in directory.fields or "tile_offsets" in directory.fields
    rows, columns = number("tile_height", 0), number("tile_width", 0)
    if not tiled:
        rows, columns = min(number("strip_rows", height), height), width
    expect(min(rows, columns) > 0, name, "tiles or strips of some pixels", f"{rows} x {columns}")
    page = Page(
        directory=directory,
        height=height,
        width=width,
        samples=samples,
        dtype=dtype,
        compression=compression,
        photometric=number("photometric", WHITE_IS_ZERO if compression in _FAX else BLACK_IS_ZERO),
        planar=number("planar", 1) == 2 and samples > 1,
        predictor=1 if compression in (JPEG, *_FAX) else number("predictor", 1),
        fill_order=number("fill_order", 1),
        tiled=tiled,
        rows=rows,
        columns=columns,
        subfile=number("subfile", _REDUCED if number("old_subfile", 1) == 2 else 0),
    )
    _check_colour(page)
    return page


def _sample_dtype(directory: Directory, samples: int) -> np.dtype[Any]:
    """The data type of samples in file byte order; bool for 1-bit."""
    kind, bits = directory.number("sample_format", 1), directory.number("bits", 1)
    letter = {1: "u", 2: "i", 3: "f", 4: "u"}.get(kind)
    bilevel = letter == "u" and bits == samples == 1
    whole = letter is not None and bits in ((16, 32, 64) if letter == "f" else (8, 16, 32, 64))
    found = f"{bits} bits of sample format {kind}" + (" (complex)" if kind in (5, 6) else "")
    expect(bilevel or whole, directory.file.name, f"samples of {DTYPES}", found)
    return np.dtype(bool) if bilevel else np.dtype(f"{directory.order}{letter}{bits // 8}")


def _check_colour(page: Page) -> None:
    """Photometric, predictor, depth and codec must fit together."""
    kind, codec = page.photometric, page.compression
    known = ", ".join(PHOTOMETRICS.values())
    found = f"{_REFUSED_COLOURS.get(kind, f'photometric {kind}')}; convert it to RGB"
    expect(kind in PHOTOMETRICS, page.name, f"TIFF colours of {known}", found)
    bytes_only = page.dtype == np.dtype(np.uint8)
    predictors = {"f": (1, 2, 3), "b": (1,)}.get(page.dtype.kind, (1, 2))
    ycbcr = codec == JPEG and page.samples == 3 and not page.planar
    what = f"{page.samples} bands of {page.bits}-bit {page.dtype.kind}, {COMPRESSIONS[codec][0]}"
    for holds, expected in (
        (page.directory.number("depth", 1) == 1, "a flat image, not a volume"),
        (kind != RGB or page.samples >= 3, "RGB of 3 bands or more"),
        (kind != PALETTE or (page.samples == 1 and bytes_only), "a palette image of 8 bits"),
        (kind != YCBCR or ycbcr, "YCbCr of 3 interleaved bands in JPEG"),
        (codec != JPEG or bytes_only, "JPEG of 8 bits"),
        (codec != JPEG or page.plane_samples in (1, 3, 4), "JPEG of 1, 3 or 4 bands"),
        (codec not in _FAX or page.dtype.kind == "b", "fax compression of 1 bit"),
        (page.predictor in predictors, f"a predictor of {predictors}, not {page.predictor}"),
        (page.fill_order in (1, 2), f"fill order 1 or 2, not {page.fill_order}"),
    ):
        expect(holds, page.name, expected, what)


def _check_segments(page: Page, level: int) -> None:
    """Load offsets and byte counts, and hold them against the file; nothing is decoded."""
    directory, name, what = page.directory, page.name, page.segment
    expected = math.prod(page.grid)
    size = f"{page.height:,} x {page.width:,} px in {what}s of {page.rows:,} x {page.columns:,}"
    for part in ("offsets", "counts"):
        found = directory.count(f"{what}_{part}")
        needed = f"{expected:,} {what} {part} in level {level} ({size})"
        expect(found == expected, name, needed, f"{found:,}")
    limit = f"at most {MAX_SEGMENTS:,} {what}s"
    expect(expected <= MAX_SEGMENTS, name, limit, f"{expected:,} ({size})")
    decoded = page.segment_bytes(page.rows)
    limit = f"{what}s of at most {MAX_SEGMENT_BYTES:,} decoded bytes (rewrite as tiled TIFF)"
    fits = page.in_rows or decoded <= MAX_SEGMENT_BYTES
    expect(fits, name, limit, f"{decoded:,} ({size})")

    page.offsets, page.counts = _segment_numbers(page, "offsets"), _segment_numbers(page, "counts")
    held = np.uint64(directory.file.size)
    outside = (page.counts > held) | (page.offsets > held - np.minimum(page.counts, held))
    at = int(outside.argmax())
    inside = f"{what} {at:,} of level {level} inside the {held:,} bytes of the file"
    found_at = f"{page.counts[at]:,} bytes at {page.offsets[at]:,}"
    expect(not outside.any(), name, inside, found_at)

    absent = (page.counts == 0) & (page.offsets == 0)
    if absent.any():
        page.fill = _nodata_fill(page)
        gap = f"{what} {int(absent.argmax()):,} of level {level} in the file"
        known = page.fill is not None and not page.in_rows
        expect(known, name, f"{gap}, or a nodata value to stand for it", "neither")
    _check_counts(page, level, absent)
    tables = directory.array("jpeg_tables", 1 << 16)
    page.jpeg_tables = None if tables is None else tables.tobytes()


def _segment_numbers(page: Page, part: str) -> Array:
    """Offsets or byte counts, uint64; a negative one becomes too large, which is refused later."""
    values = page.directory.array(f"{page.segment}_{part}", MAX_SEGMENTS)
    integers = values is not None and values.dtype.kind in "iu" and values.ndim == 1
    expect(integers, page.name, f"integers as {page.segment} {part}", "another type")
    return np.asarray(values).astype(np.uint64, copy=False)


def _nodata_fill(page: Page) -> Any:
    """The nodata value in the page's dtype, or None: an absent tile is never made up."""
    try:
        value = float(page.directory.text("nodata").strip())
        with np.errstate(all="ignore"):
            fill = np.array(value).astype(page.dtype.newbyteorder("="))[()]
    except ValueError:
        return None
    return fill if page.dtype.kind == "f" or float(fill) == value else None


def _check_counts(page: Page, level: int, absent: Array) -> None:
    """Every byte count must be able to hold its segment, and must not be absurdly large."""
    codec, ratio = COMPRESSIONS[page.compression]
    _, down, across = page.grid
    full = page.segment_bytes(page.rows)
    # The last strip of a plane is shorter; tiles are always whole.
    last = full if page.tiled else page.segment_bytes(page.height - (down - 1) * page.rows)
    least = [np.uint64(max(1, size // ratio - (0 if ratio == 1 else 64))) for size in (last, full)]
    # Codecs grow data that does not compress, and JPEG brings tables along.
    most = page.directory.file.size if page.in_rows else 2 * full + (1 << 16)
    is_last = np.arange(len(page.counts), dtype=np.uint32) // across % down == down - 1
    wrong = (page.counts < np.where(is_last, *least)) | (page.counts > most)
    wrong &= ~absent
    at = int(wrong.argmax())
    low, size = (least[0], last) if is_last[at] else (least[1], full)
    needed = f"{low:,} to {most:,} bytes of {codec} for {size:,} bytes of pixels"
    found = f"{page.counts[at]:,} bytes"
    expect(not wrong.any(), page.name, f"{needed} in {page.segment} {at:,} of level {level}", found)
