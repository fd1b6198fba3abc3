"""Rows -> Markdown, one self-contained HTML page, and the README's table."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from ..receptive_field import context_length
from .compare import compare_records
from .plots import draw
from .records import ERRORS, Record, RecordError, Row, Score

PAPER = Path(__file__).parent.parent / "assets" / "paper"
_CHUNK = {256: 1, 512: 1, 4096: 4}  # the paper's regions a chunk, by side of the image
README_MARKS = "<!-- made by xt report: begin -->\n", "<!-- made by xt report: end -->\n"

_FIGURE_6 = (
    "Figure 6 of the paper (A100, 80 GB): Swin-S on the whole image runs out of memory near "
    "2,800 px, xT stays nearly flat up to 3,000 px. Ours: the section on images above."
)

_IN_SHORT = (
    "Times: that of the first form, the others as multiples of it. The last column names the "
    "command and the machine, below the table."
)

Table = tuple[list[str], list[list[str]]]


# Values as people read them


def seconds_text(value: float) -> str:
    """`12.3 ms`."""
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if value * scale < 1000:
            return f"{value * scale:.3g} {unit}"
    return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"


def bytes_text(value: float) -> str:
    """`12.3 MiB`."""
    if value < 1000 * 2**20:
        return f"{value / 2**20:.{0 if value >= 100 * 2**20 else 1}f} MiB"
    return f"{value / 2**30:.2f} GiB"


_UNITS = {"length": "tokens", "side": "px a side", "pixels": "Mpx"}


def _number(axis: str, size: float) -> str:
    return f"{size / 1e6 if axis == 'pixels' else size:,.0f}"


def size_text(row: Row) -> str:
    """`1,024 px a side`, `16 regions`, `4,096 tokens`."""
    return f"{_number(row.axis, row.size)} {_UNITS.get(row.axis, row.axis)}" if row.axis else ""


# Tables


def measured_table(rows: Iterable[Row], sources: list[str]) -> Table:
    """All that was measured of one op; the last column is the number of the source of the row."""
    head = ["work", "size", "form", "time (20th to 80th percentile)", "against the first form",
            "per second", "memory", "error", "over floor", "source"]  # fmt: skip
    body = []
    for row in rows:
        time = ratio = ""
        if row.outcome != "measured":
            time = row.outcome
            if row.limit and row.outcome == "out of memory":
                time += f" ({bytes_text(row.limit)})"
        elif row.seconds:
            time = seconds_text(row.seconds.median)
            if row.seconds.rounds > 1:
                low, high = seconds_text(row.seconds.p20), seconds_text(row.seconds.p80)
                time += f" ({low} to {high}, n = {row.seconds.rounds})"
            else:
                time += " (n = 1)"
        if row.ratio:
            ratio = f"{row.ratio.median:.2f} ({row.ratio.p20:.2f} to {row.ratio.p80:.2f})"
        body.append([
            row.variant, size_text(row), row.form, time, ratio,
            f"{row.per_s:,.4g} {row.unit}" if row.per_s else "",
            bytes_text(row.memory) if row.memory is not None else "",
            f"{row.error:.2g}" if row.error is not None else "",
            f"{row.over_floor:.1f}" if row.over_floor else "",
            _cite(row.source, sources),
        ])  # fmt: skip
    used = [i for i in range(len(head)) if any(line[i] for line in body)]
    return [head[i] for i in used], [[line[i] for i in used] for line in body]


def score_table(scores: Iterable[Score], sources: list[str]) -> Table:
    """Percent on the test set: each seed, and their mean with its 95 % interval."""
    body = [
        [
            s.row, ", ".join(f"{x:.1f}" for x in s.seeds), f"{s.mean:.1f} ± {s.half_width:.1f}",
            "" if s.ceiling is None else f"{s.ceiling:.1f}", _cite(s.source, sources),
        ]
        for s in scores
    ]  # fmt: skip
    return ["row", "seeds", "mean, percent", "highest possible", "source"], body


def paper_tables(rows: Sequence[Row], sources: list[str]) -> list[tuple[str, Table]]:
    """The paper's values beside ours, where there is one of ours."""

    def read(name: str) -> list[dict[str, str]]:
        with (PAPER / name).open() as file:
            return list(csv.DictReader(file))

    lines = []
    for row in read("table1_context.csv"):
        layers = int(row["xl_layers"] or 0)
        side, region = int(row["input_px"]), int(row["region_px"])
        pixels = context_length(region, layers=layers, chunk_regions=_CHUNK[side])
        lines.append([
            row["model"], f"{side}/{region}", row["xl_layers"], f"{int(row['context_px']):,}",
            f"{pixels:,}" if layers else "",
        ])  # fmt: skip
    tables = [
        ("Context in pixels (the paper's table 1; ours by `context_length`)",
         (["model", "image/region", "XL layers", "paper", "ours"], lines)),
    ]  # fmt: skip

    lines = []
    for row in read("released_throughput.csv"):
        if row["model"] != "Swin-T" or row["context"] == "Mamba":
            continue
        side = int(row["size"].split("/")[0])
        context = {"": "none", "Hyper": "hyper", "XL": "xl"}[row["context"]]
        form = "naive" if not row["context"] and side > 256 else f"xt {context}"
        ours = _image(rows, form, side, "inference")
        cells = ["not measured"] * 3
        if ours is not None:
            cells = [f"{ours.per_s:.2f}", bytes_text(ours.memory or 0), _cite(ours.source, sources)]
        lines.append([
            row["model"], row["context"] or "none", row["size"], row["regions_per_s"],
            f"{row['mem_gb']} GB", *cells,
        ])  # fmt: skip
    head = ["model", "context", "image/region", "released, regions/s", "released, memory a region",
            "ours, regions/s", "ours, memory above the model", "source"]  # fmt: skip
    title = "Speed (README of the released code: no GPU, batch or dtype named there)"
    tables.append((title, (head, lines)))

    lines = []
    table = {
        (row["context"], int(row["size"].split("/")[0])): row for row in read("table6_locality.csv")
    }
    for side in (512, 1024):
        naive, xt = table["", side], table["XL", side]
        theirs = [
            f"{float(naive[name]) / float(xt[name]):.1f}"
            for name in ("mem_gb", "minutes_per_epoch")
        ]
        pair = [_image(rows, form, side, "training") for form in ("naive, window grown", "xt xl")]
        cells = ["not measured"] * 3
        if pair[0] is not None and pair[1] is not None:
            one, other = pair[0], pair[1]
            assert one.memory and other.memory and one.per_s and other.per_s
            cells = [f"{one.memory / other.memory:.1f}", f"{other.per_s / one.per_s:.1f}",
                     f"{_cite(one.source, sources)} {_cite(other.source, sources)}"]  # fmt: skip
        lines.append([str(side), *theirs, *cells])
    head = ["side, px", "paper, memory", "paper, time", "ours, memory", "ours, time", "source"]
    title = (
        "Training, Swin on the whole image with its window grown, over xT with XL (table 6 of the "
        "paper: Swin-B; ours: Swin-T, memory above the model)"
    )
    tables.append((title, (head, lines)))
    return tables


