"""JSON of the benches -> rows: one form of one piece of work at one size, with where it stands."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1  # of bench/measure.py
_AXES = ("length", "regions", "side", "chunks")
_SCALING = "streaming, peak resident memory above the loaded model"
_GRADIENT = "forward and backward over chunks, peak resident memory above the model"
ERRORS = "hyper_attention, error at 512 keys a query"
_STEP = "forward, loss and backward of one image; peak resident memory of it"


class RecordError(ValueError):
    """A file that the report cannot read; the message is one sentence that names it."""


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of `rounds` values."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low = high = values[0]
        if len(values) > 1:
            low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), low, high, len(values))

    @property
    def known(self) -> bool:
        """Enough values to speak of a spread."""
        return self.rounds >= 3


@dataclass(frozen=True)
class Row:
    """op, variant: what is done. axis, size: what it grows with ("length", "regions", "side" in
    pixels, "chunks", "pixels"). form: by which code; `first` is the form that `ratio` refers to,
    this form's time over the first's, in turns. outcome: "measured", "out of memory" or "out of
    time". seconds of one call; memory in bytes above inputs or model; error relative to the exact
    answer; per_s units a second; over_floor: time over that of a copy or a matrix product of the
    same size, for exact forms.
    """

    op: str
    variant: str
    axis: str
    size: float
    form: str
    first: str
    source: str
    device: str = "cpu"
    dtype: str = "float32"
    outcome: str = "measured"
    seconds: Spread | None = None
    ratio: Spread | None = None
    memory: int | None = None
    limit: int | None = None
    error: float | None = None
    per_s: float | None = None
    unit: str = ""
    over_floor: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for the same work by the same form in another record."""
        return (
            self.op, self.variant, self.axis, self.size, self.form, self.device, self.dtype,
        )  # fmt: skip


@dataclass(frozen=True)
class Score:
    """How well the models of one row of a small task did: percent of each seed, their mean with its
    95 % interval, and the highest that is possible without context, if that is proven.
    """

    row: str
    seeds: list[float]
    mean: float
    half_width: float
    ceiling: float | None
    source: str


@dataclass(frozen=True)
class Record:
    """One file. machine: what it was measured on. absent: form -> why it could not be measured.

    scores: of the small task that the record is of. yardstick: seconds that one and the same work
    took in each bench of the run.
    """

    path: Path
    machine: dict[str, Any]
    command: str
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    yardstick: list[float] = field(default_factory=list)

    @property
    def drift(self) -> tuple[float, float]:
        """How fast and how slow the machine was during the run: times over the median of all."""
        if not self.yardstick:
            return 1.0, 1.0
        median = statistics.median(self.yardstick)
        return min(self.yardstick) / median, max(self.yardstick) / median

    @property
    def where(self) -> str:
        """`2 cores of AMD EPYC, torch 2.15.0, commit 0123456, drift 0.97 to 1.05`."""
        facts = self.machine
        processor = (
            facts.get("gpu") or f"{facts.get('cores', '?')} cores of {facts.get('cpu', '?')}"
        )
        parts = [str(processor)]
        if facts.get("driver"):
            parts.append(f"driver {facts['driver']}")
        parts += [f"{name} {facts[name]}" for name in ("torch", "triton") if name in facts]
        parts.append(f"commit {str(facts.get('commit', 'unknown'))[:7]}")
        if self.yardstick:
            low, high = self.drift
            parts.append(f"drift {low:.2f} to {high:.2f}")
        return ", ".join(parts)


def read_folder(folder: Path) -> tuple[list[Record], list[str]]:
    """(records of all JSON files in `folder`, why others are left out).

    Raises RecordError if there is no folder, no JSON in it, or none that can be read.
    """
    if not folder.is_dir():
        raise RecordError(f"report: {folder} must be a folder with results, and is not there.")
    records, refused = [], []
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise RecordError(
            f"report: {folder} holds no JSON; make one with "
            f"`pytest bench/ --benchmark-only --benchmark-json={folder}/bench.json`."
        )
    for path in paths:
        try:
            records.append(read_record(path))
        except RecordError as error:
            refused.append(str(error))
    if not records:
        raise RecordError(f"report: {folder} holds nothing to show: {' '.join(refused)}")
    return records, refused


