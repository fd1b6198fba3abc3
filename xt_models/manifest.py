"""Many images into one folder: a manifest says what is done, what failed and why.

    OUT/manifest.jsonl    first line: model and settings; then one line an image, as it ends
    OUT/<name>/           what a run writes for one image, there when it is complete

A line follows the sync of the output that it names, and ends in a checksum of itself. The last line
of an image counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .journal import RECORD, changes, file_facts, locked, read_record, sync_folder

MANIFEST = "manifest.jsonl"
FAILURES = (ValueError, OSError, MemoryError, RuntimeError)
"""What an image may raise that the others need not suffer for."""
_LISTS = (".txt", ".lst")
_SUFFIXES = set(
    ".tif .tiff .btf .tf8 .png .jpg .jpeg .npy .zarr .svs .ndpi .mrxs .vms .vmu .scn .bif .svslide "
    ".jp2 .j2k .img .ntf .nitf .ecw .sid".split()
)


class Image(NamedTuple):
    """name: of its folder below OUT. path: where the image is."""

    name: str
    path: Path


def is_many(path: Path) -> bool:
    """Whether a path is a folder of images or a list of them, not one image."""
    if path.is_dir():
        names = ("zarr.json", ".zarray", ".zgroup")
        return not any((path / name).is_file() for name in names)
    return path.suffix.lower() in _LISTS


def list_images(where: Path) -> list[Image]:
    """The images of a folder and the folders in it, by suffix, or of a text file, one path a line
    (relative ones start at the file). Raises ValueError if there is none, or one twice."""
    if where.is_dir():
        paths = sorted(_walk(where))
        root = where
    else:
        lines = [line.strip() for line in where.read_text().splitlines()]
        paths = [where.parent / line for line in lines if line and not line.startswith("#")]
        parents = {os.path.abspath(path.parent) for path in paths}
        root = Path(os.path.commonpath(parents)) if parents else where.parent
    if not paths:
        raise ValueError(f"{where}: expected at least one image, found none.")
    images = [Image(os.path.relpath(os.path.abspath(p), os.path.abspath(root)), p) for p in paths]
    twice = len(images) - len({image.name for image in images})
    if twice:
        raise ValueError(f"{where}: expected each image once, found {twice} of them again.")
    return images


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in _SUFFIXES:
            yield path
        elif path.is_dir() and not (path / MANIFEST).exists():
            yield from _walk(path)


class Manifest:
    """What was done in an output folder so far; to write to it, `open_manifest`.

    damage: what is wrong with the file, one sentence each. cut: bytes of a last line that a kill
    cut off.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / MANIFEST
        self.identity: dict[str, Any] | None = None
        self.entries: dict[str, dict[str, Any]] = {}
        self.damage: list[str] = []
        self.cut = 0
        raw = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(raw.split(b"\n")[:-1], 1):
            entry = _entry(line)
            if entry is None:
                self.damage.append(f"{MANIFEST}: line {number} was changed.")
            elif "identity" in entry:
                self.identity = entry["identity"]
            else:
                self.entries[entry["image"]] = entry
        if raw and not raw.endswith(b"\n"):
            self.cut = len(raw) - raw.rfind(b"\n") - 1
            self.damage.append(f"{MANIFEST}: its last line is cut off.")

    def begin(self, identity: dict[str, Any]) -> None:
        """Notes model and settings. Raises ValueError if others were noted before."""
        identity = json.loads(json.dumps(identity))
        if self.identity is None:
            self._append({"identity": identity})
            self.identity = identity
            return
        found = list(changes(self.identity, identity))
        if found:
            raise ValueError(
                f"{self.path} was begun differently: {'; '.join(found[:4])}. Repeat the "
                f"command as it was, or name another output."
            )

    def is_done(self, image: Image) -> bool:
        """Whether its output is there; one that a kill kept from being noted is noted now.

        Raises ValueError if the image is another one by now, or the output is damaged.
        """
        folder = self.out / image.name
        if not (folder / RECORD).is_file():
            return False
        record = read_record(folder)
        if record is None:
            raise ValueError(f"{folder / RECORD} was changed: remove {folder} to embed it again.")
        if image.path.exists():
            now = file_facts(image.path)
            known = {name: record["identity"]["image"].get(name) for name in now}
            found = list(changes(known, now, "image"))
            if found:
                raise ValueError(
                    f"{image.path} is not what {folder} was made of: {'; '.join(found)}. Remove "
                    f"{folder} to embed it again."
                )
        if self.entries.get(image.name, {}).get("status") != "done":
            self.done(image, record["stats"]["seconds"])
        return True

    def done(self, image: Image, seconds: float) -> None:
        """Notes an image whose output is complete."""
        record = (self.out / image.name / RECORD).read_bytes()
        self._note(image, "done", seconds, sha256=hashlib.sha256(record).hexdigest())

    def failed(self, image: Image, seconds: float, reason: str) -> None:
        """Notes an image that could not be embedded."""
        self._note(image, "failed", seconds, reason=reason)

    def _note(self, image: Image, status: str, seconds: float, **more: str) -> None:
        entry: dict[str, Any] = {"image": image.name, "path": str(image.path), "status": status}
        entry |= {"seconds": round(seconds, 3), **more}
        self._append(entry)
        self.entries[image.name] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(_line(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _line(entry: dict[str, Any]) -> bytes:
    check = hashlib.sha256(json.dumps(entry).encode()).hexdigest()
    return json.dumps(entry | {"line_sha256": check}).encode()


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line says, None if a byte of it was changed."""
    try:
        entry: dict[str, Any] = json.loads(line)
        del entry["line_sha256"]
        return entry if _line(entry) == line else None
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def open_manifest(out: Path) -> Iterator[Manifest]:
    """The manifest of a folder, made if it is not there, held against other processes.

    Raises FileExistsError for a folder of other things, FileNotFoundError without a parent,
    BlockingIOError if another process has it, ValueError if a line was changed.
    """
    if out.exists() and not (out / MANIFEST).exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"Output {out} exists already: name another, or remove it.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"Output folder {out.absolute().parent} does not exist: make it first."
        )
    out.mkdir(exist_ok=True)
    with locked(out):
        manifest = Manifest(out)
        changed = manifest.damage[: -1 if manifest.cut else None]
        if changed:
            raise ValueError(f"{out}/{changed[0]} Name another output.")
        if manifest.cut:  # its image is noted again
            os.truncate(manifest.path, manifest.path.stat().st_size - manifest.cut)
        try:
            yield manifest
            sync_folder(out)
        finally:
            with suppress(OSError):  # it is not empty
                out.rmdir()


def embed_many(
    images: list[Image],
    manifest: Manifest,
    embed: Callable[[Image, Path], None],
    tell: Callable[[Image, str], None],
) -> dict[str, int]:
    """Embeds what is not done yet; a failure is noted and the next image follows.

    embed: writes the output of an image to a folder. tell: called with how each one ended.
    Returns the number of images done now, done before, and failed.
    """
    counts = {"done": 0, "before": 0, "failed": 0}
    for image in images:
        start = time.perf_counter()
        folder = manifest.out / image.name
        try:
            if manifest.is_done(image):
                counts["before"] += 1
                continue
            folder.parent.mkdir(parents=True, exist_ok=True)
            embed(image, folder)
        except FAILURES as error:
            if _is_fatal(error):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            manifest.failed(image, time.perf_counter() - start, text)
            counts["failed"] += 1
            tell(image, f"failed: {text}")
        else:
            seconds = time.perf_counter() - start
            manifest.done(image, seconds)
            counts["done"] += 1
            tell(image, f"{seconds:.1f} s")
    return counts


def _is_fatal(error: BaseException) -> bool:
    """Whether the next image would fail in the same way: the disk is full, or not ours."""
    import errno

    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
    return isinstance(error, OSError) and error.errno in codes
