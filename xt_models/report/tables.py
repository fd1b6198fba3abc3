"""Rows -> tables of all that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from .compare import compare_records
from .records import Entry, Record, Row, Score
from .text import (
    Table,
    bytes_text,
    number_text,
    outcome_text,
    range_text,
    seconds_text,
    shaped,
    size_text,
)

Cite = Callable[[str], str]  # the source of a number -> what stands beside it


def measured(rows: Sequence[Row], cite: Cite) -> list[str]:
    """All that was measured of some work; the last column is the source of the row."""
    head = ["work", "size", "form", "time (20th to 80th percentile)", "against the first form",
            "per second", "memory", "error", "over floor", "source"]  # fmt: skip
    body = []
    for row in rows:
        time = ratio = ""
        if row.outcome != "measured":
            time = outcome_text(row)
        elif row.seconds:
            s = row.seconds
            time = range_text(s, *(seconds_text(value) for value in (s.median, s.p20, s.p80)))
            time += " (the first call)" if row.cold else ""
        if row.ratio:
            r = row.ratio
            ratio = "x " + range_text(r, *(f"{value:.2f}" for value in (r.median, r.p20, r.p80)))
        body.append([
            row.variant, size_text(row), row.form, time, ratio,
            f"{number_text(row.per_s)} {row.unit}" if row.per_s else "",
            bytes_text(row.memory) if row.memory is not None else "",
            f"{row.error:.2g}" if row.error is not None else "",
            f"{row.over_floor:.1f}" if row.over_floor else "",
            cite(row.source),
        ])  # fmt: skip
    used = [i for i in range(len(head)) if any(line[i] for line in body)]
    return shaped(rows, ([head[i] for i in used], [[line[i] for i in used] for line in body]))


def whole_image_cell(row: Row | None) -> str:
    """`0.69 s, 5.78 regions/s, 170 MiB`."""
    if row is None:
        return "not measured"
    if not row.seconds or not row.per_s:
        return outcome_text(row)
    memory = f", {bytes_text(row.memory)}" if row.memory is not None else ""
    return f"{seconds_text(row.seconds.median)}, {row.per_s:.2f} regions/s{memory}"


def cite_all(rows: Iterable[Row | Score | Entry | None], cite: Cite) -> str:
    """`[1] [2]`, each once."""
    return " ".join(dict.fromkeys(cite(row.source) for row in rows if row))


_FIRST_CONTEXTS = ("regions", "xt none", "xt xl", "xt hyper", "xt mamba", "xt vit")


def encoders_by_contexts(rows: Sequence[Row], mode: str, cite: Cite) -> list[str]:
    """Whole images: a line for each encoder and size, a column for each context."""
    ours = [
        r for r in rows if r.op == "image" and r.mode == mode and not r.form.startswith("naive")
    ]
    if not ours:
        return []
    forms = sorted({r.form for r in ours}, key=lambda f: ([*_FIRST_CONTEXTS, f].index(f), f))
    body, firsts = [], []

    def line(row: Row) -> tuple[str, str, str, float]:
        return row.encoder, row.shape.device, row.shape.dtype, row.size

    for (encoder, *_), group in groupby(sorted(ours, key=line), key=line):
        at = {row.form: row for row in group}
        firsts.append(next(iter(at.values())))
        cells = [whole_image_cell(at.get(form)) for form in forms]
        body.append([encoder, size_text(firsts[-1]), *cells, cite_all(at.values(), cite)])
    names = [
        f"context {f.removeprefix('xt ')}" if f != "regions" else "regions alone" for f in forms
    ]
    return shaped(firsts, (["encoder", "image", *names, "source"], body))


def scores_table(scores: Iterable[Score], cite: Cite) -> Table:
    """Percent on the test set: each seed, and their mean with its 95 % interval."""
    body = [
        [
            ", ".join(part for part in (s.task, s.title, s.size) if part), s.metric,
            ", ".join(f"{x:.1f}" for x in s.seeds), f"{s.mean:.1f} ± {s.half_width:.1f}",
            "" if s.ceiling is None else f"{s.ceiling:.1f}", cite(s.source),
        ]
        for s in scores
    ]  # fmt: skip
    head = ["row", "percent of", "each seed", "mean", "highest possible", "source"]
    return head, body


def entry_text(entry: Entry) -> str:
    """`0.49 s`."""
    return f"{number_text(entry.value)} {entry.unit}".strip()


def entries_table(entries: Iterable[Entry], cite: Cite) -> Table:
    body = []
    for e in entries:
        spread = ""
        if e.low is not None and e.high is not None:
            spread = f" ({number_text(e.low)} to {number_text(e.high)})"
        body.append([e.title, e.form, e.size, entry_text(e) + spread, e.note, cite(e.source)])
    return ["work", "form", "size", "measured", "note", "source"], body


def verdicts(old: Record, new: Record) -> tuple[Table, list[str]]:
    """What changed from `old` to `new`, and what only one of them has."""
    found, alone = compare_records(old, new)
    body = [
        [
            f"{v.new.op}, {v.new.variant}", size_text(v.new), v.new.form,
            seconds_text(v.old.seconds.median) if v.old.seconds else v.old.outcome,
            seconds_text(v.new.seconds.median) if v.new.seconds else v.new.outcome,
            "" if v.change is None else f"x {v.change:.2f}", v.verdict,
        ]
        for v in found
    ]  # fmt: skip
    head = ["work", "size", "form", "before", "now", "time, at equal speed of the machine",
            "verdict"]  # fmt: skip
    return (head, body), alone


def verdict_lines(old: Record, new: Record) -> list[str]:
    """The same for a terminal, without the rows that are as they were."""
    (_, body), alone = verdicts(old, new)
    changed = [line for line in body if not line[-1].startswith("same time")]
    lines = ["  ".join(cell for cell in line if cell) for line in changed]
    lines.append(f"{len(body) - len(changed)} of {len(body)} rows: same time within the spread")
    return [*lines, *alone]
