"""The folder of a run while it is written: one writer, a journal, resume; and `verify` afterwards.

    OUT.part/            locked by the run that writes it; becomes OUT at the end
      journal/identity.json     image, model, settings and machine: what the bytes depend on
      journal/log               one line a checkpoint: which files are on disk, with checksums
      journal/state-<n>.pt      where the walk stood: memory, sums, unfinished blocks
      journal/thumbnail         pixels of the preview
      journal/maps              maps of heads, until they are whole
      run.json                  written last: checksums of all files of OUT, and of itself

A line of the log follows the sync of what it names, so whatever kills a run, the last whole line is
true. Going on from it, files that it does not know are removed, and the walk starts behind it with
the memory that was saved. Chunks after it are computed again, and give the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import XT
    from .source import ImageSource

RECORD = "run.json"
_EDGE_BYTES = 64 << 10
_ROWS = 1024


class Run:
    """A run that is being written; `open_run` makes it.

    part: the folder to fill. record: what an earlier process wrote at the very end, if only the
    renaming is missing. state: what the last checkpoint saved, or None.
    """

    def __init__(self, part: Path, identity: dict[str, Any]) -> None:
        self.part, self._identity = part, identity
        self.journal = part / "journal"
        self._log = self.journal / "log"
        self._files: dict[str, list[Any]] = {}
        self._count = 0
        self.state: dict[str, Any] | None = None
        self.record = read_record(part) if (part / RECORD).exists() else None
        if self.record is not None:
            self._check_same(self.record["identity"])
            return
        known = self.journal / "identity.json"
        if known.exists():
            self._check_same(json.loads(known.read_text()))
            self._resume()
            return
        strange = [path.name for path in part.iterdir() if path != self.journal]
        if strange:
            raise FileExistsError(
                f"{part} holds {strange[0]} and no journal of a run: remove it, or name another "
                f"output."
            )

    def begin(self) -> None:
        """Notes the identity, if no process did before."""
        known = self.journal / "identity.json"
        if self.record is None and not known.exists():
            self._clear()
            self.journal.mkdir(exist_ok=True)
            write_synced(known, json.dumps(self._identity, indent=1).encode())

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return self._count > 0 or self.record is not None

    def checkpoint(self, state: dict[str, Any], files: Iterable[Path]) -> None:
        """Makes `files` (new, whole, in `part`) and `state` what a resumed run starts from.

        state: plain values, tensors and memory, as `torch.load(weights_only=True)` takes them.
        """
        import torch

        new = self._sync(files)
        buffer = BytesIO()
        torch.save(state, buffer)
        name = f"state-{self._count + 1}.pt"
        write_synced(self.journal / name, buffer.getbuffer())
        line = json.dumps({"state": [name, *_facts(buffer.getbuffer())], "files": new})
        with self._log.open("ab") as log:
            log.write(f"{hashlib.sha256(line.encode()).hexdigest()} {line}\n".encode())
            log.flush()
            os.fsync(log.fileno())
        if not self._count:
            sync_folder(self.journal)
        (self.journal / f"state-{self._count}.pt").unlink(missing_ok=True)
        self._files |= new
        self._count += 1

    def finish(self, record: dict[str, Any], files: Iterable[Path]) -> dict[str, Any]:
        """Writes `run.json` over all files but the journal's own; from then on only the renaming is
        left to do."""
        known = sorted((self._files | self._sync(files)).items())
        kept = {name: facts for name, facts in known if Path(name).parts[0] != self.journal.name}
        record = record | {"identity": self._identity, "files": kept}
        write_synced(self.part / RECORD, _record_bytes(record))
        return record

    def discard(self) -> None:
        """Removes all. The journal goes last: cut short, the same call knows whose the rest is."""
        self._log.unlink(missing_ok=True)
        self._files, self._count = {}, 0
        self._clear()
        shutil.rmtree(self.part)

    def _sync(self, files: Iterable[Path]) -> dict[str, list[Any]]:
        """Sizes and checksums of files, which are on disk then, their folders included."""
        facts, folders = {}, set()
        for path in files:
            name = path.relative_to(self.part)
            facts[str(name)] = _synced_facts(path)
            folders |= {self.part / folder for folder in name.parents}
        for folder in folders:
            sync_folder(folder)
        return facts

    def _check_same(self, known: dict[str, Any]) -> None:
        found = list(changes(known, json.loads(json.dumps(self._identity))))
        if found:
            raise ValueError(
                f"{self.part} was begun differently: {'; '.join(found[:4])}. Repeat the command "
                f"as it was, or remove {self.part} to start again."
            )

    def _resume(self) -> None:
        """Goes back to the last whole line of the log, on disk as well."""
        import torch

        lines = self._log.read_bytes().splitlines(keepends=True) if self._log.exists() else []
        whole = 0
        entry: dict[str, Any] | None = None
        for raw in lines:
            digest, _, line = raw.rstrip(b"\n").partition(b" ")
            if not raw.endswith(b"\n") or hashlib.sha256(line).hexdigest().encode() != digest:
                break
            entry = json.loads(line)
            assert entry is not None
            self._files |= entry["files"]
            self._count += 1
            whole += len(raw)
        if self._log.exists():
            os.truncate(self._log, whole)
        if entry is not None:
            name, *facts = entry["state"]
            data = (self.journal / name).read_bytes()
            if facts != _facts(data):
                raise ValueError(_damaged(self.part, f"journal/{name}"))
            self.state = torch.load(BytesIO(data), weights_only=True, map_location="cpu")
        for name, facts in self._files.items():
            if _differs(self.part / name, facts):
                raise ValueError(_damaged(self.part, name))
        self._clear()

    def _clear(self) -> None:
        """Removes what the journal does not know."""
        keep = {self.part / name for name in self._files}
        keep |= {
            self.journal / name for name in ("identity.json", "log", f"state-{self._count}.pt")
        }
        if self._count:
            keep.add(self.journal / "thumbnail")
        for path in sorted(self.part.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if path != self.journal and not any(path.iterdir()):
                    path.rmdir()
            elif path not in keep:
                path.unlink()


def settings_of(out: str | Path) -> dict[str, Any] | None:
    """The settings of the run that stopped on its way to `out`, None if there is none."""
    try:
        identity = json.loads((Path(f"{out}.part") / "journal" / "identity.json").read_bytes())
    except (OSError, ValueError):
        return None
    settings: dict[str, Any] = identity["settings"]
    return settings


def part_of(out: str | Path) -> Path:
    """The folder that holds a run until it is complete, beside `out`. Raises FileExistsError if
    `out` exists, FileNotFoundError without a parent folder, PermissionError without the right."""
    final = Path(out)
    if final.exists() or final.is_symlink():
        raise FileExistsError(f"Output {final} exists already: name another, or remove it.")
    parent = final.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"Output folder {parent} does not exist: make it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"Output folder {parent} cannot be written to.")
    return final.with_name(final.name + ".part")


@contextmanager
def open_run(out: str | Path, identity: dict[str, Any]) -> Iterator[Run]:
    """A run that goes on where an earlier one stopped, and becomes `out` at the end.

    identity: what the bytes depend on, JSON-able. A failure before the first checkpoint leaves
    nothing; after it `<out>.part` stays, for the same call to go on.

    Raises as `claimed`; ValueError if it was begun with another identity, which the message tells,
    or is damaged.
    """
    final = Path(out)
    with claimed(final) as part:
        run = Run(part, identity)
        try:
            run.begin()
            yield run
            if run.journal.exists():
                shutil.rmtree(run.journal)
            os.rename(part, final)
            sync_folder(final.absolute().parent)
        except BaseException:
            if not run.has_checkpoint:
                with suppress(OSError):
                    run.discard()
            raise


_CLAIMED: ContextVar[Path | None] = ContextVar("claimed", default=None)


@contextmanager
def claimed(out: str | Path) -> Iterator[Path]:
    """`<out>.part`, made where it is not there, held against other processes, and removed if it is
    empty in the end. A claim inside a claim of the same folder is that claim.

    Raises as `part_of`, and BlockingIOError if another process has it.
    """
    part = part_of(out)
    if _CLAIMED.get() == part.absolute():
        yield part
        return
    part.mkdir(exist_ok=True)
    with locked(part):
        token = _CLAIMED.set(part.absolute())
        try:
            yield part
        finally:
            _CLAIMED.reset(token)
            with suppress(OSError):  # it is not empty, or has its name
                part.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder against other processes. Raises BlockingIOError if one of them has it; the
    lock goes with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another run may have finished and renamed it between the two calls.
            free = os.path.samestat(os.fstat(handle), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            free = False
        if not free:
            raise BlockingIOError(f"{folder}: another run is writing to it.")
        yield
    finally:
        os.close(handle)


def verify(out: str | Path) -> list[str]:
    """What is wrong with a finished output folder, one sentence each; nothing if all is well.

    Every byte counts: of each file, and of `run.json` itself. Of the folder of many images, those
    of its manifest, and of each image that it calls done.
    """
    from .manifest import MANIFEST, Manifest

    folder = Path(out)
    if (folder / MANIFEST).is_file():
        manifest = Manifest(folder)
        return manifest.damage + [
            f"{name}: {line}"
            for name, entry in manifest.entries.items()
            if entry["status"] == "done"
            for line in _verify_image(folder / name, entry["sha256"])
        ]
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"{folder} holds no {RECORD}: it is not the output of a run.")
    record = read_record(folder)
    if record is None:
        return [f"{RECORD} was changed."]
    wrong = []
    for name, facts in record["files"].items():
        what = _differs(folder / name, facts)
        if what:
            wrong.append(f"{name} {what}.")
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
    wrong += [
        f"{name} does not belong to it." for name in sorted(found - {*record["files"], RECORD})
    ]
    return wrong


def _verify_image(folder: Path, sha256: str) -> list[str]:
    if not (folder / RECORD).is_file():
        return [f"{RECORD} is missing."]
    if hashlib.sha256((folder / RECORD).read_bytes()).hexdigest() != sha256:
        return [f"{RECORD} was changed."]
    return verify(folder)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `run.json` holds, or None if a byte of it was changed."""
    data = (folder / RECORD).read_bytes()
    try:
        record: dict[str, Any] = json.loads(data)["run"]
        return record if _record_bytes(record) == data else None
    except (ValueError, KeyError, TypeError):
        return None


