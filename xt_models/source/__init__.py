"""Image files and arrays behind one reader: a size, a data type, and windows of pixels.

`open_image` is the only place in the project that opens image files. What it returns reads any
window of any pyramid level, from any number of threads at once, without touching the rest. A
window that starts and ends on multiples of `source.block` is the fast one: no tile is fetched or
decoded for a part of it only.

A file is not trusted. Headers are judged before anything is decoded: sizes, the number of tiles,
each offset and byte count, and how much the stored bytes can expand to. Whatever is wrong ends in
one `SourceError`; a damaged tile raises and never turns into zeros.

Imports go one way, from the last of these to the first:

    base.py            what a source is, its error, the limits
    files.py           bytes and uncompressed rows of a regular file
    arrays.py          arrays, memory maps, tensors, `.npy`, zarr
    tiff_directory.py  the tags of a TIFF
    tiff_page.py       what the tags say of an image, and whether the file can hold it
    metadata.py        georeference and microns per pixel
    tiff.py            tiles and strips to pixels
    pillow.py          PNG and JPEG
    libraries.py       what rasterio and openslide read
    open.py            which of these reads a file: `open_image`
"""

from .base import DamagedTileError, ImageSource, SourceError
from .open import open_image

__all__ = ["DamagedTileError", "ImageSource", "SourceError", "open_image"]
