"""Records -> `report.md` with its plots, one self-contained HTML page, and the README's numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from . import answers, tables
from .fields import RecordError
from .formats import ERRORS, SCALING
from .html import anchor, to_html
from .paper import FIGURE_6, NOT, paper_tables
from .plots import draw
from .records import Record, Row
from .text import bullets, folded, markdown

README_MARKS = "<!-- made by xt report: begin -->\n", "<!-- made by xt report: end -->\n"
TITLE = "xT kernels, measured"
_KERNELS = ("hyper_attention", "xl_attention", "selective_scan", "extract_regions",
            "stitch_regions")  # fmt: skip

Section = tuple[str, list[str]]


class Sources:
    """Numbers of the sources that are named on a page, in their order."""

    def __init__(self) -> None:
        self.listed: list[str] = []

    def __call__(self, source: str) -> str:
        if source not in self.listed:
            self.listed.append(source)
        return f"[{self.listed.index(source) + 1}]"


def write_report(
    records: Sequence[Record],
    out: Path,
    refused: Sequence[str] = (),
    against: Record | None = None,
) -> list[Path]:
    """Writes `report.md`, its plots and `report.html`, which holds all in one file, into `out`.

    records: what is shown. refused: why other files and rows are not. against: an older record; the
    first of `records` is judged against it. Plots that only an older report in `out` shows are
    removed. Returns the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    page, single = out / "report.md", out / "report.html"
    older = re.findall(r"\]\(plots/([\w-]+\.svg)\)", page.read_text()) if page.exists() else []
    for name in older:
        (out / "plots" / name).unlink(missing_ok=True)
    pictures = draw(records, out / "plots")
    shown = {
        work: [f"![{title}](plots/{file.name})\n" for title, file in plots]
        for work, plots in pictures.items()
    }
    cite = Sources()
    sections = [
        (title, parts) for title, parts in _sections(records, shown, cite, against) if parts
    ]
    if missing := _missing(records, refused):
        sections.append(("Not measured, not shown", missing))
    sections.append(("Where the numbers come from", _origins(records, cite)))
    parts = [f"# {TITLE}\n", f"{_machines(records)}\n"]
    parts.append(bullets(f"[{title}](#{anchor(title)})" for title, _ in sections))
    for title, section in sections:
        parts += [f"## {title}\n", *section]
    text = "\n".join(parts)
    page.write_text(text)
    single.write_text(to_html(text, TITLE, out))
    return [page, single, *(file for plots in pictures.values() for _, file in plots)]


def _sections(
    records: Sequence[Record], pictures: dict[str, list[str]], cite: Sources, against: Record | None
) -> Iterable[Section]:
    """(title, parts) of all that comes before the sources; parts are empty without rows."""
    rows = [row for record in records for row in record.rows]
    if against is not None:
        table, alone = tables.verdicts(against, records[0])
        before = f"Before: {against.where}. Now: {records[0].where}.\n"
        title = f"What changed from {against.path.name} to {records[0].path.name}"
        yield title, [before, markdown(table), bullets(alone)]
    parts = []
    for title, answer in answers.ANSWERS:
        if told := answer(rows, cite):
            parts += [f"### {title}\n", *told]
    yield "Should I use it, and what will it cost?", parts
    head, body = answers.in_short(records, cite)
    yield "In short", [f"{answers.IN_SHORT}\n", markdown((head, body))] if body else []

    parts = []
    for mode in ("inference", "training"):
        if matrix := tables.encoders_by_contexts(rows, mode, cite):
            parts += [f"### {mode.title()}\n", *matrix]
    images = [row for row in rows if row.op == "image"]
    if images:
        shown = [*pictures.get("image", ()), *_measured(images, cite)]
        parts += folded("All forms, with their spread", shown)
    yield "Region encoders and contexts", parts

    scaling = [row for row in rows if row.op == SCALING]
    parts = list(pictures.get("memory", ()))
    if scaling:
        title = "All sizes: time, regions/s and memory"
        parts += folded(title, [*pictures.get(SCALING, ()), *_measured(scaling, cite)])
    yield "Memory as images grow", parts

    parts = list(pictures.get("roofline", ()))
    ops = {row.op: None for row in rows}
    for op in [op for op in _KERNELS if op in ops]:
        parts += [f"### {op}\n", *_op(rows, op, pictures, cite)]
    yield "Kernels", parts
    errors = [row for row in rows if row.op == ERRORS]
    best = answers.least_errors(errors)
    yield "Error of attention plans at equal keys", [
        f"Error of the best plan over that of {errors[0].first}, by input.\n",
        bullets(
            f"{row.variant}: {share:.2f}, {row.form} {tables.cite_all((row, first), cite)}"
            for share, row, first in best
        ),
        *folded("All plans on all inputs", _measured(errors, cite)),
    ] if errors else []  # fmt: skip
    parts = []
    for op in sorted(ops.keys() - {"image", SCALING, ERRORS, *_KERNELS}):
        parts += [f"### {op}\n", *_op(rows, op, pictures, cite)]
    yield "Streams, pages and training", parts

    scores = [score for record in records for score in record.scores]
    yield "Small tasks that need context", [
        markdown(answers.few_scores(records, cite)),
        *folded("All rows, each seed", [markdown(tables.scores_table(scores, cite))]),
    ] if scores else []  # fmt: skip
    entries = [entry for record in records for entry in record.entries]
    yield "Measured by scripts", [markdown(tables.entries_table(entries, cite))] if entries else []
    parts = [f"{FIGURE_6}\n"]
    for title, (head, body) in paper_tables(rows, cite):
        ours = [line for line in body if NOT not in line]
        parts += [f"### {title}\n", markdown((head, ours)) if ours else "None of ours measured.\n"]
        if others := [line for line in body if NOT in line]:
            parts += folded("Rows of the paper without one of ours", [markdown((head, others))])
    yield "The paper beside it", parts