def read_record(path: Path) -> Record:
    """The record in one JSON file. Raises RecordError if it is none, or of another version."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise RecordError(f"report: {path} is not there.") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"report: {path.name} is no JSON ({error}).") from None
    try:
        if "benchmarks" in data:
            return _from_pytest(path, data)
        if "steps" in data and "environment" in data:
            return _from_gpu_run(path, data)
        if data.get("what") == _SCALING:
            return _from_scaling(path, data)
        if data.get("what") == _GRADIENT:
            return _from_gradient(path, data)
        if data.get("what") == _STEP:
            return _from_step(path, data)
        if "seeds" in data and "shape" in data:
            return _from_errors(path, data)
        if "task" in data:
            return _from_task(path, data)
    except (AttributeError, KeyError, TypeError) as error:
        message = f"{type(error).__name__}: {error}"
        raise RecordError(f"report: {path.name} is incomplete ({message}).") from None
    raise RecordError(f"report: {path.name} is no record of a bench.")


def _from_pytest(path: Path, data: dict[str, Any]) -> Record:
    infos = {bench["fullname"]: bench["extra_info"] for bench in data["benchmarks"]}
    command = f"pytest bench/ --benchmark-only --benchmark-json={path.name}"
    return _from_infos(path, data["machine_info"], command, infos)


def _from_gpu_run(path: Path, data: dict[str, Any]) -> Record:
    infos = {
        name: item["numbers"]["extra"]
        for step, items in data["steps"].items()
        if step.startswith("benches")
        for name, item in items.items()
        if item.get("numbers")
    }
    return _from_infos(path, data["environment"], "python scripts/gpu_run.py", infos)


def _from_infos(path: Path, machine: dict[str, Any], command: str, infos: dict[str, Any]) -> Record:
    record = Record(path, machine, command)
    for name, info in infos.items():
        if info.get("schema") != SCHEMA:
            raise RecordError(
                f"report: {path.name} must be of version {SCHEMA} of the benches, got "
                f"{info.get('schema', 'none')}: run them again with `{command}`."
            )
        record.absent.update(info.get("absent", {}))
        if "yardstick" in info:
            record.yardstick.append(info["yardstick"])
        record.rows.extend(_rows(f"{path.name}, {name}", info))
    return record


def _rows(source: str, info: dict[str, Any]) -> Iterator[Row]:
    """Rows of one bench: an image in a process of its own, or forms that took turns."""
    common = {"source": source, "device": info["device"], "dtype": info["dtype"]}
    if "form" in info:
        measured = info["outcome"] == "measured"
        yield Row(
            "image", f"{info['encoder']}, {info['mode']}", "side", info["side"], info["form"],
            "", outcome=info["outcome"], memory=info.get("memory"), limit=info.get("limit"),
            seconds=Spread(**info["seconds"]) if measured else None,
            per_s=info.get("regions_per_s"), unit="regions", **common,
        )  # fmt: skip
        return
    axis = next((axis for axis in _AXES if axis in info), "")
    units = info.get("units_per_s", {})
    median = info["seconds"][info["first"]]["median"]
    for form, seconds in info["seconds"].items():
        spread = Spread(**seconds)
        first = form == info["first"]
        error = info.get("error", {}).get(form)
        floor = "floor" in info and (error or 0) < 1e-2
        yield Row(
            info["op"], info["variant"], axis, info.get(axis, 0), form, info["first"],
            seconds=spread, memory=info.get("memory", {}).get(form),
            ratio=None if first else Spread(**info["ratio"][form]),
            error=error, unit=units.get("what", ""),
            per_s=units["value"] * median / spread.median if units else None,
            over_floor=info["over_floor"] * spread.median / median if floor else None,
            **common,
        )  # fmt: skip


def _from_scaling(path: Path, data: dict[str, Any]) -> Record:
    record = Record(path, data, data["command"])
    variant = f"{data['encoder']}, {data['context']}, {data['compression']}"
    for row in data["rows"]:
        seconds = Spread(row["seconds"], row["seconds"], row["seconds"], 1)
        source = f"{path.name}, {row['height']} x {row['width']}"
        shown = Row(
            "streaming memory", variant, "pixels", row["height"] * row["width"], "stream", "",
            source, seconds=seconds, memory=row["above_model"], per_s=row["regions_per_s"],
            unit="regions",
        )  # fmt: skip
        record.rows.append(shown)
    return record


def _from_gradient(path: Path, data: dict[str, Any]) -> Record:
    record = Record(path, data, data["command"])
    variant = f"{data['tokens']} tokens, width {data['dim']}, depth {data['depth']}"
    for row in data["rows"]:
        source = f"{path.name}, {row['gradient']} {row['chunks']}"
        shown = Row(
            "gradient memory", variant, "chunks", row["chunks"], row["gradient"], "", source,
            memory=row["rest"],
        )  # fmt: skip
        record.rows.append(shown)
    return record


def _from_step(path: Path, data: dict[str, Any]) -> Record:
    record = Record(path, data, data["command"])
    work = f"{data['encoder']}, regions of {data['region']} px"
    first, peaks = "without context", data["peaks"]
    forms = {"none": first, "context": "xl", "kept": "xl, nothing recomputed"}
    for key, form in forms.items():
        values = data.get("processor_seconds", {}).get(key)
        if not values and key not in peaks:
            continue
        shown = Row(
            "training step", work, "side", data["size"], form, first, f"{path.name}, {form}",
            seconds=Spread.of(values) if values else None, memory=peaks.get(key),
            ratio=Spread.of(data["ratios"]) if key == "context" and values else None,
        )  # fmt: skip
        record.rows.append(shown)
    return record


def _from_errors(path: Path, data: dict[str, Any]) -> Record:
    record = Record(path, data["machine"], "python bench/hyper_error.py")
    for row in data["rows"]:
        ratio = None if row["form"] == "published" else Spread.of([row["time_ratio"]])
        source = f"{path.name}, {row['input']}"
        shown = Row(
            ERRORS, row["input"], "length", data["shape"][2], row["form"], "published", source,
            ratio=ratio, error=row["error"],
        )  # fmt: skip
        record.rows.append(shown)
    return record


def _from_task(path: Path, data: dict[str, Any]) -> Record:
    command = f"xt train {data['task']} -o OUT"
    record = Record(path, data["machine"] | data["versions"], command)
    for name, row in data["rows"].items():
        seeds = next(v for k, v in row.items() if isinstance(v, list) and k != "seconds")
        shown = Score(
            f"{data['task']}, {row['title']}", seeds, row["mean"], row["half_width_95"],
            row["ceiling"], f"{path.name}, {name}",
        )  # fmt: skip
        record.scores.append(shown)
    return record
