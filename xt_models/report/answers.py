"""What the rows come to: use this or something else, what an image will cost, and ten lines more.

Each sentence is made from rows, and claims no more than they hold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from .compare import apart
from .formats import ERRORS, SCALING
from .records import Record, Row
from .tables import Cite, cite_all, entry_text, whole_image_cell
from .text import (
    Table,
    bullets,
    bytes_text,
    duration_text,
    error_text,
    join,
    markdown,
    number_text,
    outcome_text,
    seconds_text,
    shape_text,
    shaped,
    size_number,
    size_text,
    unit_text,
)

XT, NAIVE, GROWN, ALONE = "xt xl", "naive", "naive, window grown", "regions"
_NAMES = {
    XT: "xT (context xl)", NAIVE: "naive Swin, window kept", GROWN: "naive Swin, window grown",
    ALONE: "regions, no context",
}  # fmt: skip
_TOKEN = 32  # pixels a side of a token, of all region encoders
_IN_SHORT = (
    SCALING, "streaming a deflate TIFF", "training step", "hyper_attention", ERRORS,
    "xl_attention", "selective_scan", "extract_regions", "stitch_regions", "a page, 70 % paper",
)  # fmt: skip

Sizes = dict[float, dict[str, Row]]


# Whole images


def whole_images(rows: Sequence[Row]) -> tuple[str, Sizes]:
    """(region encoder, size -> form -> row) of inference on whole images, for the encoder with most
    rows of naive forms, at the sizes that xT was measured at, if there are any.
    """
    images = [r for r in rows if r.op == "image" and r.mode == "inference" and r.form in _NAMES]

    def work(row: Row) -> tuple[str, str, str]:
        return row.encoder, row.shape.device, row.shape.dtype

    groups = [list(group) for _, group in groupby(sorted(images, key=work), key=work)]
    if not groups:
        return "", {}
    best = max(groups, key=lambda g: sum(r.form != XT for r in g))
    sizes: Sizes = {}
    for row in sorted(best, key=lambda r: r.size):
        sizes.setdefault(row.size, {})[row.form] = row
    return best[0].encoder, {size: at for size, at in sizes.items() if XT in at} or sizes


def whole_image_answer(rows: Sequence[Row], cite: Cite) -> list[str]:
    """The table of sizes by forms, and a sentence on each form."""
    encoder, sizes = whole_images(rows)
    if not sizes:
        return []
    body, firsts = [], []
    for forms in sizes.values():
        firsts.append(next(iter(forms.values())))
        cells = [whole_image_cell(forms.get(form)) for form in _NAMES]
        body.append([size_text(firsts[-1]), *cells, cite_all(forms.values(), cite)])
    told = [text for form in (NAIVE, GROWN, ALONE) if (text := against_xt(form, sizes))]
    advice = bottom_line(sizes)
    shapes = {
        name: {shape_text(f[form]) for f in sizes.values() if form in f and f[form].seconds}
        for form, name in _NAMES.items()
    }
    alike = len(set().union(*shapes.values())) == 1
    each = [f"{name}: {'; '.join(sorted(found))}" for name, found in shapes.items() if found]
    shape = f"All rows: {each[0].partition(': ')[2]}." if alike else ". ".join([*each, ""])
    return [
        *([f"**{advice}**\n"] if advice else []),
        f"One whole image, inference, region encoder `{encoder}`: time, regions/s, peak memory "
        f"above the model. {shape} A batch is of regions, of naive forms of images.\n",
        markdown((["image", *_NAMES.values(), "source"], body)), bullets(told),
    ]  # fmt: skip


def bottom_line(sizes: Sizes) -> str:
    """What to take, as far as rows tell: where naive is faster, where it ends, what xT takes."""
    told = []
    for form in (NAIVE, GROWN):
        name = _NAMES[form]
        pairs = [(at, f[form], f[XT]) for at, f in sizes.items() if form in f and XT in f]
        faster = [
            at for at, other, xt in pairs
            if other.seconds and xt.seconds and other.seconds.known and xt.seconds.known
            and apart(xt.seconds, other.seconds) < 0
        ]  # fmt: skip
        lost = [(at, other, xt) for at, other, xt in pairs if other.outcome == "out of memory"]
        if faster:
            told.append(f"{name} is faster than xT at {_pixels(faster)}: speed is no reason to "
                        "take xT there")  # fmt: skip
        if lost:
            _, other, xt = lost[0]
            took = f"; xT takes {bytes_text(xt.memory)} there" if xt.memory else ""
            told.append(f"{name} cannot run at {_pixels([size for size, *_ in lost])}: "
                        f"{outcome_text(other)}{took}")  # fmt: skip
    return ". ".join(text[0].upper() + text[1:] for text in told) + ("." if told else "")


def _pixels(sizes: Sequence[float]) -> str:
    return f"{join([f'{size:,.0f}' for size in sizes])} px"


def against_xt(form: str, sizes: Sizes) -> str:
    """How one form stands against xT: at which sizes faster, alike or slower, and where it ends."""
    groups: dict[str, list[str]] = {}
    lost = []
    for size, forms in sizes.items():
        other, xt = forms.get(form), forms.get(XT)
        where = f"{size:,.0f} px"
        if other and other.outcome != "measured":
            there = f"xT takes {bytes_text(xt.memory)}" if xt and xt.memory else "xT not measured"
            lost.append(f"at {where}: {outcome_text(other)}; {there}")
        elif other and xt and other.seconds and xt.seconds:
            time = other.seconds.median / xt.seconds.median
            told = f"at {where} x {time:.2f} of its time"
            if other.memory and xt.memory:
                told += f" and x {other.memory / xt.memory:.2f} of its memory"
            side = apart(xt.seconds, other.seconds)
            kind = {-1: "faster than xT", 0: "within the spread of xT", 1: "slower than xT"}
            known = xt.seconds.known and other.seconds.known
            groups.setdefault(kind[side] if known else "too few runs to tell", []).append(told)
    parts = [f"{kind}: {', '.join(told)}" for kind, told in groups.items()]
    if not parts and not lost:
        return ""
    unknown = [size for size, forms in sizes.items() if form not in forms]
    text = f"**{_NAMES[form]}**: {'. '.join(s[0].upper() + s[1:] for s in [*parts, *lost])}."
    return text + (f" Not measured at {_pixels(unknown)}." if unknown else "")


# Attention


def attention_answer(rows: Sequence[Row], cite: Cite) -> list[str]:
    """Exact attention against ours by length, and below how many tokens exact is to be used."""
    ours = [r for r in rows if r.op == "hyper_attention" and r.approximate and r.form == "ours"]
    body, shown, told = [], [], []
    for row in sorted(ours, key=lambda r: (r.variant, r.size)):
        forms = {
            r.form: r for r in rows
            if (r.op, r.variant, r.size, r.shape) == (row.op, row.variant, row.size, row.shape)
        }  # fmt: skip
        exact = [r for r in forms.values() if r.error is not None and not r.approximate]
        timed = [r for r in exact if r.seconds and r.form.startswith("sdpa")] or exact
        best = min(timed, key=lambda r: r.seconds.median if r.seconds else math.inf, default=None)
        if best is None or not best.seconds or not row.seconds:
            continue
        columns = [row, forms.get("ours, clusters"), forms.get("hyper, published")]
        cells = [
            f"{seconds_text(r.seconds.median)} ({r.error or 0:.2g})" if r and r.seconds
            else outcome_text(r) if r else "not measured"
            for r in columns
        ]  # fmt: skip
        exact_cell = f"{seconds_text(best.seconds.median)} ({best.form})"
        shown.append(row)
        body.append([row.variant, size_text(row), exact_cell, *cells, cite(row.source)])
        told.append((row, best))
    if not body:
        return []
    head = ["attention", "length", "exact, fastest", "ours, default plan (error)",
            "ours, clusters (error)", "HyperAttention as published (error)", "source"]  # fmt: skip
    lines = [
        _exact_below(variant, list(pairs))
        for variant, pairs in groupby(told, key=lambda pair: pair[0].variant)
    ]
    return [
        "Attention alone; errors are relative to exact attention, on clustered inputs.\n",
        *shaped(shown, (head, body)), bullets(lines),
    ]  # fmt: skip


def _exact_below(variant: str, pairs: Sequence[tuple[Row, Row]]) -> str:
    """`all keys: use exact below 4,096 tokens`: from that length on ours is always faster."""
    least = None
    for row, exact in reversed(pairs):
        assert row.seconds and exact.seconds
        if apart(exact.seconds, row.seconds) >= 0:
            break
        least = row, exact
    if least is None:
        row = pairs[-1][0]
        return f"**{variant}: use exact** at every measured length, up to {size_text(row)}."
    row, exact = least
    assert row.seconds and exact.seconds
    ratio = row.seconds.median / exact.seconds.median
    text = (
        f"**{variant}: use exact below {size_text(row)}**, and at any length where an error of "
        f"{row.error:.2g} is too much; ours takes x {ratio:.2f} of its time there."
    )
    shorter = "Shorter lengths are not measured." if row is pairs[0][0] else ""
    return f"{text} {shorter}".strip()


# Your image


_IMAGES = [(2048, 2048), (4096, 4096), (10_000, 10_000), (29_000, 25_000), (100_000, 100_000)]


def your_image(rows: Sequence[Row], cite: Cite) -> list[str]:
    """What other sizes cost, from the slowest and the fastest measured regions a second."""
    bases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        ours = (row.op, row.form) in ((SCALING, "ours"), ("image", XT))
        if ours and row.mode == "inference" and row.per_s:
            bases.setdefault((row.encoder, row.context, row.op), []).append(row)
    if not bases:
        return []
    body, firsts = [], []
    for (encoder, context, op), group in sorted(bases.items()):
        if op == "image" and (encoder, context, SCALING) in bases:
            continue
        slow, fast = (pick(group, key=lambda r: r.per_s or 0) for pick in (min, max))
        most = max(row.memory or 0 for row in group)
        side = group[0].region or 256
        end = max(row.size if op == SCALING else row.size**2 for row in group)
        cells = []
        for height, width in _IMAGES:
            regions = math.ceil(height / side) * math.ceil(width / side)
            times = [duration_text(regions / (row.per_s or 1)) for row in (fast, slow)]
            cells.append(" to ".join(dict.fromkeys(times)) + ("*" if height * width > end else ""))
        firsts.append(group[0])
        kind = "a file" if op == SCALING else "an image in memory"
        body.append([f"`{encoder}`, {context}, {kind}", *cells, f"up to {bytes_text(most)}",
                     cite_all((fast, slow), cite)])  # fmt: skip
    columns = [
        f"{number_text(h * w / 1e6)} Mpx ({h:,} x {w:,}), "
        f"{math.ceil(h / _TOKEN) * math.ceil(w / _TOKEN):,} tokens"
        for h, w in _IMAGES
    ]
    head = ["model", *columns, "peak memory above the model", "source"]
    return [
        "Computed, not measured: regions of the image over the regions/s of the fastest and the "
        "slowest row of each model; a token is of 32 x 32 px. Memory is the largest measured of "
        "the model. A star: beyond its largest measured image.\n",
        *shaped(firsts, (head, body)),
    ]


# In short


IN_SHORT = (
    "Times are of the first form, others are multiples of it; an approximation's time has its "
    "relative error beside it."
)


def in_short(records: Sequence[Record], cite: Cite) -> Table:
    """At most ten lines: for each kind of work its most compared variant, in the dtype and with the
    encoder of most rows if it is measured with those.
    """
    rows = [row for record in records for row in record.rows]
    usual = _most(row.shape.dtype for row in rows)
    encoder = _most(row.encoder for row in rows)
    ops = {row.op: None for row in rows if row.op != "image"}
    order = sorted(ops, key=lambda op: ([*_IN_SHORT, op].index(op), op))
    lines = []
    for op in order[:10]:
        group = [row for row in rows if row.op == op]
        if op == ERRORS:
            best = sorted(least_errors(group), key=lambda found: found[0])
            if not best:
                continue
            ends = best[:1] + best[1:][-1:]
            told = " to ".join(f"{share:.2f} ({row.variant})" for share, row, _ in ends)
            cells = [size_text(group[0]), f"of the error of {group[0].first}, at best: {told}"]
            members, what = [row for _, *pair in ends for row in pair], op
        else:
            alike = [row for row in group if row.shape.dtype == usual] or group
            members = (
                _scaling(group) if op == SCALING
                else max(_by_variant(alike), key=lambda rows: _telling(rows, encoder))
            )  # fmt: skip
            what = f"{op}, {members[0].variant}" if members[0].variant else op
            dtype = members[0].shape.dtype
            what += f", {dtype}" if dtype not in ("", usual) else ""
            cells = list(_in_line(members))
        lines.append([what, *cells, cite_all(members, cite)])
    return ["work", "size", "measured", "source"], lines


def _most(names: Iterable[str]) -> str:
    """The name that occurs most; "" if there is none."""
    counts = Counter(name for name in names if name)
    return max(counts, key=lambda name: counts[name], default="")


def _telling(rows: Sequence[Row], encoder: str) -> tuple[bool, bool, bool, int]:
    """A forward pass before others, then `encoder`, then the variant with most rows."""
    variant = rows[0].variant
    return "backward" not in variant, "forward" in variant, encoder in variant, len(rows)


def _scaling(rows: Sequence[Row]) -> list[Row]:
    """Ours, and the naive forms of its encoder: where there are most of them, then most of ours."""
    ours = _by_variant(row for row in rows if row.form == "ours")
    naive = [row for row in rows if row.form != "ours"]

    def beside(group: list[Row]) -> list[Row]:
        return [row for row in naive if row.encoder == group[0].encoder]

    best = max(ours, key=lambda group: (len(beside(group)), len(group)), default=[])
    return [*best, *beside(best)] if best else naive


def _by_variant(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one variant and dtype together."""

    def work(row: Row) -> tuple[str, str]:
        return row.variant, row.shape.dtype

    return [list(group) for _, group in groupby(sorted(rows, key=work), key=work)]