def _op(rows: Sequence[Row], op: str, pictures: dict[str, list[str]], cite: Sources) -> list[str]:
    """A plot of one op; to unfold, the other plots and its rows."""
    group = [row for row in rows if row.op == op]
    first, *others = pictures.get(op, [""])
    title = f"{len(group)} rows with their spread" + (", more plots" if others else "")
    return [first, *folded(title, [*others, *_measured(group, cite)])]


def _measured(rows: Sequence[Row], cite: Sources) -> list[str]:
    ordered = sorted(rows, key=lambda r: (r.variant, r.size, r.form != r.first, r.form))
    return tables.measured(ordered, cite)


def _machines(records: Sequence[Record]) -> str:
    names = sorted({record.processor for record in records})
    return (
        f"Measured on {'; '.join(names)}. Numbers in brackets name the row a number is from, at "
        "the end with its file, command, commit and versions."
    )


def _missing(records: Sequence[Record], refused: Sequence[str]) -> list[str]:
    """Forms that benches could not measure, each with the benches that lack it, and files."""
    absent = sorted({(a.op, a.form, a.why, a.place) for r in records for a in r.absent})
    lines = [
        f"{op}: {form} (at {'; '.join(place for *_, place in group)}): {why}"
        for (op, form, why), group in groupby(absent, key=lambda a: a[:3])
    ]
    return [bullets([*lines, *refused])] if lines or refused else []


def _origins(records: Sequence[Record], cite: Sources) -> list[str]:
    """How each file was made, and the list of sources."""
    body = [[r.path.name, r.made_by, r.where] for r in records]
    numbered = "\n".join(f"{i}. {source}" for i, source in enumerate(cite.listed, 1))
    return [
        markdown((["file", "command", "machine and commit"], body)),
        *folded(f"{len(cite.listed)} sources: file and row", [f"{numbered}\n"]),
    ]


# README


def readme_text(records: Sequence[Record]) -> str:
    """The answers, ten lines more, and what tasks and scripts measured; sources are files."""
    used: dict[str, str] = {}
    names = {record.path.name: record for record in records}

    def cite(source: str) -> str:
        return used.setdefault(source.partition(", ")[0], f"r{len(used) + 1}")

    rows = [row for record in records for row in record.rows]
    parts = [part for _, answer in answers.ANSWERS[:2] for part in answer(rows, cite)]
    if (short := answers.in_short(records, cite))[1]:
        parts += [f"{answers.IN_SHORT}\n", markdown(short)]
    if (scripts := answers.by_scripts(records, cite))[1]:
        parts.append(markdown(scripts))
    told = (f"{tag}: {names[file].made_by}, {names[file].where}" for file, tag in used.items())
    return "\n".join([*parts, bullets(told)])


def write_readme(records: Sequence[Record], readme: Path) -> None:
    """Replaces what stands between the two marks in `readme` by `readme_text`.

    Raises RecordError if the marks are not there.
    """
    begin, end = README_MARKS
    text = readme.read_text()
    before, first, rest = text.partition(begin)
    _, second, after = rest.partition(end)
    if not (first and second):
        raise RecordError(f"report: {readme} must hold the lines {begin.strip()} {end.strip()}.")
    readme.write_text(f"{before}{begin}\n{readme_text(records)}\n{end}{after}")