def _image(rows: Sequence[Row], form: str, side: int, mode: str) -> Row | None:
    """What was measured of one form on whole images."""
    return next(
        (r for r in rows if r.op == "image" and r.size == side and r.form == form
         and r.variant.endswith(mode) and r.outcome == "measured"), None,
    )  # fmt: skip


def _cite(source: str, sources: list[str]) -> str:
    """`[3]`, the number of the source of a number, which enters the list here if it is new."""
    if source not in sources:
        sources.append(source)
    return f"[{sources.index(source) + 1}]"


def verdict_table(old: Record, new: Record) -> tuple[Table, list[str]]:
    """What changed from `old` to `new`."""
    verdicts, alone = compare_records(old, new)
    body = [
        [
            f"{v.new.op}, {v.new.variant}", size_text(v.new), v.new.form,
            seconds_text(v.old.seconds.median) if v.old.seconds else v.old.outcome,
            seconds_text(v.new.seconds.median) if v.new.seconds else v.new.outcome,
            v.verdict,
        ]
        for v in verdicts
    ]  # fmt: skip
    return (["work", "size", "form", "before", "now", "verdict"], body), alone


def verdict_lines(old: Record, new: Record) -> list[str]:
    """The same for a terminal, without the rows that are as they were."""
    (_, body), alone = verdict_table(old, new)
    changed = [line for line in body if not line[-1].startswith("same time")]
    lines = ["  ".join(line) for line in changed]
    lines.append(
        f"{len(body) - len(changed)} of {len(body)} rows: same time within spread and drift"
    )
    return [*lines, *alone]