def _in_line(rows: Sequence[Row]) -> tuple[str, str]:
    """`1 / 16 regions` and `ours 66 µs / 727 µs; views x 0.56 / x 0.96`; of more than four sizes
    the least, the largest, and where forms end.
    """
    sizes = sorted({row.size for row in rows})
    if len(sizes) > 4:
        ends: dict[str, float] = {}
        for row in sorted(rows, key=lambda r: r.size):
            if row.outcome != "measured":
                ends.setdefault(row.form, row.size)
        sizes = sorted({sizes[0], sizes[-1], *ends.values()})
    axis = rows[0].axis
    cells: dict[str, dict[float, str]] = {}
    for row in sorted(rows, key=lambda r: r.form != r.first):
        cells.setdefault(row.form, {})[row.size] = _value(row)
    told = [f"{form} {' / '.join(at.get(s, '-') for s in sizes)}" for form, at in cells.items()]
    where = " / ".join(size_number(axis, size) for size in sizes)
    return f"{where} {unit_text(axis)}" if axis else "", "; ".join(told)


def _value(row: Row) -> str:
    """What matters most of a row; an approximation's time never without its error."""
    if row.outcome != "measured":
        return row.outcome
    if row.ratio:
        return f"x {row.ratio.median:.2f}{error_text(row)}"
    if row.first and row.seconds:
        return seconds_text(row.seconds.median) + error_text(row)
    return bytes_text(row.memory) if row.memory is not None else "-"


