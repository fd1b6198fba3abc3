"""What a report is made of: rows, one form of one piece of work at one size, and their records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .fields import Field


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

    @classmethod
    def read(cls, item: Field) -> Spread:
        median, low, high = (item[key].positive() for key in ("median", "p20", "p80"))
        return cls(median, low, high, item["rounds"].whole(1))

    @property
    def known(self) -> bool:
        """Enough values to speak of a spread."""
        return self.rounds >= 3

    def over(self, factor: float) -> Spread:
        return Spread(self.median / factor, self.p20 / factor, self.p80 / factor, self.rounds)


@dataclass(frozen=True)
class Shape:
    """In what precision and batch a row was measured; None and "" where its record does not say."""

    device: str = ""
    dtype: str = ""
    batch: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Row:
    """op, variant: what is done. axis, size: what it grows with ("length", "regions", "side" in
    pixels, "chunks", "pixels"). form: by which code; `first` is the form that `ratio` refers to,
    this form's time over the first's, in turns. outcome: "measured", "out of memory" or "out of
    time". seconds of one call; memory in bytes above inputs or model; limit of it in bytes; error
    relative to the exact answer; per_s units a second; floor: seconds that a copy or a matrix
    product of the work of this form takes; num_bytes, flops: that work; yardstick: seconds that one
    and the same work took in the bench of the row. encoder, context, mode: of whole images; region:
    side of one, pixels; cold: timed by its first call.
    """

    op: str
    variant: str
    axis: str
    size: float
    form: str
    first: str
    source: str
    shape: Shape = Shape()
    outcome: str = "measured"
    seconds: Spread | None = None
    ratio: Spread | None = None
    memory: int | None = None
    limit: int | None = None
    error: float | None = None
    per_s: float | None = None
    unit: str = ""
    floor: float | None = None
    num_bytes: float | None = None
    flops: float | None = None
    yardstick: float | None = None
    encoder: str = ""
    context: str = ""
    mode: str = ""
    region: int | None = None
    cold: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for the same work by the same form in another record."""
        return (
            self.op, self.variant, self.axis, self.size, self.form, self.shape.device,
            self.shape.dtype,
        )  # fmt: skip

    @property
    def approximate(self) -> bool:
        """Its error is more than rounding in any dtype."""
        return self.error is not None and self.error >= 1e-2

    @property
    def over_floor(self) -> float | None:
        """Time over that of a copy or a matrix product of the same work."""
        return self.seconds.median / self.floor if self.seconds and self.floor else None


@dataclass(frozen=True)
class Score:
    """How well the models of one row of a small task did: percent of each seed, their mean with its
    95 % interval, and the highest that is possible without context, if that is proven. size: of the
    images, where it is another than in training.
    """

    task: str
    title: str
    size: str
    metric: str
    seeds: list[float]
    mean: float
    half_width: float
    ceiling: float | None
    source: str


@dataclass(frozen=True)
class Entry:
    """One line of a script's record: a value with its unit and, if known, its 20th and 80th
    percentile.
    """

    title: str
    form: str
    size: str
    value: float
    unit: str
    low: float | None
    high: float | None
    note: str
    source: str


@dataclass(frozen=True)
class Absent:
    """A form that could not be measured in one bench, and why."""

    form: str
    why: str
    op: str
    place: str


@dataclass(frozen=True)
class Record:
    """One file. machine: what it was measured on. command: what made it, "" if it does not say.
    made: when, in ISO 8601, "" if it does not say.
    """

    path: Path
    machine: dict[str, Any]
    command: str = ""
    made: str = ""
    rows: list[Row] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    @property
    def processor(self) -> str:
        """`2 cores of AMD EPYC`, or the GPU."""
        facts = self.machine
        return str(
            facts.get("gpu") or f"{facts.get('cores', '?')} cores of {facts.get('cpu', '?')}"
        )

    @property
    def where(self) -> str:
        """`2 cores of AMD EPYC, torch 2.15.0, commit 0123456 + changes`."""
        facts = self.machine
        parts = [self.processor]
        if facts.get("driver"):
            parts.append(f"driver {facts['driver']}")
        parts += [f"{name} {facts[name]}" for name in ("torch", "triton") if name in facts]
        commit = f"commit {str(facts['commit'])[:7]}" if "commit" in facts else "no commit recorded"
        return ", ".join([*parts, commit + (" + changes" if facts.get("dirty") else "")])

    @property
    def made_by(self) -> str:
        return f"`{self.command}`" if self.command else "command not recorded"


def keep_newest(records: Sequence[Record]) -> list[str]:
    """Takes each row out of `records` that a newer one of the same machine holds too, and says so.

    A record without a date counts as the oldest.
    """
    newest = {
        (record.processor, row.key): record
        for record in sorted(records, key=lambda r: r.made)
        for row in record.rows
    }
    told = []
    for record in records:
        replaced: dict[str, list[Row]] = {}
        for row in record.rows:
            newer = newest[record.processor, row.key]
            if newer is not record:
                replaced.setdefault(newer.path.name, []).append(row)
        for name, rows in replaced.items():
            works = ", ".join(
                sorted({f"{r.op} ({r.variant})" if r.variant else r.op for r in rows})
            )
            told.append(f"{record.path.name}: {works}: measured again in {name}")
            record.rows[:] = [row for row in record.rows if row not in rows]
    return told