# What it comes to


def findings(records: Sequence[Record]) -> str:
    """Markdown of a line for each piece of work: the top of the page, and the README's table."""
    lines = []
    told = []
    for number, record in enumerate(records, 1):
        name = f"r{number}"
        if record.rows:
            told.append(f"{name}: `{record.command}`, {record.where}")
        for op, group in groupby(sorted(record.rows, key=lambda r: r.op), key=lambda r: r.op):
            rows = list(group)
            if op == ERRORS:
                lines.append([op, size_text(rows[0]), _least_errors(rows), name])
                continue
            apart = (lambda r: (r.variant, r.size)) if op == "image" else (lambda r: (r.variant,))
            for (variant, *_), members in groupby(sorted(rows, key=apart), key=apart):
                cells = _in_line(list(members))
                lines.append([f"{op}, {variant}" if variant else op, *cells, name])
    return f"{_markdown((['work', 'size', 'measured', 'by'], lines))}\n{_bullets(told)}"


def _in_line(rows: Sequence[Row]) -> tuple[str, str]:
    """`1 / 16 regions` and `ours 66 µs / 727 µs; views x 0.56 / x 0.96`."""
    sizes = sorted({row.size for row in rows})
    axis = rows[0].axis
    cells: dict[str, dict[float, str]] = {}
    for row in sorted(rows, key=lambda r: r.form != r.first):
        cells.setdefault(row.form, {})[row.size] = _value(row)
    told = [f"{form} {' / '.join(at.get(s, '-') for s in sizes)}" for form, at in cells.items()]
    where = " / ".join(_number(axis, size) for size in sizes)
    return f"{where} {_UNITS.get(axis, axis)}" if axis else "", "; ".join(told)


def _value(row: Row) -> str:
    """What matters most of a row."""
    if row.outcome != "measured":
        return row.outcome
    if row.op == "image" and row.per_s and row.memory is not None:
        return f"{row.per_s:.2f} {row.unit}/s in {bytes_text(row.memory)}"
    if row.ratio:
        error = f" (error {row.error:.2g})" if row.error else ""
        return f"x {row.ratio.median:.2f}{error}"
    if row.first and row.seconds:
        return seconds_text(row.seconds.median)
    return bytes_text(row.memory) if row.memory is not None else "-"


def _least_errors(rows: Sequence[Row]) -> str:
    """`published 1, at best; Gaussian 0.10 (lsh, mean, 256 + 256); photographs 0.71 (..)`."""
    parts = [f"{rows[0].first} 1, at best"]
    for variant, group in groupby(rows, key=lambda r: r.variant):
        members = list(group)
        published = next(row.error for row in members if row.form == row.first)
        best = min(members, key=lambda row: row.error or 0.0)
        parts.append(f"{variant} {(best.error or 0.0) / (published or 1.0):.2f} ({best.form})")
    return "; ".join(parts)


# Pages