def write_record(folder: Path, record: dict[str, Any], but: str = "") -> None:
    """Writes `run.json` over all files of a folder but one; `verify` then knows them."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (RECORD, but))
    files = {str(path.relative_to(folder)): _synced_facts(path) for path in paths}
    write_synced(folder / RECORD, _record_bytes(record | {"files": files}))


def identity_of(model: XT, source: ImageSource, settings: dict[str, Any]) -> dict[str, Any]:
    """What the bytes of a run depend on: image, weights, settings, machine.

    Of a file, its size, time of change, first and last 64 KiB; of an array, every pixel.
    """
    return {"image": _image_facts(source)} | model_identity(model, settings)


def model_identity(model: XT, settings: dict[str, Any]) -> dict[str, Any]:
    """That part of `identity_of` which many images share."""
    import torch

    import xt_kernels

    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().flatten()  # of no dimension: the counters of batch norm
        weights.update(flat.view(torch.uint8).numpy().data)
    device = next(model.parameters()).device
    machine: dict[str, Any] = {"device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
    else:
        machine["threads"] = torch.get_num_threads()
    return {
        "model": {"weights": weights.hexdigest(), **asdict(model.config)},
        "settings": settings,
        "machine": machine | {"xt_kernels": xt_kernels.__version__},
    }


def _image_facts(source: ImageSource) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": source.name,
        "size": [source.height, source.width],
        "bands": source.bands,
        "dtype": str(source.dtype),
    }
    path = Path(source.name)
    if path.exists():
        return facts | file_facts(path)
    digest = hashlib.sha256()
    for top in range(0, source.height, _ROWS):
        rows = source.read(top, 0, min(_ROWS, source.height - top), source.width)
        digest.update(rows.tobytes())
    return facts | {"sha256": digest.hexdigest()}


def file_facts(path: Path) -> dict[str, Any]:
    """What an image file, or a folder of chunks, is known by: see `identity_of`."""
    facts: dict[str, Any] = {}
    digest = hashlib.sha256()
    if path.is_file():
        status = path.stat()
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(status.st_size - _EDGE_BYTES, 0))
            digest.update(file.read())
        facts |= {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    else:
        for inner in sorted(path.rglob("*")):
            status = inner.stat()
            line = f"{inner.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n"
            digest.update(line.encode() if inner.is_file() else b"")
    return facts | {"sha256": digest.hexdigest()}


def changes(was: Any, now: Any, place: str = "") -> Iterator[str]:
    """One phrase for each value that differs."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from changes(was.get(key), now.get(key), f"{place} {key}".strip())
    elif was != now and (was == was or now == now):  # NaN is NaN
        yield f"{place} was {was} and is {now}"


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Writes a file that is whole or absent, also after a power cut."""
    part = path.with_name(path.name + ".tmp")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder outlast a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Makes the bytes of a file outlast a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _synced_facts(path: Path) -> list[Any]:
    """Size and checksum of a file, whose bytes are on disk then."""
    sync_file(path)
    return _facts(path.read_bytes())


def _facts(data: bytes | memoryview) -> list[Any]:
    return [len(data), hashlib.sha256(data).hexdigest()]


def _differs(path: Path, facts: list[Any]) -> str:
    """What is wrong with a file, or nothing."""
    if not path.is_file():
        return "is missing"
    return "" if _facts(path.read_bytes()) == facts else "was changed"


def _damaged(part: Path, name: str) -> str:
    return f"{part}/{name} is missing or was changed: remove {part} to start again."


def _record_bytes(record: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(record, indent=1).encode()).hexdigest()
    return (json.dumps({"run": record, "sha256": digest}, indent=1) + "\n").encode()