def least_errors(rows: Sequence[Row]) -> list[tuple[float, Row, Row]]:
    """(error over that of the first form, row of the best form, of the first) for each input."""
    found = []
    for members in _by_variant(rows):
        first = next((row for row in members if row.form == row.first), None)
        best = min(members, key=lambda row: row.error or 0.0)
        if first and first.error:
            found.append(((best.error or 0.0) / first.error, best, first))
    return found


def by_scripts(records: Sequence[Record], cite: Cite) -> Table:
    """A line for each small task and each script, in few words."""
    lines = few_scores(records, cite)[1]
    for record in records:
        for title, group in groupby(record.entries, key=lambda e: e.title):
            entries = list(group)
            notes = {e.note for e in entries}
            told = [
                " ".join(part for part in (e.form, e.size, entry_text(e)) if part)
                + (f" ({e.note})" if e.note and len(notes) > 1 else "")
                for e in entries
            ]
            common = f"{title}, {notes.pop()}" if len(notes) == 1 and "" not in notes else title
            lines.append([common, "; ".join(told), cite_all(entries, cite)])
    return ["what", "measured", "source"], lines


def few_scores(records: Sequence[Record], cite: Cite) -> Table:
    """A line for each small task."""
    lines = [line for record in records for line in _few_scores(record, cite)]
    return ["what", "measured", "source"], lines


def _few_scores(record: Record, cite: Cite) -> list[list[str]]:
    """The best of what is bounded without context, and all that is not; at the size of training."""
    scores = [s for s in record.scores if not s.size]
    if not scores:
        return []
    used = [s for s in scores if s.ceiling is None]
    told = [f"{s.title} {s.mean:.1f} ± {s.half_width:.1f}" for s in used]
    if bounded := [s for s in scores if s.ceiling is not None]:
        best = max(bounded, key=lambda s: s.mean)
        used.append(best)
        told.insert(0, f"without context at most {best.mean:.1f} ({best.title}; highest possible "
                       f"{best.ceiling:.1f})")  # fmt: skip
    what = f"{scores[0].task}, {scores[0].metric} in percent, {len(scores[0].seeds)} seeds"
    return [[what, "; ".join(told), cite_all(used, cite)]]


Answer = Callable[[Sequence[Row], Cite], list[str]]
ANSWERS: list[tuple[str, Answer]] = [
    ("Whole images", whole_image_answer), ("Attention", attention_answer),
    ("Your image", your_image),
]  # fmt: skip