def write_report(
    records: Sequence[Record],
    out: Path,
    refused: Sequence[str] = (),
    against: Record | None = None,
) -> list[Path]:
    """Writes `report.md`, its plots and `report.html`, which holds all in one file, into `out`.

    records: what is shown. refused: why other files are not. against: an older record; the first of
    `records` is judged against it. Returns the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for record in records for row in record.rows]
    sources: list[str] = []
    parts = ["# xT kernels, measured\n"]
    parts.append("Each number is of a run; the list at the end names its file and bench.\n")
    parts.append(_bullets(f"{r.path.name}: {r.where}" for r in records))
    if against is not None:
        table, alone = verdict_table(against, records[0])
        parts.append(f"## {against.path.name} and {records[0].path.name}\n")
        parts.append(f"Before: {against.where}. Now: {records[0].where}.\n")
        parts.append(_markdown(table))
        parts.append(_bullets(alone))
    parts.append("## In short\n")
    parts.append(f"{_IN_SHORT}\n")
    parts.append(findings(records))
    pictures = draw(records, out / "plots")
    for op, group in groupby(sorted(rows, key=lambda r: r.op), key=lambda r: r.op):
        parts.append(f"## {op}\n")
        ordered = sorted(group, key=lambda r: (r.variant, r.size, r.form != r.first, r.form))
        for title, file in pictures.get(op, []):
            parts.append(f"![{title}](plots/{file.name})\n")
        parts.append(_markdown(measured_table(ordered, sources)))
    scores = [score for record in records for score in record.scores]
    if scores:
        parts.append("## Small tasks that need context\n")
        parts.append(_markdown(score_table(scores, sources)))
    parts.append("## The paper beside it\n")
    parts.append(f"{_FIGURE_6}\n")
    for title, table in paper_tables(rows, sources):
        parts.append(f"{title}\n")
        parts.append(_markdown(table))
    missing = {f"{form}: {why}" for r in records for form, why in r.absent.items()}
    if missing or refused:
        parts.append("## Not measured, not shown\n")
        parts.append(_bullets([*sorted(missing), *refused]))
    parts.append("## Sources\n")
    parts.append("\n".join(f"{i}. {source}" for i, source in enumerate(sources, 1)) + "\n")
    text = "\n".join(part for part in parts if part)
    page = out / "report.md"
    page.write_text(text)
    single = out / "report.html"
    single.write_text(_html(text, out))
    return [page, single, *(file for files in pictures.values() for _, file in files)]


def write_readme(records: Sequence[Record], readme: Path) -> None:
    """Replaces what stands between the two marks in `readme` by the findings.

    Raises RecordError if the marks are not there.
    """
    begin, end = README_MARKS
    text = readme.read_text()
    before, first, rest = text.partition(begin)
    _, second, after = rest.partition(end)
    if not (first and second):
        raise RecordError(f"report: {readme} must hold the lines {begin.strip()} {end.strip()}.")
    readme.write_text(f"{before}{begin}\n{findings(records)}\n{end}{after}")


def _markdown(table: Table) -> str:
    head, body = table
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in body]
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "".join(f"* {line}\n" for line in lines)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #1b1f24; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block;
        overflow-x: auto }
td, th { border-bottom: 1px solid #d5dae0; padding: .3rem .6rem; text-align: left;
         vertical-align: top }
th { background: #f3f5f7 } code { background: #f3f5f7; padding: 0 .2rem } svg { max-width: 100% }
"""


def _html(markdown: str, folder: Path) -> str:
    """The Markdown that `write_report` writes, as one page with its pictures inside."""
    parts: list[str] = []
    for block in markdown.split("\n\n"):
        lines = block.strip("\n").splitlines()
        if not lines:
            continue
        picture = re.fullmatch(r"!\[(.*)\]\((.*)\)", lines[0])
        if lines[0].startswith("#"):
            level = len(lines[0]) - len(lines[0].lstrip("#"))
            parts.append(f"<h{level}>{_inline(lines[0].lstrip('# '))}</h{level}>")
        elif picture:
            svg = (folder / picture[2]).read_text()
            parts.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
        elif lines[0].startswith("|"):
            rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if "---" not in line[:8]]
            kinds = ["th", *["td"] * (len(rows) - 1)]
            parts.append("<table>" + "".join(
                "<tr>" + "".join(
                    f"<{kind}>{_inline(cell.strip().replace(chr(92) + '|', '|'))}</{kind}>"
                    for cell in row
                ) + "</tr>"
                for kind, row in zip(kinds, rows, strict=True)
            ) + "</table>")  # fmt: skip
        elif lines[0].startswith("* "):
            parts.append("<ul>" + "".join(f"<li>{_inline(li[2:])}</li>" for li in lines) + "</ul>")
        elif re.match(r"\d+\. ", lines[0]):
            items = "".join(f"<li>{_inline(li.partition('. ')[2])}</li>" for li in lines)
            parts.append(f"<ol>{items}</ol>")
        else:
            parts.append(f"<p>{_inline(' '.join(lines))}</p>")
    title = "xT kernels, measured"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
