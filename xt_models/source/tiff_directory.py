"""Directories of TIFF and BigTIFF files: which tags there are, and their numbers, bounded.

They are walked here, because a reader that believes a header can be made to hang or to fill the
memory. Sources: TIFF 6.0 (Adobe, 1992), sections 2 and 8; the BigTIFF proposal of libtiff.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .base import MAX_PAGES, MAX_TAGS, Array, expect
from .files import File

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# fmt: off
# Field type -> numpy type without byte order; a rational is a pair.
_FIELD_TYPES = {
    1: "u1", 2: "S1", 3: "u2", 4: "u4", 5: "2u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "2i4",
    11: "f4", 12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8",
}
_TAGS = {
    254: "subfile", 255: "old_subfile", 256: "width", 257: "height", 258: "bits",
    259: "compression", 262: "photometric", 266: "fill_order", 270: "description",
    273: "strip_offsets", 274: "orientation", 277: "samples", 278: "strip_rows",
    279: "strip_counts", 282: "x_resolution", 283: "y_resolution", 284: "planar",
    296: "resolution_unit", 317: "predictor", 320: "palette", 322: "tile_width",
    323: "tile_height", 324: "tile_offsets", 325: "tile_counts", 330: "sub_ifds",
    338: "extra_samples", 339: "sample_format", 347: "jpeg_tables", 32997: "depth",
    33550: "geo_scale", 33922: "geo_tiepoint", 34264: "geo_matrix", 34735: "geo_keys",
    42113: "nodata",
}
# fmt: on


@dataclass
class Directory:
    """One TIFF directory (IFD): where its fields lie; values are fetched when asked for."""

    file: File
    order: Literal["<", ">"]
    big: bool
    offset: int
    fields: dict[str, tuple[int, int, int]]  # field type, number of values, byte offset
    following: int  # offset of the next directory, 0 at the end

    def count(self, tag: str) -> int:
        """The number of values that a tag claims, 0 without it."""
        return self.fields[tag][1] if tag in self.fields else 0

    def array(self, tag: str, limit: int) -> Array | None:
        """All values of a tag, or None without it; rationals as `[count, 2]`.

        Raises:
            SourceError: more than `limit` values, or values outside the file.
        """
        if tag not in self.fields:
            return None
        kind, count, where = self.fields[tag]
        name, at = self.file.name, f"{tag} of the page at byte {self.offset:,}"
        known = kind in _FIELD_TYPES and count <= limit
        expect(known, name, f"at most {limit:,} numbers in {at}", f"{count:,} of type {kind}")
        dtype = np.dtype(_FIELD_TYPES[kind]).newbyteorder(self.order)
        end = where + dtype.itemsize * count
        expect(end <= self.file.size, name, f"{at} inside the file", f"an end at {end:,}")
        return np.frombuffer(self.file.pread(where, end - where), dtype)

    def number(self, tag: str, default: int) -> int:
        """The integer of a tag; where there is one per band, all must be equal."""
        values = self.array(tag, 1 << 16)
        if values is None or not len(values):
            return default
        plain = values.dtype.kind in "iu" and values.ndim == 1 and (values == values[0]).all()
        expect(plain, self.file.name, f"one integer as {tag}", values[:8].tolist())
        return int(values[0])

    def text(self, tag: str) -> str:
        """The text of a tag up to its first zero byte, "" without it."""
        values = self.array(tag, 1 << 24)
        return "" if values is None else values.tobytes().split(b"\0")[0].decode("utf-8", "replace")


def walk_directories(file: File) -> Iterator[Directory]:
    """The directories of the main chain, first page first; loops and wild offsets raise."""
    head = file.pread(0, min(16, file.size))
    expect(head[:4] in TIFF_MAGIC, file.name, "a TIFF file", f"a start of {head[:4]!r}")
    order: Literal["<", ">"] = "<" if head[:1] == b"I" else ">"
    big = b"+" in head[2:4]
    layout = struct.Struct(order + ("4xHHQ" if big else "4xI"))  # BigTIFF: word size, 0, offset
    numbers = layout.unpack(head[: layout.size]) if len(head) >= layout.size else ()
    whole = numbers and (not big or numbers[:2] == (8, 0))
    expect(whole, file.name, "a whole TIFF header", repr(head))
    offset = numbers[-1]
    expect(offset, file.name, "at least one page", "a TIFF without pages")
    seen: set[int] = set()
    while offset:
        found = f"{'a loop' if offset in seen else 'one more'} at byte {offset:,}"
        ends = offset not in seen and len(seen) < MAX_PAGES
        expect(ends, file.name, f"a chain of at most {MAX_PAGES:,} pages", found)
        seen.add(offset)
        directory = read_directory(file, order, big, offset)
        yield directory
        offset = directory.following


def read_directory(file: File, order: Literal["<", ">"], big: bool, offset: int) -> Directory:
    """The directory at a byte offset."""
    count_size, word = (8, "u8") if big else (2, "u4")
    layout = [("tag", "u2"), ("kind", "u2"), ("count", word), ("value", word)]
    entry = np.dtype(layout).newbyteorder(order)
    endian: Literal["little", "big"] = "little" if order == "<" else "big"
    word_size, start = entry["value"].itemsize, offset + count_size
    what = f"a page directory of at most {MAX_TAGS} tags at byte {offset:,}"
    cut = f"the end of the file at {file.size:,}"
    expect(start <= file.size, file.name, what, cut)
    number = int.from_bytes(file.pread(offset, count_size), endian)
    expect(number <= MAX_TAGS, file.name, what, f"{number:,} tags")
    size = number * entry.itemsize + word_size
    expect(start + size <= file.size, file.name, what, cut)
    data = file.pread(start, size)
    entries = np.frombuffer(data, entry, number)
    fields: dict[str, tuple[int, int, int]] = {}
    for at in np.flatnonzero(np.isin(entries["tag"], list(_TAGS))):
        tag, kind, count, value = (int(item) for item in entries[at])
        # Values that fit into the last word of an entry lie there, others where it points.
        inline = start + int(at + 1) * entry.itemsize - word_size
        fits = count * np.dtype(_FIELD_TYPES.get(kind, "u1")).itemsize <= word_size
        fields.setdefault(_TAGS[tag], (kind, count, inline if fits else value))
    following = int.from_bytes(data[-word_size:], endian)
    return Directory(file, order, big, offset, fields, following)
