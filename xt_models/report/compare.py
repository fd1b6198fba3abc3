"""Two records of the same benches: what changed by more than the spread of its measurement."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .records import Record, Row, Spread

Pace = tuple[float, float, float]
OURS = "ours", "xt "


@dataclass(frozen=True)
class Verdict:
    """old, new: rows of the same work. change: time of the new over the old, had the machine been
    as fast, None without times.
    """

    old: Row
    new: Row
    change: float | None
    verdict: str


def compare_records(old: Record, new: Record) -> tuple[list[Verdict], list[str]]:
    """(a verdict for each row that both have, what only one of them has).

    The machine's pace is the time of the yardstick in the new bench over that in the same bench of
    the old record; a bench without a yardstick takes the median of the others, uncertain by their
    range. On the same machine not all work slows down as the yardstick does: any pace between its
    and 1 may be right, and so may those at which code that is not ours and did not change, of the
    same versions, seems to have changed, but for a tenth at either end. Times differ where the
    ranges from the 20th to the 80th percentile touch at no such pace. A peak of memory differs
    where it moved by more than a tenth and 1 MiB, an error by more than a tenth.
    """
    before = {row.key: row for row in old.rows}
    pairs = [(before[row.key], row) for row in new.rows if row.key in before]
    paces = [b.yardstick / a.yardstick for a, b in pairs if a.yardstick and b.yardstick] or [1.0]
    others = min(paces), statistics.median(paces), max(paces)
    drift = _drift(old, new, pairs)
    verdicts = []
    for a, b in pairs:
        pace = others
        if a.yardstick and b.yardstick:
            pace = (b.yardstick / a.yardstick,) * 3
        pace = min(pace[0], pace[1], *drift), pace[1], max(pace[2], pace[1], *drift)
        change = None
        if a.seconds and b.seconds:
            change = b.seconds.median / pace[1] / a.seconds.median
        verdicts.append(Verdict(a, b, change, _judge(a, b, pace)))
    both = {row.key for _, row in pairs}
    alone = [
        f"only in {record.path.name}: {_name(row)}"
        for record in (new, old)
        for row in record.rows
        if row.key not in both
    ]
    return verdicts, alone


def _drift(old: Record, new: Record, pairs: list[tuple[Row, Row]]) -> tuple[float, ...]:
    """Changes of time without a change of code, as far as the same machine shows them."""
    if old.processor != new.processor:
        return ()
    if any(old.machine.get(name) != new.machine.get(name) for name in ("torch", "triton")):
        return (1.0,)
    found = [
        b.seconds.median / a.seconds.median
        for a, b in pairs
        if a.seconds
        and b.seconds
        and a.seconds.known
        and b.seconds.known
        and not a.form.startswith(OURS)
    ]
    if len(found) < 10:
        return (1.0,)
    tenths = statistics.quantiles(found, n=10)
    return (1.0, tenths[0], tenths[-1])


def _name(row: Row) -> str:
    size = f"{row.axis} {row.size:g}" if row.axis else ""
    return ", ".join(part for part in (row.op, row.variant, size, row.form) if part)


def apart(before: Spread, after: Spread, pace: Pace = (1.0, 1.0, 1.0)) -> int:
    """-1 where `after` is faster beyond both spreads, 1 where it is slower, 0 where they touch."""
    if after.over(pace[0]).p80 < before.p20:
        return -1
    return int(after.over(pace[2]).p20 > before.p80)


def _judge(old: Row, new: Row, pace: Pace) -> str:
    if old.outcome != new.outcome:
        return f"{old.outcome} before, {new.outcome} now"
    words = []
    if old.seconds and new.seconds:
        change = new.seconds.median / pace[1] / old.seconds.median
        side = apart(old.seconds, new.seconds, pace)
        if not (old.seconds.known and new.seconds.known):
            words.append("too few runs to tell a change of time from chance")
        elif side < 0:
            words.append(f"{1 / change:.2f} times as fast")
        elif side > 0:
            words.append(f"{change:.2f} times as slow")
        else:
            words.append("same time within the spread")
    if old.memory and new.memory:
        moved = new.memory - old.memory
        if abs(moved) > max(old.memory / 10, 2**20):
            words.append(f"{'more' if moved > 0 else 'less'} memory ({moved / 2**20:+.1f} MiB)")
    if old.error and new.error and abs(new.error / old.error - 1) > 0.1:
        words.append(f"{'larger' if new.error > old.error else 'smaller'} error")
    return "; ".join(words) or new.outcome
