"""Two records of the same benches: what changed by more than the spread of its measurement."""

from __future__ import annotations

from dataclasses import dataclass

from .records import Record, Row, Spread


@dataclass(frozen=True)
class Verdict:
    """old, new: rows of the same work. change: time of the new over the old, None without times."""

    old: Row
    new: Row
    change: float | None
    verdict: str


def compare_records(old: Record, new: Record) -> tuple[list[Verdict], list[str]]:
    """(a verdict for each row that both have, what only one of them has).

    Times differ where the ranges from the 20th to the 80th percentile, each widened by the drift of
    its run, do not touch: rounds of one bench lie within seconds and do not show how the machine
    changes over minutes. A peak of memory differs where it moved by more than a tenth and 1 MiB, an
    error by more than a tenth.
    """
    before = {row.key: row for row in old.rows}
    verdicts, alone = [], []
    for row in new.rows:
        other = before.pop(row.key, None)
        if other is None:
            alone.append(f"only in {new.path.name}: {_name(row)}")
            continue
        change = None
        if row.seconds and other.seconds:
            change = row.seconds.median / other.seconds.median
        verdicts.append(Verdict(other, row, change, _judge(other, row, old.drift, new.drift)))
    alone += [f"only in {old.path.name}: {_name(row)}" for row in before.values()]
    return verdicts, alone


def _name(row: Row) -> str:
    size = f"{row.axis} {row.size:g}" if row.axis else ""
    return ", ".join(part for part in (row.op, row.variant, size, row.form) if part)


def _range(seconds: Spread, drift: tuple[float, float]) -> tuple[float, float]:
    """Where a time lies, had the machine been at its median."""
    return seconds.p20 / drift[1], seconds.p80 / drift[0]


def _judge(
    old: Row, new: Row, old_drift: tuple[float, float], new_drift: tuple[float, float]
) -> str:
    if old.outcome != new.outcome:
        return f"{old.outcome} before, {new.outcome} now"
    words = []
    if old.seconds and new.seconds:
        before, after = _range(old.seconds, old_drift), _range(new.seconds, new_drift)
        if not (old.seconds.known and new.seconds.known):
            words.append("too few runs to tell a change of time from chance")
        elif after[1] < before[0]:
            words.append(f"{old.seconds.median / new.seconds.median:.2f} times as fast")
        elif after[0] > before[1]:
            words.append(f"{new.seconds.median / old.seconds.median:.2f} times as slow")
        else:
            words.append("same time within spread and drift")
    if old.memory and new.memory:
        moved = new.memory - old.memory
        if abs(moved) > max(old.memory / 10, 2**20):
            words.append(f"{'more' if moved > 0 else 'less'} memory ({moved / 2**20:+.1f} MiB)")
    if old.error and new.error and abs(new.error / old.error - 1) > 0.1:
        words.append(f"{'larger' if new.error > old.error else 'smaller'} error")
    return "; ".join(words) or new.outcome
